"""Attention that says the same in another way, where that is faster. Of a single query on CPU:

    scaled_dot_product_attention(q […, 1, e], k, v, mask)  →  exp(sum(q·k) + mask - max), sum(weights·v) / sum(weights)

which Inductor fuses with what is around it. What PyTorch calls instead is made for many queries: in bfloat16 it takes 4
times as long (9 heads, a cache of 256). Over all layers that is as much as the masked products save.

Of a prompt on CUDA, where queries share keys and values that the graph repeats for each of them:

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)  →  …(q, k, v, mask, enable_gqa=True)

so that the copies are never written: a kernel less in each layer.
"""

import operator
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.nn.attention import SDPBackend

from rana_compile.kernels.ops import DTYPES, MOST_DECODED
from rana_compile.passes.match import memory_of, op_name, writes_to
from rana_compile.passes.memory import can_be_kept, kept
from rana_compile.passes.pointwise import is_pointwise

GROUPING = {"cuda"}  # devices that are looked at
GROUPED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)  # kernels that take fewer keys than queries


def lower_single_queries(gm: fx.GraphModule) -> int:
    """Replace them in place, in a graph without gradients. Returns how many; recompiles if there is one."""
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is SDPA and _is_single(node)]
    for node in found:
        given = arguments(node)
        query = given["query"]
        if _is_computed(query) and can_be_kept(query):  # so that a rotation, say, is not computed again for each key
            with gm.graph.inserting_before(node):
                given["query"] = kept(query)
        node.target, node.args, node.kwargs = single_query_attention, (), given
    if found:
        gm.recompile()
    return len(found)


SDPA = F.scaled_dot_product_attention


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a node hands to ``scaled_dot_product_attention``, by name."""
    return dict(zip(_NAMES, node.args, strict=False)) | node.kwargs


def _is_single(node: fx.Node) -> bool:
    named = arguments(node)
    if named.get("dropout_p") or named.get("is_causal") or dtype_of(node) not in DTYPES:
        return False
    query, key = (named[name].meta["example_value"] for name in ("query", "key"))
    if statically_known_true(key.shape[-2] == 0) or free_unbacked_symbols(key.shape[-2:]):  # no keys, or maybe none
        return False
    return query.device.type == "cpu" and query.dim() >= 3 and isinstance(query.shape[-2], int) and query.shape[-2] == 1


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The one dtype of queries, keys, values and what becomes of them; None where there are several, or autocast is."""
    of = [*(arguments(node)[name] for name in _NAMES[:3]), node]
    first, *others = (n.meta["example_value"] for n in of)
    same = {t.dtype for t in others} == {first.dtype}  # autocast inside the graph changes the last
    return first.dtype if same and not torch.is_autocast_enabled(first.device.type) else None


def _is_computed(node: fx.Node) -> bool:
    """Whether it is, but for views, computed element by element: Inductor has other values in memory anyway."""
    while (memory := memory_of(node)) is not None:
        base = next((n for n in node.all_input_nodes if memory_of(n) == memory), None)
        if base is None:
            break
        node = base
    return is_pointwise(node) or op_name(node) == "cat"


def single_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of query [..., heads, 1, e], in float32 between its products."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = (query.float() * key.float()).sum(-1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        mask = attn_mask.squeeze(-2)  # [..., keys]
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    most = scores.amax(-1, keepdim=True)
    weights = (scores - torch.where(most == -torch.inf, 0.0, most)).exp()  # zeros where a mask leaves nothing
    total = weights.sum(-1, keepdim=True)
    sums = (weights[..., None] * value.float()).sum(-2)  # [..., heads, e]
    return (sums / torch.where(total == 0, 1.0, total)).to(query.dtype).unsqueeze(-2)


