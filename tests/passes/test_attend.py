"""Attention of one query: the numbers of PyTorch's, in a graph that no longer calls it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Attend, graph_and_inputs, graph_of, plan_of, tiny_llama, tokens
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rana_compile
from rana_compile import backend
from rana_compile.backend import adapt_graph
from rana_compile.config import BackendOptions
from rana_compile.passes import attend
from rana_compile.passes.attend import arguments, lower_single_queries, share_repeated_heads, single_query_attention
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


def test_a_graph_of_one_query_no_longer_calls_it() -> None:
    given = inputs(torch.float32, 6)
    gm = graph_of(Attend(), *given)
    assert lower_single_queries(gm) == 1 and lower_single_queries(gm) == 0
    torch.testing.assert_close(gm(*given)[0], Attend()(*given))


def test_no_keys_are_left_to_pytorch() -> None:
    q, k, v = inputs(torch.float32, 6)
    assert lower_single_queries(graph_of(Attend(), q, k[:, :, :0], v[:, :, :0])) == 0


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


def repeated(x: Tensor, times: int = 3) -> Tensor:
    """As transformers does it."""
    b, heads, n, e = x.shape
    return x[:, :, None, :, :].expand(b, heads, times, n, e).reshape(b, heads * times, n, e)


def unsqueezed(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, -1, 16)


def a_part(x: Tensor) -> Tensor:
    return x[:, :, None, 1:].expand(2, 2, 3, 39, 16).reshape(2, 6, 39, 16)


class Grouped(nn.Module):
    def __init__(self, key: Any = repeated, value: Any = repeated, **given: Any) -> None:
        super().__init__()
        self.key, self.value, self.given = key, value, given

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.key(k), self.value(v), **self.given)


@pytest.fixture
def every_kernel_takes_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "GROUPING", {"cpu"})
    monkeypatch.setattr(attend, "chosen_kernel", lambda given: SDPBackend.FLASH_ATTENTION)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}], ids=["plain", "causal"])
@pytest.mark.parametrize("way", [repeated, unsqueezed])
def test_repeated_heads_are_shared(every_kernel_takes_groups: None, way: Any, options: dict[str, Any]) -> None:
    q, k, v = inputs(torch.float32, 2, queries=40)
    module = Grouped(way, way, **options)
    gm, given = graph_and_inputs(module, q, k, v)
    assert share_repeated_heads(gm) == 1 and share_repeated_heads(gm) == 0
    (call,) = (node for node in gm.graph.nodes if node.target is attend.SDPA)
    assert [arguments(call)[name].op for name in ("key", "value")] == ["placeholder"] * 2
    torch.testing.assert_close(gm(*given)[0], module(q, k, v))


@pytest.mark.parametrize(
    ("module", "queries"),
    [
        (Grouped(lambda x: x.repeat(1, 3, 1, 1)), 40),  # head 1 beside head 0
        (Grouped(lambda x: x[:, None].expand(2, 3, 2, 40, 16).reshape(2, 6, 40, 16)), 40),  # likewise
        (
            Grouped(
                lambda x: x[:, :, None, 1:].expand(2, 2, 3, 39, 16).reshape(2, 6, 39, 16),
                lambda x: repeated(x[:, :, 1:]),
            ),
            40,
        ),
        (Grouped(lambda x: repeated(x).neg()), 40),
        (Grouped(*[lambda x: x[:, :, :1][:, :, None].expand(2, 2, 3, 40, 16).reshape(2, 6, 40, 16)] * 2), 40),
        (Grouped(), 16),  # not a prompt
    ],
    ids=["beside", "another axis", "a part", "changed", "one key for all", "few queries"],
)
def test_other_heads_are_left_alone(every_kernel_takes_groups: None, module: nn.Module, queries: int) -> None:
    q, k, v = inputs(torch.float32, 2, queries=queries)
    gm, given = graph_and_inputs(module, q, k, v)
    assert share_repeated_heads(gm) == 0
    torch.testing.assert_close(gm(*given)[0], module(q, k, v))


class Written(nn.Module):
    """Something is written between repeating and attention."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        whole = k[:, :, :1]
        key, value = repeated(k), repeated(v)
        if self.what == "the copy":
            key.mul_(2)
        elif self.what == "the keys":
            k.zero_()
        elif self.what == "a view of them":
            whole[:] = 1
        else:
            key[:, :, 0] += 5
        return F.scaled_dot_product_attention(q, key, value)


@pytest.mark.parametrize("what", ["the copy", "the keys", "a view of them", "a part of the copy"])
def test_written_heads_are_left_alone(every_kernel_takes_groups: None, what: str) -> None:
    q, k, v = inputs(torch.float32, 2, queries=40)
    gm, given = graph_and_inputs(Written(what), q, k, v)
    assert share_repeated_heads(gm) == 0
    torch.testing.assert_close(gm(*given)[0], Written(what)(q, k, v))


