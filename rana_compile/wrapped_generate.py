"""``torch.compile(model, backend="rana").generate(...)`` uses what was compiled.

In stock PyTorch the wrapper hands ``generate`` on to the module inside, which then runs uncompiled: no graph, no
backend, no message. Here, for wrappers of this backend alone, the module inside runs compiled while ``generate`` lasts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend


def follow_generate(backend: Callable[..., Any]) -> None:
    """Make wrappers of this backend generate with what was compiled. PyTorch's class gets one property."""

    def generate(wrapper: OptimizedModule) -> Any:
        original: Any = wrapper._orig_mod.generate  # AttributeError where the module has none, as before
        if _backend_of(wrapper) is not backend:
            return original

        @wraps(original)
        def generating(*args: Any, **kwargs: Any) -> Any:
            with _running_compiled(wrapper):
                return original(*args, **kwargs)

        return generating

    OptimizedModule.generate = property(generate)  # type: ignore[attr-defined]


def _backend_of(wrapper: OptimizedModule) -> Any:
    wrapped: Any = innermost_backend(wrapper.dynamo_ctx.callback)  # type: ignore[arg-type]
    return getattr(wrapped, "compiler_fn", wrapped)


@contextmanager
def _running_compiled(wrapper: OptimizedModule) -> Iterator[None]:
    """As after ``module.compile(...)`` with the wrapper's own settings, whose graphs Dynamo remembers."""
    module: nn.Module = wrapper._orig_mod
    before = module._compiled_call_impl
    if before is None:
        module._compiled_call_impl = wrapper.dynamo_ctx(module._call_impl)
    try:
        yield
    finally:
        module._compiled_call_impl = before