def share_repeated_heads(gm: fx.GraphModule) -> int:
    """Repeated keys and values → grouped queries, in place, in a graph without gradients. Returns how many calls.

    Only where a fast kernel runs that takes grouped ones as well; recompiles if there is a call.
    """
    if names_kernels(gm.graph):
        return 0
    nodes = list(gm.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    writes = [place[node] for node in nodes if writes_to(node)]
    found = 0
    for node in nodes:
        if node.op != "call_function" or node.target is not SDPA:
            continue
        given = arguments(node)
        chains = [_repeated(given[name]) for name in ("key", "value")]
        if not all(chains) or not _is_prompt(given):
            continue
        first = min(place[chain[0]] for chain in chains)
        key, value = (cast(fx.Node, chain[0].args[0]) for chain in chains)
        if any(first < i < place[node] for i in writes) or not _runs_alike(given, key, value):
            continue
        node.args, node.kwargs = (), given | {"key": key, "value": value, "enable_gqa": True}
        found += 1
    if found:  # what repeated them stays for the compiler to remove
        gm.recompile()
    return found


def _repeated(node: Any) -> tuple[fx.Node, ...]:
    """The three nodes of ``k[:, :, None].expand(b, heads, times, n, e).reshape(b, heads * times, n, e)``, or none."""
    if not _is_method(node, "reshape") or not _is_method(node.args[0], "expand"):
        return ()
    wide = node.args[0]
    one = wide.args[0]
    if not _is_new_axis(one):
        return ()
    base, once, repeated, last = (n.meta["example_value"].shape for n in (one.args[0], one, wide, node))
    if (len(base), len(once), len(repeated), len(last)) != (4, 5, 5, 4):
        return ()
    b, heads, n, e = base
    sizes = zip((*repeated, *last), (b, heads, repeated[2], n, e, b, heads * repeated[2], n, e), strict=True)
    return (one, wide, node) if all(statically_known_true(size == wanted) for size, wanted in sizes) else ()


def _is_method(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == name


def _is_new_axis(node: Any) -> bool:
    """Whether it is ``x[:, :, None]`` or ``x.unsqueeze(2)``."""
    if _is_method(node, "unsqueeze"):
        return tuple(node.args[1:]) == (2,)
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    axes = [*node.args[1], *[slice(None)] * 5][:5]
    return axes == [slice(None), slice(None), None, slice(None), slice(None)]


def _is_prompt(given: dict[str, Any]) -> bool:
    """Whether there are many queries, each with keys and values of its own batch and head."""
    query, key, value = (given[name].meta["example_value"] for name in ("query", "key", "value"))
    few = isinstance(query.shape[-2], int) and query.shape[-2] <= MOST_DECODED
    if few or query.dim() != 4 or given.get("enable_gqa") or torch.is_autocast_enabled(query.device.type):
        return False
    return all(statically_known_true(t.shape[i] == query.shape[i]) for t in (key, value) for i in (0, 1))


def _runs_alike(given: dict[str, Any], key: fx.Node, value: fx.Node) -> bool:
    """Whether the same fast kernel runs with grouped queries as without: else memory may grow with n²."""
    if given["query"].meta["example_value"].device.type not in GROUPING:
        return False
    kernel = chosen_kernel(given | {"key": key, "value": value, "enable_gqa": True})
    return kernel in GROUPED and kernel == chosen_kernel(given)


def names_kernels(graph: fx.Graph) -> bool:
    """Whether the graph itself says which kernels attention takes."""
    return any(getattr(node.target, "__name__", "").startswith("_sdpa_kernel") for node in graph.nodes)


def is_mapped(node: fx.Node) -> bool:
    """Whether it is inside of vmap."""
    return torch._C._functorch.is_functorch_wrapped_tensor(node.meta["example_value"])


def chosen_kernel(given: dict[str, Any]) -> SDPBackend:
    """What PyTorch runs for one sequence of these, each with keys and values of its own.

    ``ERROR`` where nobody knows their sizes, no memory is left, or the device has no choice.
    """
    tensors: list[Any] = [given[name] for name in _NAMES[:4] if given.get(name) is not None]
    rest = {name: value for name, value in given.items() if name not in (*_NAMES[:4], "scale")}  # it decides nothing
    if any(isinstance(value, fx.Node) for value in rest.values()):
        return SDPBackend.ERROR
    try:
        with unset_fake_temporarily():
            likes = [_like(node.meta["example_value"]) for node in tensors]
        query, key, value, mask, *_ = cast(list[Any], [*likes, None])
        with torch.cuda.device(query.device) if query.is_cuda else nullcontext(), unset_fake_temporarily():
            return SDPBackend(torch._fused_sdp_choice(query, key, value, mask, **rest))
    except (torch.OutOfMemoryError, ValueError, NotImplementedError):
        return SDPBackend.ERROR


def _like(fake: Tensor) -> Tensor:
    """A tensor with these sizes and strides, of the first of the batch. Raises ValueError for sizes nobody knows."""
    sizes, strides = ([n if isinstance(n, int) else n.node.hint for n in ns] for ns in (fake.shape, fake.stride()))
    if None in (*sizes, *strides):
        raise ValueError(f"unknown sizes: {fake.shape}")
    first = [1] * (len(sizes) - 3) + sizes[-3:]
    return torch.empty_strided(first[-len(sizes) :], strides, dtype=fake.dtype, device=fake.device)