class OneHead(nn.Module):
    """A query head that is broadcast against three."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :1], repeated(k[:, :1]), repeated(v[:, :1]))


class Turned(nn.Module):
    """Sizes that are symbolic, and not those repeated."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, n, e = k.shape
        key, value = (x[:, :, None].expand(b, heads, 3, n, e).reshape(n, heads * 3, b, e) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(0, 2), key, value)


class Chosen(Grouped):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(q, k, v)


@pytest.mark.parametrize("module", [OneHead(), Turned(), Chosen()], ids=["broadcast", "turned", "a kernel is chosen"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_only_looks_like_repeated_heads(every_kernel_takes_groups: None, module: nn.Module, dynamic: bool) -> None:
    q, k, v = inputs(torch.float32, 2, queries=40)
    shared = []

    def compiler(gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        shared.append(share_repeated_heads(gm))
        return gm

    found = torch.compile(module, backend=compiler, dynamic=dynamic)(q, k, v)
    assert not any(shared) and shared
    torch.testing.assert_close(found, module(q, k, v))


@pytest.mark.parametrize(
    ("plain", "grouped", "count"),
    [
        (SDPBackend.FLASH_ATTENTION, SDPBackend.FLASH_ATTENTION, 1),
        (SDPBackend.CUDNN_ATTENTION, SDPBackend.CUDNN_ATTENTION, 1),
        (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, 0),
        (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, 0),
        (SDPBackend.MATH, SDPBackend.MATH, 0),
    ],
)
def test_heads_are_shared_where_the_same_fast_kernel_runs(
    plain: SDPBackend, grouped: SDPBackend, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "GROUPING", {"cpu"})
    monkeypatch.setattr(attend, "chosen_kernel", lambda given: grouped if given.get("enable_gqa") else plain)
    assert share_repeated_heads(graph_of(Grouped(), *inputs(torch.bfloat16, 2, queries=40))) == count


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_the_kernel_is_the_one_that_pytorch_chooses(mask: str, dynamic: bool) -> None:
    chosen = []

    def compiler(gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        chosen.extend(attend.chosen_kernel(arguments(node)) for node in gm.graph.nodes if node.target is attend.SDPA)
        return gm

    class Masked(nn.Module):
        scale = 0.3  # a number that is symbolic too, if sizes are

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=self.scale)

    q, k, v = inputs(torch.float32, 2, queries=40)
    own = masks(torch.float32)[mask]
    with torch.no_grad():
        torch.compile(Masked(), backend=compiler, dynamic=dynamic)(q, k, v, own)
    assert chosen == [SDPBackend(torch._fused_sdp_choice(q, repeated(k), repeated(v), own, scale=0.3))]


def test_heads_stay_repeated_on_a_cpu() -> None:
    assert share_repeated_heads(graph_of(Grouped(), *inputs(torch.bfloat16, 2, queries=40))) == 0


def test_heads_stay_repeated_where_gradients_are_wanted(
    every_kernel_takes_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "share_repeated_heads", lambda gm: pytest.fail("called"))
    model = tiny_llama()
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    fast = torch.compile(model, backend="rana", options={"plan": plan, "compiler": "eager"})
    fast(input_ids=tokens(1)[0]).logits.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", ["none", "causal", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_are_shared_on_a_gpu_as_its_kernels_allow(mask: str, dtype: torch.dtype) -> None:
    def wide(x: Tensor) -> Tensor:
        return x[:, :, None].expand(2, 2, 3, 80, 64).reshape(2, 6, 80, 64)

    q, k, v = (t.repeat(1, 1, 2, 4).cuda() for t in inputs(dtype, 2, queries=40))
    given = {"none": {}, "causal": {"is_causal": True}, "float": {"attn_mask": torch.zeros_like(q[0, 0] @ q[0, 0].T)}}
    module = Grouped(wide, wide, **given[mask])
    gm, ordered = graph_and_inputs(module, q, k, v)
    shared = share_repeated_heads(gm)
    expected = SDPBackend(torch._fused_sdp_choice(q, wide(k), wide(v), **given[mask]))
    (call,) = (node for node in gm.graph.nodes if node.target is attend.SDPA)
    assert shared == (expected in attend.GROUPED)
    assert mask == "float" or shared == (dtype == torch.bfloat16)  # which kernels take a mask differs
    assert attend.chosen_kernel(arguments(call)) == expected
    torch.testing.assert_close(gm(*ordered)[0], module(q, k, v))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_model_of_grouped_queries_gives_what_it_gave(
    monkeypatch: pytest.MonkeyPatch, prompts: int, dynamic: bool
) -> None:
    monkeypatch.setattr(attend, "GROUPING", {"cpu"})
    model = tiny_llama()
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    ids = torch.cat(tokens(prompts, length=24, seed=3))
    with torch.no_grad(), rana_compile.adapted(model, plan) as run:
        expected = run(input_ids=ids).logits
    shared: list[int] = []
    monkeypatch.setattr(backend, "share_repeated_heads", lambda gm: shared.append(share_repeated_heads(gm)))
    fast = torch.compile(model, backend="rana", dynamic=dynamic, options={"plan": plan})
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert shared == [2] * len(shared) and shared
