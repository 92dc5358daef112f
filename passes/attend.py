"""Attention of a single query on CPU → products and sums, which Inductor fuses with what is around them:

    scaled_dot_product_attention(q […, 1, e], k, v, mask)  →  softmax(sum(q·k) + mask), sum(weights·v)

What PyTorch calls instead is made for many queries: in bfloat16 it takes 4 times as long (9 heads, a cache of 256).
Over all layers that is as much as the masked products save.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rana_compile.kernels.ops import DTYPES


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
