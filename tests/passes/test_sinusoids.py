"""Sines and cosines that layers share: in memory once, of the same values, and none that changes."""

from typing import Any

import pytest
import torch
from support import graph_and_inputs, graph_of, plan_of
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from rana_compile.backend import adapt_graph
from rana_compile.config import BackendOptions
from rana_compile.passes.match import memory_of
from rana_compile.passes.memory import in_memory
from rana_compile.passes.sinusoids import share_sinusoids
from rana_compile.types import Site

INPUTS = torch.randn(2, 4, 24, 16), torch.rand(2, 24)  # queries, positions


class Rotary(nn.Module):
    """Layers that turn what they read by the same angles, and mix it so that each has kernels of its own."""

    def __init__(self, layers: int = 2, kind: str = "plain", scale: float = 1.0) -> None:
        super().__init__()
        self.layers, self.kind, self.scale = layers, kind, scale
        self.mix = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.register_buffer("frequencies", torch.arange(1.0, 9.0), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = (self.frequencies[:, None].expand(len(positions), -1, 1) @ positions[:, None]).transpose(1, 2)
        if self.kind == "half":
            cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        elif self.kind == "transposed":
            cos, sin = (t.transpose(1, 2) for t in (angles.cos(), angles.sin()))
        elif self.kind == "as they are":
            cos, sin = angles.cos(), angles.sin()
        else:
            angles = torch.cat([angles, angles], -1)
            cos, sin = (t * self.scale for t in (torch.cos(angles), torch.sin(angles)))
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if self.kind == "in the middle":
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for mix in self.mix:
            x = mix(self.turned(x, cos, sin)) + self.turned(x, cos, sin)
            if self.kind == "written":
                cos.mul_(0.5)
                sin.unsqueeze(1).mul_(0.5)
            elif self.kind == "gone on with":
                cos = cos + 1
                sin = sin + 1
        return x

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.kind == "transposed":
            cos, sin = (torch.cat([t, t], 1).transpose(1, 2) for t in (cos, sin))
        if self.kind != "in the middle":
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = x.chunk(2, -1)
        if self.kind == "as they are":
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["plain", "half", "transposed", "as they are", "in the middle"])
def test_each_is_computed_once_and_stays_what_it_is(kind: str, dynamic: bool) -> None:
    module, found = Rotary(kind=kind, scale=0.5), []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(share_sinusoids(gm))
        kept = [node for node in gm.graph.nodes if node.target is in_memory]
        assert len(kept) == gm.code.count("in_memory(") == 2
        for node in kept:
            value, base = (n.meta["example_value"] for n in (node, node.args[0]))
            assert value.stride() == base.stride() and memory_of(node) == memory_of(node.args[0])
        return compile_fx(gm, example_inputs)

    with torch.no_grad():
        result = torch.compile(module, backend=compiler, dynamic=dynamic)(*INPUTS)
        assert found == [2]
        torch.testing.assert_close(result, module(*INPUTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_computes_each_once(dynamic: bool, dtype: torch.dtype) -> None:
    """It computes what is cheap anew in each kernel that reads it, unless it lies in memory."""
    module, given = Rotary(layers=3), (INPUTS[0].to(dtype), INPUTS[1])
    module.mix.to(dtype)

    def compiled(change: bool) -> tuple[Tensor, int]:
        def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            assert not change or share_sinusoids(gm) == 2
            return compile_fx(gm, example_inputs, config_patches={"fx_graph_cache": False})

        torch._dynamo.reset()
        with torch.no_grad():
            result, codes = run_and_get_code(torch.compile(module, backend=compiler, dynamic=dynamic), *given)
        loops = [part.split("\n}", 1)[0] for code in codes for part in code.split('extern "C"')[1:]]
        return result, sum("cos(" in loop for loop in loops)

    result, loops = compiled(True)
    assert loops == 1 and compiled(False)[1] >= module.layers  # torch 2.11: one more
    with torch.no_grad():
        expected = module(*given).float()
    assert (result.float() - expected).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize(
    "module", [Rotary(layers=1), Rotary(kind="written"), Rotary(kind="gone on with")], ids=["few", "written", "others"]
)
def test_others_stay_where_they_are(module: nn.Module) -> None:
    gm = graph_of(module, *INPUTS)
    assert share_sinusoids(gm) == 0
    assert in_memory not in {node.target for node in gm.graph.nodes}


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_those_whose_strides_follow_from_data_stay_where_they_are() -> None:
    """Inductor does not keep such strides, which a view of the memory would read by."""

    class Packed(Rotary):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            chosen = (positions[0] > 0.5).nonzero()[:, 0]
            return super().forward(x[:, :, chosen], positions[:, chosen])

    module, found = Packed(layers=3, kind="as they are"), []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(share_sinusoids(gm))
        return compile_fx(gm, example_inputs)

    with torch.no_grad():
        result = torch.compile(module, backend=compiler, fullgraph=True)(*INPUTS)
        assert found == [0]
        torch.testing.assert_close(result, module(*INPUTS))


@pytest.mark.parametrize(("compiler", "count"), [("inductor", 2), ("aot_eager", 0)])
def test_only_for_inductor(compiler: str, count: int) -> None:
    with torch.no_grad():
        assert adapted(compiler).count(in_memory) == count


def test_those_inside_of_vmap_stay_where_they_are() -> None:
    module = Rotary()

    def each(x: Tensor, positions: Tensor) -> Tensor:
        return module(x[None], positions[None])[0]

    class Mapped(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return torch.vmap(each)(x, positions)

    assert share_sinusoids(graph_of(Mapped(), *INPUTS)) == 0


@pytest.mark.parametrize(("gradients", "count"), [(False, 2), (True, 0)])
def test_the_backend_shares_them_in_graphs_without_gradients(gradients: bool, count: int) -> None:
    with torch.set_grad_enabled(gradients):
        assert adapted("inductor").count(in_memory) == count


def adapted(compiler: str) -> list[Any]:
    """Targets in the graph that the backend hands to a compiler."""
    module = Rotary()
    tensors = {"threshold": torch.full((1, 16), 0.5), "probe": torch.zeros(0, 17)}
    plan = plan_of(module, (Site("mix.0", "linear", ("mix.0.weight",), 16, (16,)), "neuron", tensors))
    gm, given = graph_and_inputs(module, *INPUTS)
    rewritten, _ = adapt_graph(gm, given, plan, BackendOptions.parse({"plan": plan, "compiler": compiler}))
    return [node.target for node in rewritten.graph.nodes]
