"""Graphs before and after, as text; and the same numbers as the formulas."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import formula, graph_and_inputs
from torch import Tensor, nn

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.kernels import ops
from rana_compile.passes.find import find_sites
from rana_compile.passes.rewrite import Lowering, rewrite
from rana_compile.testing import graph_text
from rana_compile.types import Site


class Block(nn.Module):
    """Stacked q and k, a linear, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(12, 8)
        self.gate, self.up, self.down = (nn.Linear(8, 16, bias=False) for _ in range(3))
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.o(torch.cat([self.q(x), self.k(x)], -1).softmax(-1))
        return self.down(F.silu(self.gate(x)) * self.up(x))


BEFORE = """
%0 = linear(x, q.weight, q.bias)
%1 = linear(x, k.weight, None)
%2 = cat([%0, %1], -1)
%3 = softmax(%2, -1)
%4 = linear(%3, o.weight, o.bias)
%5 = linear(%4, gate.weight, None)
%6 = silu(%5)
%7 = linear(%4, up.weight, None)
%8 = mul(%6, %7)
%9 = linear(%8, down.weight, None)
%10 = output([%9])
"""
ADAPTED = """
%0 = rana_neuron(x, [q.weight, k.weight], [q.bias, None], {threshold: rana_linear_threshold})
%1 = getitem(%0, 0)
%2 = getitem(%0, 1)
%3 = cat([%1, %2], -1)
%4 = softmax(%3, -1)
%5 = rana_neuron(%4, [o.weight], [o.bias], {threshold: rana_x_threshold})
%6 = getitem(%5, 0)
%7 = rana_neuron(%6, [gate.weight, up.weight], [None, None], {threshold: rana_linear_3_threshold})
%8 = getitem(%7, 0)
%9 = getitem(%7, 1)
%10 = silu(%8)
%11 = mul(%10, %9)
%12 = rana_neuron(%11, [down.weight], [None], {threshold: rana_linear_5_threshold})
%13 = getitem(%12, 0)
%14 = output([%13])
"""
DECODE = """
%0 = stack_biases([q.weight, k.weight], [q.bias, None])
%1 = rana_neuron_decode(x, {threshold: rana_linear_threshold, weight_t: rana_linear_weight_t}, %0)
%2 = split(%1, [8, 4], -1)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = cat([%3, %4], -1)
%6 = softmax(%5, -1)
%7 = stack_biases([o.weight], [o.bias])
%8 = rana_neuron_decode(%6, {threshold: rana_x_threshold, weight_t: rana_x_weight_t}, %7)
%9 = rana_neuron_decode(%8, {threshold: rana_linear_3_threshold, weight_t: rana_linear_3_weight_t}, None)
%10 = split(%9, [16, 16], -1)
%11 = getitem(%10, 0)
%12 = getitem(%10, 1)
%13 = silu(%11)
%14 = mul(%13, %12)
%15 = rana_neuron_decode(%14, {threshold: rana_linear_5_threshold, weight_t: rana_linear_5_weight_t}, None)
%16 = output([%15])
"""


def golden(text: str) -> list[str]:
    return text.strip().split("\n")


def tensors_for(family: str, weight: Tensor, linears: int) -> Tensors:
    basis = torch.linalg.svd(weight.detach(), full_matrices=False)[0]
    if family == "low_rank":
        return {"output_basis": basis[:, :3].contiguous()}
    if family == "rank":
        return {"output_basis": basis[:, :6].contiguous(), "threshold": torch.full((6,), 0.3)}
    if family == "gated":
        return neuron_tensors(torch.full((1, weight.shape[1]), 0.2)) | {
            "gate_threshold": torch.full((len(weight) // 2,), 0.1),
        }
    return neuron_tensors(torch.full((linears, weight.shape[1]), 0.2) * torch.arange(1.0, linears + 1)[:, None])


def family_of(site: Site, family: str) -> str:
    return "neuron" if family == "gated" and site.kind != "gate_up" else family


def lowered(block: nn.Module, x: Tensor, family: str, decode: bool) -> tuple[list[str], list[str], Tensor]:
    """(text before, text after, output of the rewritten graph)."""
    gm, inputs = graph_and_inputs(block, x)
    parameters = dict(block.named_parameters())
    lowerings = []
    for match in find_sites(gm).matches:
        weights = [parameters[name] for name in match.site.weights]
        name = family_of(match.site, family)
        tensors = tensors_for(name, torch.cat(weights), len(weights))
        with torch.no_grad():
            buffers = FAMILIES[name].pack(match.site, weights, tensors) if decode else tensors
        lowerings.append(Lowering(match, name, decode, buffers))
    before = graph_text(gm.graph)
    new = rewrite(gm, lowerings)
    assert graph_text(gm.graph) == before  # the given graph is never changed
    with torch.no_grad():
        text = [re.sub(r", probe: \w+", "", line) for line in graph_text(new.graph)]  # none here: [0, d + 1]
        return before, text, new(*inputs)[0]


def exact(block: Block, x: Tensor, family: str) -> Tensor:
    """The adapted block, site by site, in float64."""

    def site(x: Tensor, *linears: nn.Linear) -> list[Tensor]:
        own = "neuron" if family == "gated" and linears[0] is not block.gate else family
        weights, biases = [lin.weight for lin in linears], [lin.bias for lin in linears]
        tensors = tensors_for(own, torch.cat(weights), len(linears))
        d_outs = tuple(lin.out_features for lin in linears)
        names = tuple(map(str, range(len(linears))))
        here = Site("s", "stacked", names, linears[0].in_features, d_outs, activation="silu")
        return list(formula(own, here, x, weights, biases, tensors).split(d_outs, -1))

    q, k = site(x.double(), block.q, block.k)
    (x,) = site(torch.cat([q, k], -1).softmax(-1), block.o)
    gate, up = site(x, block.gate, block.up)
    return site(F.silu(gate) * up, block.down)[0]


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.mark.parametrize(("decode", "after"), [(False, ADAPTED), (True, DECODE)], ids=["dense form", "kernels"])
def test_golden_graphs(block: Block, decode: bool, after: str) -> None:
    ops.load("cpu")
    before, text, _ = lowered(block, torch.randn(1, 8), "neuron", decode)
    assert before == golden(BEFORE)
    assert text == golden(after)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("decode", "rows"), [(False, 5), (True, 1), (True, 5)])
def test_rewritten_graph_computes_the_formula(block: Block, family: str, decode: bool, rows: int) -> None:
    ops.load("cpu")
    x = torch.randn(rows, 8)
    _, _, y = lowered(block, x, family, decode)
    torch.testing.assert_close(y.double(), exact(block, x, family), rtol=1e-4, atol=1e-5)
