"""How a compiled graph is called: what is asserted of its inputs, and in which order Dynamo looks for it."""

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan, backend, profiled


def logits(model: Any, length: int) -> Tensor:
    return model(input_ids=tokens(1, length=length, seed=3)[0], use_cache=False).logits


def test_shapes_that_dynamo_guards_are_not_asserted_again(model: nn.Module, plan: Plan) -> None:
    """Not in an adapted graph, unless asked for; nor where guards do not hold them, or nothing is adapted."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    def asserts(grad: bool = False, dynamic: bool = False, **options: Any) -> bool:
        torch.compiler.reset()
        fast = torch.compile(model, backend="rana", dynamic=dynamic, options=options)
        with fresh_cache(), torch.set_grad_enabled(grad):
            _, (code, *_) = run_and_get_code(logits, fast, 12)
        return re.search(r"assert_size_stride(_grouped)?\(", code) is not None

    assert not asserts(plan=plan)
    assert asserts(plan=plan, inductor={"size_asserts": True})
    assert asserts(plan=plan, grad=True)
    assert not asserts(plan=plan, dynamic=True)
    assert asserts(plan=plan, free_dense_weights=True)
    assert asserts(min_features=4096)


@pytest.mark.parametrize("dynamic", [False, True])
def test_symbolic_shapes_are_asserted_where_guards_are_written_already(
    model: nn.Module, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what a model that calibrated itself, or a second one that shares the graph, compiles later."""
    guarded: list[bool] = []
    asked = backend.are_guarded

    def seen(*args: Any) -> bool:
        guarded.append(asked(*args))
        return guarded[-1]

    monkeypatch.setattr(backend, "are_guarded", seen)
    options = {"calibration_tokens": 40, "max_divergence": 9.0, "compiler": "eager", "min_features": 0}
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", dynamic=dynamic, options=options)
    with torch.no_grad():
        for _ in range(4):
            logits(fast, 12)
    assert guarded == [not dynamic]
    plan = rana_compile.plan_of(fast)
    torch.compiler.reset()
    given = torch.compile(model, backend="rana", dynamic=dynamic, options={"plan": plan, "compiler": "eager"})
    with torch.no_grad():
        logits(given, 12)
    assert guarded[1:] == [True]


def test_dynamo_keeps_its_graphs_in_order_once_several_threads_call(
    model: nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread the graph used last comes first, which saves the guards of the others."""
    told: list[int] = []
    monkeypatch.setattr(profiled, "_allow_threads", lambda: told.append(threading.get_ident()))
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options={"plan": plan, "compiler": "eager"})

    def call() -> int:
        with torch.no_grad():
            logits(fast, 12)
        return threading.get_ident()

    call(), call()
    assert told == []
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(call).result()
        assert told == [other]
        pool.submit(call).result()
    assert told == [other]
