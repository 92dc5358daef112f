"""Which sites the patterns find, which near misses they refuse, and under which names."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import graph_of, tiny_llama, tokens
from torch import Tensor, nn

from rana_compile.passes.find import bind_sites, find_sites
from rana_compile.passes.match import Found
from rana_compile.testing import graph_text


class GatedMlp(nn.Module):
    def __init__(self, activation: str = "silu", swapped: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16, bias), nn.Linear(8, 16, bias), nn.Linear(16, 8, bias)
        self.activation, self.swapped = activation, swapped

    def act(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.activation == "written_out":
            return 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x**3)))
        return getattr(F, self.activation)(x)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.act(self.gate(x)), self.up(x)
        return self.down(b * a if self.swapped else a * b)


class PlainMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(F.gelu(self.up(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q * torch.cat([k, v], -1).softmax(-1))


class IntermediateUsedElsewhere(GatedMlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden) + hidden.sum(-1, keepdim=True)


class GateOfAnotherInput(GatedMlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x.flip(-1)))


class BroadcastGate(GatedMlp):
    """Gate and up differ in width: the product broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SameWeightTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.shared(x).relu()


class InputChangedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        first = self.a(x)
        x += 1
        return first + self.b(x)


class ComputedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2)


def found_in(module: nn.Module, *inputs: Tensor) -> Found:
    return find_sites(graph_of(module, *(inputs or (torch.randn(3, 8),))))


def kinds(found: Found) -> dict[str, str]:
    return {m.site.name: m.site.kind for m in found.matches}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "written_out"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(activation: str, swapped: bool, bias: bool) -> None:
    found = found_in(GatedMlp(activation, swapped, bias))
    assert kinds(found) == {"{gate,up}": "gate_up", "down": "down"}
    assert found.matches[0].site.weights == ("gate.weight", "up.weight")
    (block,) = found.blocks
    assert (block.up, block.down) == tuple(m.site for m in found.matches)
    assert found.skipped == ()


def test_plain_mlp_with_inactive_dropout() -> None:
    found = found_in(PlainMlp().eval())
    assert kinds(found) == {"up": "up", "down": "down"}
    assert len(found.blocks) == 1


def test_stacked_inputs_with_mixed_biases() -> None:
    found = found_in(Attention())
    assert kinds(found) == {"{q,k,v}_proj": "stacked", "o_proj": "linear"}
    site = found.matches[0].site
    assert (site.d_in, site.d_outs, site.d_out) == (8, (8, 4, 4), 16)


def test_separate_gates() -> None:
    found = find_sites(graph_of(GatedMlp(), torch.randn(3, 8)), separate_gates=True)
    assert kinds(found) == {"gate": "gate", "up": "up", "down": "down"}


@pytest.mark.parametrize(
    ("module", "expected", "reason"),
    [
        (IntermediateUsedElsewhere(), {"{gate,up}": "stacked", "down": "linear"}, "is also used elsewhere"),
        (GateOfAnotherInput(), {"gate": "linear", "up": "linear", "down": "linear"}, "do not share their input"),
        (PlainMlp().train(), {"up": "linear", "down": "linear"}, "dropout is active"),
        (SameWeightTwice(), {"shared": "linear"}, "one weight is used twice"),
        (ComputedWeight(), {}, "computed in the graph"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_near_miss_falls_back_with_a_reason(module: nn.Module, expected: dict[str, str], reason: str) -> None:
    found = found_in(module)
    assert kinds(found) == expected
    assert found.blocks == ()
    assert [s for s in found.skipped if reason in s.reason]


def test_differing_shapes_are_not_an_mlp() -> None:
    found = found_in(BroadcastGate())
    assert found.blocks == ()
    assert kinds(found) == {"{gate,up}": "stacked", "down": "linear"}


def test_an_input_changed_in_place_is_two_inputs() -> None:
    assert kinds(found_in(InputChangedInPlace())) == {"a": "linear", "b": "linear"}


def test_excluded_names_are_skipped_with_the_reason() -> None:
    gm = graph_of(GatedMlp(), torch.randn(3, 8))
    found = find_sites(gm, lambda name: "not wanted" if name == "up.weight" else None)
    assert kinds(found) == {"gate": "linear", "down": "linear"}
    assert ("up.weight", "not wanted") in [(s.name, s.reason) for s in found.skipped]


def test_small_integer_weights_are_not_adapted() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.squeeze(-1))

    assert "computed in the graph" in found_in(Half()).skipped[0].reason


def test_finding_leaves_the_graph_alone() -> None:
    gm = graph_of(GatedMlp(), torch.randn(3, 8))
    before = graph_text(gm.graph)
    find_sites(gm)
    assert graph_text(gm.graph) == before


def test_llama_sites_carry_the_names_of_state_dict() -> None:
    model = tiny_llama()
    found = find_sites(graph_of(model, *tokens(1)))
    assert len(found.matches) == 2 * 4 + 1
    assert found.matches[0].site.name == "model.layers.0.self_attn.{q,k,v}_proj"
    names = {name for m in found.matches for name in m.site.weights}
    assert names <= set(model.state_dict())


def test_tied_head_has_its_own_name() -> None:
    found = find_sites(graph_of(tiny_llama(tie_word_embeddings=True), *tokens(1)))
    assert found.matches[-1].site.weights == ("lm_head.weight",)


def test_sites_bind_in_a_part_of_the_model() -> None:
    model = tiny_llama()
    whole = find_sites(graph_of(model, *tokens(1)))
    sites = [m.site for m in whole.matches]
    part = graph_of(model.model.layers[0].mlp, torch.randn(1, 3, 64))
    assert {m.site.name for m in bind_sites(part, [s for s in sites if "layers.0" in s.name])} == {
        "model.layers.0.mlp.{gate,up}_proj",
        "model.layers.0.mlp.down_proj",
    }


TRANSPOSES: dict[str, Callable[[Tensor], Tensor]] = {
    "t": Tensor.t,
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "numpy_T": torch.ops.aten.numpy_T,
}


@pytest.mark.parametrize("transpose", TRANSPOSES.values(), ids=TRANSPOSES)
def test_a_product_with_a_transposed_weight_is_a_linear(transpose: Callable[[Tensor], Tensor]) -> None:
    """``w.T`` is traced as an attribute or, from torch 2.14 on, as ``numpy_T``."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ transpose(self.weight)

    (match,) = find_sites(graph_of(nn.Sequential(Layer(8, 4)), torch.randn(3, 8))).matches
    assert (match.site.name, match.site.d_in, match.site.d_outs, match.site.transposed) == ("0", 8, (4,), False)
