"""Ctrl-C, at many moments: the model is dense and usable afterwards, as it was before."""

import contextlib
import copy
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens
from torch import nn

import rana_compile
from rana_compile import RanaError
from rana_compile.interrupts import interrupts_remembered, raise_swallowed, to_the_end
from rana_compile.passes.interpret import undisturbed


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that calibration changes for a while."""
    return {
        "training": [m.training for m in model.modules()],
        "compiled": [m._compiled_call_impl for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "mode": (torch.is_grad_enabled(), torch._dynamo.config.recompile_limit),
    }


def interrupted_at(moment: int, work: Callable[[], object]) -> bool:
    """Whether a Ctrl-C came before the work was done: at a call, of a function of ours, of this number.

    Python drops one that falls into a destructor (a generator that is closed, a weak reference's callback): it is
    pressed again at the next call."""
    left, main = moment, threading.current_thread()
    report = sys.unraisablehook

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if "rana_compile" in str(frame.f_globals.get("__name__")) and threading.current_thread() is main:
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        nonlocal left
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return report(unraisable)
        left = 1
        sys.setprofile(trace)  # which Python takes away where it raises

    sys.unraisablehook = dropped
    sys.setprofile(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
        sys.unraisablehook = report
    return False


def test_an_interrupt_that_falls_into_a_destructor_comes_again() -> None:
    def closing() -> Iterator[int]:
        yield from (1, 2)

    def work() -> None:
        next(closing())  # call, return, and a call again when it is closed
        finished.append(stop())

    def stop() -> int:
        return 1

    module = closing.__globals__ | {"__name__": "rana_compile.fake"}
    closing, stop = (FunctionType(f.__code__, module, f.__name__) for f in (closing, stop))
    for moment in range(1, 6):
        finished: list[int] = []
        assert interrupted_at(moment, work) and not finished


def test_calibration_interrupted_at_any_call_leaves_the_model_as_it_was() -> None:
    model, ids = tiny_llama(layers=1).train(), tokens(4)
    model.lm_head.weight.requires_grad_(False)
    model.compile(backend="eager")
    expected = model(input_ids=ids[0]).logits
    before = state_of(model)
    moment, seen = 1, 0
    while interrupted_at(moment, lambda: rana_compile.calibrate(model, ids, 0.6, "neuron", progress=False)):
        assert state_of(model) == before, f"interrupted at call {moment}"
        seen += 1
        moment = 3 * moment + 1
    assert seen > 5
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model(input_ids=ids[0]).logits, expected)


def test_a_second_interrupt_while_the_model_is_put_back() -> None:
    model = tiny_llama(layers=1).train()
    before = state_of(model)

    class Flag:
        """A training flag whose setter is interrupted, once."""

        armed = True

        def __set__(self, module: Any, value: bool) -> None:
            if value and Flag.armed:
                Flag.armed = False
                raise KeyboardInterrupt
            module.__dict__["_flag"] = value

        def __get__(self, module: Any, owner: type) -> Any:
            return self if module is None else module.__dict__["_flag"]

    class Norm(type(model.model.norm)):
        training = Flag()

    model.model.norm.__dict__["_flag"] = model.model.norm.__dict__.pop("training")
    model.model.norm.__class__ = Norm
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        raise KeyboardInterrupt
    assert not Flag.armed and state_of(model) == before


def test_restoring_ends_before_the_interrupt_is_raised() -> None:
    done: list[int] = []

    def restore() -> None:
        done.append(1)
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(2)

    with pytest.raises(KeyboardInterrupt):
        to_the_end(restore)
    assert done == [1, 1, 2]


SMALL = {"calibration_tokens": 100, "max_divergence": 9.0, "compiler": "eager", "recipe": "neuron"}


def run(model: nn.Module, count: int) -> list[Any]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits for ids in tokens(count)]


def once(error: BaseException, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails the first time."""
    failed: list[int] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(1)
            raise error
        return original(*args, **kwargs)

    return wrapper


def test_a_fit_inside_the_backend_that_is_interrupted_starts_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dense meanwhile; and what comes in the end is fitted on as many tokens as ever, not on what was left."""
    caplog.set_level(logging.INFO, "rana_compile.self_calibration")
    from rana_compile import self_calibration

    model = tiny_llama(layers=1)
    exact = run(model, 4)
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options=SMALL)
    monkeypatch.setattr(self_calibration, "fit_recorded", once(KeyboardInterrupt(), self_calibration.fit_recorded))
    run(fast, 3)
    with pytest.raises(KeyboardInterrupt):
        run(fast, 1)
    for got, dense in zip(run(fast, 3), exact, strict=False):
        torch.testing.assert_close(got, dense)
    with pytest.raises(RanaError, match="still calibrating, 96 of 100 tokens kept"):
        rana_compile.plan_of(fast)
    run(fast, 2)
    assert rana_compile.plan_of(fast).info["tokens"] == 96  # of 128; a fourth is held back
    first, second = caplog.messages
    assert "the fit was interrupted; calibrating on the next calls" in first and "on 128 tokens" in second


def test_a_swap_that_is_interrupted_is_done_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph must not stay dense while the model says that it has a plan."""
    from rana_compile import backend

    model = tiny_llama(layers=1)
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options=SMALL)
    run(fast, 3)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "adapt_graph", once(KeyboardInterrupt(), backend.adapt_graph))
        with pytest.raises(KeyboardInterrupt):
            run(fast, 1)
    plan = rana_compile.plan_of(fast)
    with rana_compile.adapted(model, plan) as formulas, torch.no_grad():
        expected = formulas(input_ids=tokens(1)[0], use_cache=False).logits
    torch.testing.assert_close(run(fast, 1)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["fit_recorded", "adapt_graph"])
def test_without_memory_for_fit_or_swap_the_model_stays_dense_and_says_what_needs_less(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rana_compile import backend, self_calibration

    model = tiny_llama(layers=1)
    exact = run(model, 6)
    model.compile(backend="rana", options=SMALL)
    module = self_calibration if where == "fit_recorded" else backend
    lacking = rana_compile.OutOfMemoryError("out of memory (CUDA); leave some of them dense")
    error = torch.OutOfMemoryError("CUDA out of memory") if where == "fit_recorded" else lacking
    monkeypatch.setattr(module, where, once(error, getattr(module, where)))
    for got, dense in zip(run(model, 6), exact, strict=True):
        torch.testing.assert_close(got, dense)
    (line,) = [m for m in caplog.messages if "stays dense" in m]
    assert "out of memory (CUDA" in line and ("calls of fewer tokens" in line or "leave some of them dense" in line)
    with pytest.raises(RanaError, match="out of memory"):
        rana_compile.plan_of(model)


def swallow() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_swallowed_interrupt_is_raised_when_asked_and_for_another_error() -> None:
    with interrupts_remembered():
        raise_swallowed()  # none came
        swallow()
        with pytest.raises(KeyboardInterrupt):
            raise_swallowed()
    with pytest.raises(KeyboardInterrupt), interrupts_remembered():
        swallow()
        raise ImportError("numpy failed to import")
    with pytest.raises(ImportError), interrupts_remembered():
        raise ImportError("without one")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    raise_swallowed()  # what is over is forgotten


def test_a_handler_of_someone_else_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with interrupts_remembered():
            signal.raise_signal(signal.SIGINT)
            raise_swallowed()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
