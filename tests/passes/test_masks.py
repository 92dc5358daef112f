"""Attention masks that calls share: numbers that are made once, of the same meaning, and of no mask that changes."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import graph_and_inputs, graph_of, plan_of
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend

from rana_compile.backend import adapt_graph
from rana_compile.config import BackendOptions
from rana_compile.passes import masks
from rana_compile.passes.attend import SDPA, arguments
from rana_compile.passes.masks import as_numbers, share_masks
from rana_compile.types import Site


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    own = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 6, n, 16, generator=own) for n in (7, 40, 40))  # type: ignore[return-value]


@torch.library.custom_op("rana_tests::flip", mutates_args={"mask"})
def flip(q: Tensor, mask: Tensor) -> None:
    mask.logical_not_()


class Mapped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for _ in range(2):
                q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[0])
            return q

        return torch.vmap(attend)(q, k, v)


class Stacked(nn.Module):
    """Layers that share a mask [1, 1, queries, keys], whatever else they do."""

    def __init__(self, layers: int = 3, write: str = "nothing", cast: bool = False) -> None:
        super().__init__()
        self.layers, self.write, self.cast = layers, write, cast

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        seen = mask & mask.any()
        for _ in range(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
                q = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            if self.write == "the mask":
                seen.logical_not_()
            elif self.write == "a view of it":
                seen[..., 3:].fill_(True)
            elif self.write == "by an operation":
                flip(q, seen)
            elif self.write == "what it is made of":
                mask[..., 0] = True
            elif self.write == "something else":
                q[..., 0] = 1
        return q


def seen_by(queries: int = 7, keys: int = 40) -> Tensor:
    mask = torch.rand(1, 1, queries, keys, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 2, :] = False  # this query sees nothing
    return mask


@pytest.mark.parametrize(("keys", "stride"), [(40, 40), (37, 40), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_say_what_the_mask_does_in_aligned_rows(dtype: torch.dtype, keys: int, stride: int) -> None:
    mask = seen_by(keys=keys)
    found = as_numbers(mask, dtype)
    assert found.dtype == dtype and found.stride()[-2:] == (stride, 1)
    assert torch.equal(found, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("write", ["nothing", "something else", "what it is made of"])
def test_a_mask_that_calls_share_becomes_numbers_once(dynamic: bool, write: str) -> None:
    given = *inputs(), seen_by()
    graphs = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append((gm, share_masks(gm), share_masks(gm)))
        return gm

    module = Stacked(write=write)
    expected = module(*given[:3], given[3].clone())
    with torch.no_grad():
        found = torch.compile(module, backend=compiler, dynamic=dynamic)(*given)
    ((gm, first, second),) = graphs
    assert (first, second) == (1, 0)
    found_masks = {arguments(node)["attn_mask"] for node in gm.graph.nodes if node.target is SDPA}
    assert [mask.target for mask in found_masks] == [as_numbers]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keys", [40, 37])
def test_inductor_makes_the_numbers_once(keys: int, dynamic: bool) -> None:
    """It computes what is cheap anew for each call that reads it, unless it lies in memory."""
    given = *(torch.randn(2, 6, n, 16) for n in (7, keys, keys)), seen_by(keys=keys)

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        assert share_masks(gm) == 1
        return compile_fx(gm, example_inputs)

    module = Stacked()
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(module, backend=compiler, dynamic=dynamic), *given)
    given_masks = re.findall(r"attn_mask=(?:reinterpret_tensor\()?(\w+)", code)
    assert len(given_masks) == 3 and len(set(given_masks)) == 1
    torch.testing.assert_close(found, module(*given), equal_nan=True)


@pytest.mark.parametrize(
    "module",
    [
        Stacked(layers=1),
        *[Stacked(write=what) for what in ("the mask", "a view of it", "by an operation")],
        Stacked(cast=True),
        Mapped(),
    ],
    ids=["one call", "written", "a view written", "written by an operation", "autocast", "vmap"],
)
def test_other_masks_stay_what_they_are(module: nn.Module) -> None:
    given = *inputs(), seen_by()
    gm = graph_of(module, *given)
    assert share_masks(gm) == 0
    assert as_numbers not in {node.target for node in gm.graph.nodes}


def test_numbers_stay_what_they_are() -> None:
    class Numbers(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            for _ in range(2):
                q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return q

    given = inputs()
    assert share_masks(graph_of(Numbers(), *given, as_numbers(seen_by(), torch.float32))) == 0


@pytest.mark.parametrize(
    ("of_truths", "of_numbers"),
    [(SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH), (SDPBackend.ERROR, SDPBackend.ERROR)],
    ids=["another", "nobody knows"],
)
def test_masks_are_shared_only_where_the_same_kernel_runs(
    of_truths: SDPBackend, of_numbers: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(given: dict[str, Any]) -> SDPBackend:
        return of_truths if given["attn_mask"].meta["example_value"].dtype == torch.bool else of_numbers

    monkeypatch.setattr(masks, "chosen_kernel", kernel)
    gm = graph_of(Stacked(), *inputs(), seen_by())
    assert share_masks(gm) == 0
    assert as_numbers not in {node.target for node in gm.graph.nodes}


def test_a_mask_that_is_written_through_another_input_stays() -> None:
    class Through(nn.Module):
        def forward(self, q: Tensor, mask: Tensor, other: Tensor) -> Tensor:
            first = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            other.logical_not_()
            return F.scaled_dot_product_attention(first, q, q, attn_mask=mask)

    q, mask = torch.randn(1, 2, 7, 16), seen_by(keys=7)[0, 0]
    assert share_masks(graph_of(Through(), q, mask, mask[2:])) == 0
    assert share_masks(graph_of(Through(), q, mask, mask[2:].clone())) == 1


@pytest.mark.parametrize(("gradients", "count"), [(False, 1), (True, 0)])
def test_the_backend_shares_masks_in_graphs_without_gradients(gradients: bool, count: int) -> None:
    class Masked(Stacked):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return super().forward(self.project(q), k, v, mask)

    module = Masked()
    tensors = {"threshold": torch.full((1, 16), 0.5), "probe": torch.zeros(0, 17)}
    site = Site("project", "linear", ("project.weight",), 16, (16,))
    plan = plan_of(module, (site, "neuron", tensors))
    with torch.set_grad_enabled(gradients):
        gm, given = graph_and_inputs(module, *inputs(), seen_by())
        rewritten, _ = adapt_graph(gm, given, plan, BackendOptions.parse({"plan": plan}))
    assert [node.target for node in rewritten.graph.nodes].count(as_numbers) == count
