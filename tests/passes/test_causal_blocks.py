"""Causal attention in blocks: the numbers of PyTorch's, without most of what is forbidden."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Attend, graph_and_inputs, graph_of, plan_of, tiny_llama, tokens
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rana_compile
from rana_compile import backend
from rana_compile.passes import causal_blocks
from rana_compile.passes.attend import SDPA
from rana_compile.passes.causal_blocks import attention_in_blocks, last_block, split_causal_attention
from rana_compile.types import Site

N = 384


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def inputs(n: int = N, dtype: torch.dtype = torch.float32, kv_heads: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, h, 16, generator=own).to(dtype).transpose(1, 2) for h in (6, kv_heads, kv_heads))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 320, 511, 704])
@pytest.mark.parametrize(("kv_heads", "scale"), [(6, None), (2, 0.3)])
def test_they_compute_what_pytorch_does(
    dtype: torch.dtype, tolerance: float, n: int, kv_heads: int, scale: float | None
) -> None:
    q, k, v = inputs(n, dtype, kv_heads)
    given: dict[str, Any] = {"scale": scale, "enable_gqa": kv_heads != 6}
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, **given)
    found = attention_in_blocks(q, k, v, last_block(n, dtype), **given)
    assert found.dtype == dtype and found.shape == q.shape and found.stride() == SDPA(q, q, q).stride()
    assert (found - expected).abs().max() < tolerance


def test_what_is_forbidden_is_not_looked_at() -> None:
    q, k, v = inputs()
    k[..., 128:, :], v[..., 128:, :] = torch.nan, torch.nan
    found = attention_in_blocks(q, k, v, last_block(N, q.dtype))
    assert found[..., :128, :].isfinite().all()


@pytest.mark.parametrize("n", [causal_blocks.LENGTHS[0], N, causal_blocks.LENGTHS[-1]])
def test_a_graph_in_blocks(n: int) -> None:
    given = inputs(n)
    gm = graph_of(Attend(is_causal=True, scale=0.2), *given)
    assert split_causal_attention(gm) == 1 and split_causal_attention(gm) == 0
    gm.graph.lint()
    torch.testing.assert_close(gm(*given)[0], Attend(is_causal=True, scale=0.2)(*given))


class Kernel(Attend):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(q, k, v)


class Cast(Attend):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(q, k, v)


class Mapped(Attend):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return torch.vmap(attend)(q[None], k[None], v[None])


@pytest.mark.parametrize(
    "module",
    [
        Attend(),
        Attend(is_causal=True, dropout_p=0.5),
        Attend(is_causal=True, attn_mask=torch.ones(N, N, dtype=torch.bool)),
        Kernel(is_causal=True),
        Cast(is_causal=True),
        Mapped(),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_others_are_left_alone(module: nn.Module) -> None:
    assert split_causal_attention(graph_of(module, *inputs())) == 0


def test_lengths_that_do_not_gain_are_left_alone() -> None:
    module = Attend(is_causal=True)
    for n in (causal_blocks.LENGTHS[0] - 1, causal_blocks.LENGTHS[-1] + 1):
        assert split_causal_attention(graph_of(module, *inputs(n))) == 0
    q, k, v = inputs()
    assert split_causal_attention(graph_of(module, q, k[..., :200, :], v[..., :200, :])) == 0
    assert split_causal_attention(graph_of(module, q[0], k[0], v[0])) == 0  # no batch
    assert split_causal_attention(graph_of(module, q.double(), k.double(), v.double())) == 0
    assert split_causal_attention(graph_of(module, q, k[:1], v[:1])) == 0  # another kernel, another order in memory


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, e = q.shape
        found = F.scaled_dot_product_attention(self.project(q), k, v, is_causal=True)
        return found.view(b * h, n, e) if found.is_contiguous() else found.transpose(1, 2).view(b, n, h * e)


@pytest.mark.parametrize("keys", [1, 2])
def test_views_of_what_it_gives_hold(keys: int) -> None:
    q, k, v = inputs()
    module, given = Viewed(), (q, k[:keys], v[:keys])
    site = Site("project", "linear", ("project.weight",), 16, (16,))
    plan = plan_of(module, (site, "neuron", {"threshold": torch.zeros(1, 16), "probe": torch.zeros(0, 17)}))
    with torch.no_grad():
        fast = torch.compile(module, backend="rana", dynamic=False, options={"plan": plan})
        torch.testing.assert_close(fast(*given), module(*given), rtol=1e-4, atol=1e-5)


def test_a_length_of_keys_that_is_not_known_is_not_guarded() -> None:
    seen: list[int] = []

    def look(gm: fx.GraphModule, given: list[Any]) -> fx.GraphModule:
        seen.append(split_causal_attention(gm))
        return gm

    q, k, v = inputs()
    for t in (k, v):
        torch._dynamo.mark_dynamic(t, 2)
    torch.compile(Attend(is_causal=True), backend=look)(q, k, v)
    assert seen == [0]


def test_blocks_too_small_for_the_threads_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 25)  # 2 · 6 heads · 4 slices for 50
    assert split_causal_attention(graph_of(Attend(is_causal=True), *inputs())) == 0


class Layers(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return q + F.scaled_dot_product_attention(q[..., :-1, :], k[..., :-1, :], v[..., :-1, :], is_causal=True).sum()


def test_layers_share_a_mask_for_each_length() -> None:
    given = inputs()
    gm, ordered = graph_and_inputs(Layers(), *given)
    assert split_causal_attention(gm) == 4
    assert sum(node.target is last_block for node in gm.graph.nodes) == 2
    torch.testing.assert_close(gm(*ordered)[0], Layers()(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "gradients", "calls"),
    [({}, False, 2), ({}, True, None), ({"compiler": "eager"}, False, None), ({"exclude": ["*"]}, False, None)],
)
def test_the_backend_does_so_in_adapted_graphs_for_inductor(
    options: dict[str, Any], gradients: bool, calls: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(backend, "split_causal_attention", lambda gm: found.append(split_causal_attention(gm)))
    model = tiny_llama()
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    ids = torch.cat(tokens(3, length=N, seed=3))
    with torch.no_grad(), rana_compile.adapted(model, plan) as run:
        expected = run(input_ids=ids).logits
    fast = torch.compile(model, backend="rana", dynamic=False, options={"plan": plan} | options)
    with torch.set_grad_enabled(gradients):
        logits = fast(input_ids=ids).logits
    assert found == ([] if calls is None else [calls])
    if "exclude" not in options:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
