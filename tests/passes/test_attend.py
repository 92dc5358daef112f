"""Attention of one query: the numbers of PyTorch's, in a graph that no longer calls it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import graph_and_inputs, graph_of, plan_of
from torch import Tensor, nn

from rana_compile.backend import adapt_graph
from rana_compile.config import BackendOptions
from rana_compile.passes.attend import lower_single_queries, single_query_attention
from rana_compile.types import Site


def inputs(dtype: torch.dtype, kv_heads: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.Generator().manual_seed(0)
    heads = (6, kv_heads, kv_heads)
    return tuple(
        torch.randn(2, h, n, 16, generator=own).to(dtype) for h, n in zip(heads, (queries, 40, 40), strict=True)
    )  # type: ignore[return-value]


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    some = torch.arange(40) <= torch.tensor([17, -1])[:, None, None, None]  # the second sequence attends to nothing
    return {"none": None, "bool": some, "float": torch.zeros(some.shape, dtype=dtype).masked_fill(~some, -torch.inf)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize(("kv_heads", "scale"), [(6, None), (2, 0.3)])
def test_it_computes_what_pytorch_does(
    dtype: torch.dtype, tolerance: float, mask: str, kv_heads: int, scale: float | None
) -> None:
    q, k, v = inputs(dtype, kv_heads)
    given: dict[str, Any] = {"attn_mask": masks(dtype)[mask], "scale": scale, "enable_gqa": kv_heads != 6}
    exact = given | {"attn_mask": masks(torch.float64)[mask]}
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **exact)
    found = single_query_attention(q, k, v, **given)
    assert found.dtype == dtype and found.shape == q.shape
    assert (found - expected).abs().max() < tolerance


class Attend(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.given).relu()


def test_a_graph_of_one_query_no_longer_calls_it() -> None:
    given = inputs(torch.float32, 6)
    gm = graph_of(Attend(), *given)
    assert lower_single_queries(gm) == 1 and lower_single_queries(gm) == 0
    torch.testing.assert_close(gm(*given)[0], Attend()(*given))


@pytest.mark.parametrize("given", [{"dropout_p": 0.5}, {"is_causal": True}, {}])
def test_others_are_left_alone(given: dict[str, Any]) -> None:
    q, k, v = inputs(torch.float32, 6, queries=1 if given else 3)
    assert lower_single_queries(graph_of(Attend(**given), q, k, v)) == 0
    assert lower_single_queries(graph_of(Attend(), q[:, :, :1].double(), k.double(), v.double())) == 0


class Cast(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v)


def test_autocast_in_the_graph_is_left_to_pytorch() -> None:
    assert lower_single_queries(graph_of(Cast(), *inputs(torch.float32, 6))) == 0


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.project(q), k, v)


@pytest.mark.parametrize(
    ("gradients", "adapted", "lowered"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_the_backend_does_so_in_adapted_graphs_without_gradients(gradients: bool, adapted: bool, lowered: bool) -> None:
    module = Projected()
    tensors = {"threshold": torch.full((1, 16), 0.5), "probe": torch.zeros(0, 17)}
    site = Site("project", "linear", ("project.weight",), 16, (16,))
    plan = plan_of(module, (site, "neuron", tensors))
    with torch.set_grad_enabled(gradients):
        gm, given = graph_and_inputs(module, *inputs(torch.float32, 6))
        options = BackendOptions.parse({"plan": plan} | ({} if adapted else {"exclude": ["*"]}))
        rewritten, _ = adapt_graph(gm, given, plan, options)
    targets = {node.target for node in rewritten.graph.nodes}
    assert (single_query_attention in targets) == lowered != (F.scaled_dot_product_attention in targets)
