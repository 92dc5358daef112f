"""Recording in segments: the same samples, bit for bit, in less memory; graphs that may not run twice run once."""

import gc
import operator
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import graph_and_inputs, graph_of, tiny_llama, tokens
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rana_compile.passes.find import find_sites
from rana_compile.passes.interpret import SiteInterpreter
from rana_compile.passes.match import is_in_place
from rana_compile.passes.record import Recorder
from rana_compile.passes.segments import segments


class Unforgetting(Recorder):
    again = None


class Layers(nn.Module):
    """Residual layers: the stream changed in place if asked, and gradients off for a moment after layer ``quiet``."""

    def __init__(self, count: int = 9, in_place: bool = False, quiet: int = -1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24)) for _ in range(count))
        self.in_place, self.quiet = in_place, quiet

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for i, (up, down) in enumerate(self.layers):
            y = down(F.silu(up(x)).clone())
            if i == self.quiet:
                with torch.no_grad():
                    y = y + 1
            x = x.add_(y) if self.in_place else x + y
        return x


class Living(TorchDispatchMode):
    """Knows the bytes of the tensors made inside it that are still there, views of a module's weights left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.made: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self.weights:
                self.made[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if reference() is not None)


def recorded(module: nn.Module, kind: type[Recorder], *inputs: Tensor) -> tuple[Recorder, Tensor]:
    for p in module.parameters():
        p.requires_grad_(False)
    gm, args = graph_and_inputs(module, *inputs)
    recorder = kind(lambda: 256, seed=0)
    recorder.basis_rows = True
    with torch.enable_grad():
        outputs = SiteInterpreter(gm, find_sites(gm).matches, recorder).run(*args)
        output = max((t for t in outputs if t.requires_grad), key=Tensor.numel)  # not a cache
        output.square().sum().backward()
    return recorder, output


@pytest.mark.parametrize(
    "module",
    [Layers(), Layers(1), Layers(in_place=True), Layers(quiet=4), tiny_llama(layers=5), tiny_llama(layers=2)],
    ids=["residual", "two sites", "in place", "without gradients for a while", "llama", "short"],
)
def test_samples_are_the_same(module: nn.Module) -> None:
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    inputs = (x,) if isinstance(module, Layers) else tuple(tokens(1))
    (with_, a), (without, b) = (recorded(module, kind, *inputs) for kind in (Recorder, Unforgetting))
    assert torch.equal(a, b)
    assert with_.samples.keys() == without.samples.keys() and with_.samples
    for site, sample in with_.samples.items():
        other = without.samples[site]
        assert sample.seen == other.seen
        assert torch.equal(sample.x, other.x) and torch.equal(sample.gradients(), other.gradients())
        assert sample.gradients().count_nonzero()
        assert torch.equal(with_.moments[site][0], without.moments[site][0])


class Positional(nn.Module):
    """Activations that are told to write in place by position, across the lines of segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.elu(layer(x) * 1, 1.0, True)
        return x


def test_activations_in_place_by_position() -> None:
    x = torch.randn(8, 24)
    (with_, _), (without, _) = (recorded(Positional(), kind, x) for kind in (Recorder, Unforgetting))
    assert with_.samples and with_.samples.keys() == without.samples.keys()


class Tapped(Layers):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.layers[0](x)
        return super().forward(first), first.tanh()  # the second is not part of the loss


@pytest.mark.parametrize("differentiated", [True, False])
def test_nothing_stays_alive(differentiated: bool) -> None:
    for p in (module := Tapped()).parameters():
        p.requires_grad_(False)
    gm, args = graph_and_inputs(module, torch.randn(8, 24))
    with torch.enable_grad():
        interpreter = SiteInterpreter(gm, find_sites(gm).matches, Recorder(lambda: 8, seed=0))
        outputs = interpreter.run(*args)
        if differentiated:
            outputs[0].sum().backward()
    gone = [weakref.ref(interpreter), *(weakref.ref(t) for t in outputs)]
    del interpreter, outputs
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_an_activation_that_is_written_to_later_is_an_error() -> None:
    for p in (module := Layers()).parameters():
        p.requires_grad_(False)
    gm, args = graph_and_inputs(module, torch.randn(8, 24))
    with torch.enable_grad():
        (output,) = SiteInterpreter(gm, find_sites(gm).matches, Recorder(lambda: 8, seed=0)).run(*args)
        next(t for t in args if isinstance(t, Tensor) and t.dim() == 1).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_less_is_kept_for_the_backward_pass() -> None:
    for p in (module := Layers(count=32)).parameters():
        p.requires_grad_(False)
    gm, args = graph_and_inputs(module, torch.randn(64, 24))
    kept = []
    for kind in (Recorder, Unforgetting):
        with torch.enable_grad(), Living(module) as living:
            (output,) = SiteInterpreter(gm, find_sites(gm).matches, kind(lambda: 8, seed=0)).run(*args)
            assert output.requires_grad
            kept.append(living.bytes())
    assert kept[0] < kept[1] / 3


def test_linears_of_a_site_stay_together() -> None:
    for module, inputs in ((tiny_llama(layers=5), tokens(1)), (Layers(), [torch.randn(2, 24)])):
        gm = graph_of(module, *inputs)
        matches = find_sites(gm).matches
        parts = segments(gm.graph, matches)
        assert [node for part in parts for node in part] == list(gm.graph.nodes)
        assert len(parts) > 3
        for match in matches:
            assert len({i for i, part in enumerate(parts) for lin in match.linears if lin.node in part}) == 1


def test_a_graph_without_sites_is_one_part() -> None:
    gm = graph_of(nn.Softmax(-1), torch.randn(2, 4))
    assert segments(gm.graph, ()) == [list(gm.graph.nodes)]


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        ("add_", {}, True),
        ("__and__", {}, False),
        (torch.relu_, {}, True),
        (operator.iadd, {}, True),
        (operator.ior, {}, True),
        (operator.setitem, {}, True),
        (operator.index, {}, False),
        (operator.and_, {}, False),
        (torch.add, {}, False),
        (torch.add, {"out": None}, True),
        (F.relu, {"inplace": True}, True),
        (F.relu, {"inplace": False}, False),
        (F.hardtanh, {"inplace": True}, True),
        (torch.ops.aten.add_, {}, True),
        (torch.ops.aten.copy_.default, {}, True),
        (torch.ops.aten.add.Tensor, {}, False),
    ],
)
def test_what_writes_to_its_input(target: Any, arguments: dict[str, Any], expected: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    kind = "call_method" if isinstance(target, str) else "call_function"
    assert is_in_place(graph.create_node(kind, target, (x, x), arguments)) is expected
