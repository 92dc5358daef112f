"""Gated MLPs as one op in decode graphs: when, with which activation, and the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from support import graph_of, plan_of
from torch import Tensor, nn

from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.passes.find import find_sites
from rana_compile.testing import graph_text, rewritten_graphs


class Mlp(nn.Module):
    def __init__(self, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16, bias), nn.Linear(8, 16, bias), nn.Linear(16, 8, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))

    def act(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.activation == "swish written out":
            return x * torch.sigmoid(x)
        return getattr(F, self.activation)(x)


def adapted_text_and_outputs(module: nn.Module, rows: int = 1) -> tuple[list[str], Tensor, Tensor]:
    x = torch.randn(rows, 8)
    sites = [m.site for m in find_sites(graph_of(module, x)).matches]
    plan = plan_of(module, *((s, "neuron", neuron_tensors(torch.full((len(s.weights), s.d_in), 0.2))) for s in sites))
    fast = torch.compile(module, backend="rana", options={"plan": plan})
    (new,) = rewritten_graphs(module, plan, x)
    with torch.no_grad():
        mask = lambda t: t * (t.abs() >= 0.2)  # noqa: E731
        gate, up = module.gate(mask(x)), module.up(mask(x))
        return graph_text(new.graph), fast(x), module.down(mask(module.act(gate) * up))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "name"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_tanh"), ("relu", "relu"), ("swish written out", "silu")],
)
def test_fused_with_its_activation(activation: str, name: str, bias: bool) -> None:
    text, fast, expected = adapted_text_and_outputs(Mlp(activation, bias))
    (call,) = [line for line in text if "gated_mlp" in line]
    assert call.endswith(f"{name})")
    assert not [line for line in text if " mul(" in line or "masked_linear" in line]
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)


def test_other_activations_stay_with_inductor() -> None:
    text, fast, expected = adapted_text_and_outputs(Mlp("mish"))
    assert not [line for line in text if "gated_mlp" in line]
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)


def test_many_rows_stay_with_inductor() -> None:
    text, fast, expected = adapted_text_and_outputs(Mlp("silu"), rows=40)
    assert not [line for line in text if "gated_mlp" in line]
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)
