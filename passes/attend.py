"""Attention that says the same in another way, where that is faster. Of a single query on CPU:

    scaled_dot_product_attention(q […, 1, e], k, v, mask)  →  softmax(sum(q·k) + mask), sum(weights·v)

which Inductor fuses with what is around it. What PyTorch calls instead is made for many queries: in bfloat16 it takes 4
times as long (9 heads, a cache of 256). Over all layers that is as much as the masked products save.

Of a prompt on CUDA, where queries share keys and values that the graph repeats for each of them:

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)  →  …(q, k, v, mask, enable_gqa=True)

so that the copies are never written: a kernel less in each layer.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.backends import cuda

from rana_compile.kernels.ops import DTYPES, MOST_DECODED


def lower_single_queries(gm: fx.GraphModule) -> int:
    """Replace them in place, in a graph without gradients. Returns how many; recompiles if there is one."""
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is SDPA and _is_single(node)]
    for node in found:
        node.target = single_query_attention
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
    query, key, value = (named[name].meta["example_value"] for name in _NAMES[:3])
    if named.get("dropout_p") or named.get("is_causal") or torch.is_autocast_enabled("cpu"):
        return False
    dtypes = {key.dtype, value.dtype, node.meta["example_value"].dtype}  # autocast inside the graph changes the last
    known = query.device.type == "cpu" and query.dtype in DTYPES and dtypes == {query.dtype}
    return known and query.dim() >= 3 and isinstance(query.shape[-2], int) and query.shape[-2] == 1


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
    weights: Any = torch.ops.aten._safe_softmax(scores, -1)  # zeros where a mask leaves nothing
    return (weights[..., None] * value.float()).sum(-2, keepdim=True).to(query.dtype)


def share_repeated_heads(gm: fx.GraphModule) -> int:
    """Repeated keys and values → grouped queries, in place, in a graph without gradients. Returns how many calls.

    Only where the kernels that take the repeated ones take grouped ones too; recompiles if there is a call.
    """
    found = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not SDPA:
            continue
        given = arguments(node)
        key, value = (_unrepeated(given[name]) for name in ("key", "value"))
        if key is not None and value is not None and not given.get("enable_gqa") and _is_grouped(given, key, value):
            node.args, node.kwargs = (), given | {"key": key, "value": value, "enable_gqa": True}
            found += 1
    if found:  # what repeated them stays for the compiler to remove
        gm.recompile()
    return found


def _unrepeated(node: Any) -> fx.Node | None:
    """k [b, heads, n, e] of ``k[:, :, None].expand(b, heads, times, n, e).reshape(b, heads * times, n, e)``."""
    if not _is_method(node, "reshape") or not _is_method(node.args[0], "expand"):
        return None
    one = node.args[0].args[0]  # [b, heads, 1, n, e]
    if not _is_new_axis(one):
        return None
    base: fx.Node = one.args[0]
    shapes = [n.meta["example_value"].shape for n in (base, one, node.args[0], node)]
    if [len(shape) for shape in shapes] != [4, 5, 5, 4]:
        return None
    (b, heads, n, e), _, (wide_b, wide_heads, times, wide_n, wide_e), (last_b, last_heads, last_n, last_e) = shapes
    if not (isinstance(heads, int) and isinstance(times, int) and (wide_heads, last_heads) == (heads, heads * times)):
        return None
    others = (b, wide_b, last_b), (n, wide_n, last_n), (e, wide_e, last_e)
    kept = all(len({size if isinstance(size, int) else None for size in sizes}) == 1 for sizes in others)
    return base if kept else None  # a symbolic size is none that is expanded


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


def _is_grouped(given: dict[str, Any], key: fx.Node, value: fx.Node) -> bool:
    """Whether it is a prompt whose query heads share these keys and values evenly, and fast kernels take them so."""
    nodes = [given["query"], key, value, given.get("attn_mask")]
    tensors = [n.meta["example_value"] for n in nodes if isinstance(n, fx.Node)]
    query, heads = tensors[0], tensors[1].shape[1]
    few = isinstance(query.shape[-2], int) and query.shape[-2] <= MOST_DECODED
    if few or query.dim() != 4 or not isinstance(query.shape[1], int):
        return False
    even = tensors[2].shape[1] == heads and query.shape[1] % heads == 0
    return even and _takes_groups(tensors, bool(given.get("is_causal")), given.get("dropout_p") or 0.0)


def _takes_groups(tensors: list[Tensor], causal: bool, dropout: float) -> bool:
    """Whether each fast kernel for query, repeated key and value (and mask) takes grouped ones, and there is one."""
    half = {t.dtype for t in tensors[:3]} in ({torch.bfloat16}, {torch.float16})
    if tensors[0].device.type != "cuda" or not half or torch.is_autocast_enabled("cuda"):
        return False

    def usable(repeats: int) -> list[bool]:
        heads = (1, repeats, repeats)
        sizes = [(t.shape[1] * n, 64, t.shape[3]) for t, n in zip(tensors[:3], heads, strict=True)] + [(1, 64, 64)]
        small: list[Any] = [
            torch.empty(1, *size, dtype=t.dtype, device=t.device) for t, size in zip(tensors, sizes, strict=False)
        ]
        q, k, v, mask = (*small, None)[:4]
        parameters = cuda.SDPAParams(q, k, v, mask, dropout, causal, repeats == 1)
        return [cuda.can_use_cudnn_attention(parameters), cuda.can_use_flash_attention(parameters)]

    with unset_fake_temporarily():
        plain, grouped = usable(tensors[0].shape[1] // tensors[1].shape[1]), usable(1)
    return any(plain) and all(g >= p for g, p in zip(grouped, plain, strict=True))
