"""Frames below ``with_room`` cross no border of the interpreter's stack, however deep its caller is."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rana_compile
from rana_compile import backend
from rana_compile.room import with_room

resource = pytest.importorskip("resource")
CALLS = 200
WIDTHS = range(0, 2100, 16)  # local variables of the caller: the chunks' 2048 slots are passed at least once


def leaf(value: Any) -> Any:
    return value


def launch(value: Any) -> Any:
    return leaf(value) if value is None else leaf((value, value))


def wide(width: int) -> "Caller":
    """A function of so many local variables that calls what it is given."""
    lines = [f"    v{i} = None" for i in range(width)]
    scope: dict[str, Any] = {}
    exec("\n".join(["def caller(call):", *lines, "    return call()"]), scope)
    caller: Caller = scope["caller"]
    return caller


def graph(*args: Any) -> Any:
    """As what Inductor writes: one frame that calls short ones all the time."""
    for _ in range(CALLS):
        launch(None)
    return args


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


Caller = Callable[[Callable[[], Any]], Any]


def slow_widths(below: Callable[[Caller], Callable[[], Any]]) -> list[int]:
    """The widths of a caller, of which ``below`` makes a call, with which a new page is touched at every launch."""
    slow = []
    for width in WIDTHS:
        call = below(wide(width))
        call()
        before = faults()
        call()
        if faults() - before >= CALLS:
            slow.append(width)
    return slow


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages of one thread")


@linux
@pytest.mark.skipif(not (3, 11) <= sys.version_info < (3, 13), reason="late releases of CPython keep a chunk")
def test_without_room_some_callers_pay_at_every_launch():
    assert slow_widths(lambda caller: lambda: caller(graph))


@linux
def test_with_room_none_does():
    roomy = with_room(graph)
    assert not slow_widths(lambda caller: lambda: caller(roomy))


@linux
def test_graphs_of_any_number_of_values_have_room():
    large = wide(20_000)
    assert not slow_widths(lambda caller: with_room(lambda: caller(graph)))
    assert not slow_widths(lambda caller: with_room(lambda: large(lambda: caller(graph))))


@linux
def test_room_below_room():
    assert not slow_widths(lambda caller: with_room(with_room(lambda: caller(graph))))


def test_arguments_results_and_errors_pass_through():
    assert with_room(lambda a, *, b: (a, b))(1, b=2) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)()


class Layers(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            for _ in range(self.steps):
                x = torch.tanh(x)
        return x


@pytest.mark.parametrize(("steps", "roomy"), [(1, False), (150, True)])
def test_adapted_graphs_have_room_if_they_call_much(monkeypatch, steps, roomy):
    torch.manual_seed(0)
    model = Layers(steps).eval()
    plan = rana_compile.calibrate(model, [{"x": torch.randn(64, 16)}], 0.7, progress=False)
    ran = []
    monkeypatch.setattr(backend, "with_room", lambda call: lambda *args: ran.append(call) or call(*args))
    x = torch.randn(8, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="rana", options={"plan": plan, "compiler": "eager"})
        torch.testing.assert_close(compiled(x), compiled(x))
    assert len(ran) == (2 if roomy else 0)
