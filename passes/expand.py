"""Fused attention of ``torch.nn`` → the linears inside it, so that they can be adapted:

    _transformer_encoder_layer_fwd(x, …)      →  layer_norm, linear, attention, linear, add, linear, act, linear, …
    multi_head_attention_forward(x, x, x, …)  →  linear, attention, linear

Only forms whose meaning is plain are expanded (self-attention with one weight for q, k and v); others stay fused and
are reported as such. Checkpointed bodies are put in place of their calls (``inline``). A graph without either is
returned as it is.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rana_compile.passes.inline import inline_checkpoints
from rana_compile.passes.rewrite import copy_dynamo_graph

_MHA_DEFAULTS = {
    "training": True,
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "use_separate_proj_weight": False,
    "static_k": None,
    "static_v": None,
    "average_attn_weights": True,
}
_MHA_NAMES = (
    *("query", "key", "value", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", *tuple(_MHA_DEFAULTS)[:5]),
    *("q_proj_weight", "k_proj_weight", "v_proj_weight", *tuple(_MHA_DEFAULTS)[5:], "is_causal"),
)


def expand(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, or where it holds fused attention or checkpoints a copy without; new nodes carry ``example_value``."""
    gm = inline_checkpoints(gm)
    fused = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _EXPANSIONS]
    fused = [node for node in fused if _EXPANSIONS[node.target][0](node)]
    if not fused:
        return gm
    copy, env = copy_dynamo_graph(gm)
    for node in fused:
        target = env[node]
        with copy.graph.inserting_before(target):
            result = _EXPANSIONS[node.target][1](Emitter(copy.graph, target), target)
        if isinstance(result, fx.Node):
            target.replace_all_uses_with(result)
        else:
            for user in list(target.users):  # all are getitem: _is_plain_attention asked for it
                if (chosen := result[user.args[1]]) is not None:
                    user.replace_all_uses_with(chosen)
                copy.graph.erase_node(user)
        copy.graph.erase_node(target)
    copy.graph.lint()
    copy.recompile()
    return copy


class Emitter:
    """Adds calls to a graph, each with the fake value that Dynamo would have given it."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        self._graph = graph
        self._meta = {k: v for k, v in origin.meta.items() if k != "example_value"}
        values = (n.meta.get("example_value") for n in (origin, *origin.all_input_nodes))
        self._mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))  # Dynamo's; AOTAutograd has its own

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self._graph.call_function(function, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self._mode, torch.no_grad():
            node.meta = self._meta | {"example_value": function(*values[0], **values[1])}
        return node


def _attention(
    emit: Emitter, projected: fx.Node, heads: int, batch_first: bool, mask: fx.Node | None, need_weights: bool
) -> tuple[fx.Node, fx.Node | None]:
    """([B, L, d] or [L, B, d], weights [B, heads, L, L] or None) of q, k and v side by side in ``projected``."""
    width = projected.meta["example_value"].shape[-1] // (3 * heads)
    parts = emit(torch.unflatten, projected, -1, (3, heads, width))
    ordered = emit(torch.permute, parts, (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4))  # [3, B, heads, L, width]
    q, k, v = (emit(torch.select, ordered, 0, i) for i in range(3))
    weights = None
    if need_weights:
        scores = emit(torch.mul, emit(torch.matmul, q, emit(torch.transpose, k, -2, -1)), width**-0.5)
        weights = emit(torch.softmax, scores if mask is None else emit(torch.add, scores, mask), -1)
        mixed = emit(torch.matmul, weights, v)
    else:
        mixed = emit(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
    back = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    return emit(torch.flatten, emit(torch.permute, mixed, back), 2), weights


def _bias_of(emit: Emitter, mask: fx.Node | None, like: fx.Node) -> fx.Node | None:
    """A mask (True or -inf: not attended) as numbers to add to the scores."""
    if mask is None or mask.meta["example_value"].is_floating_point():
        return mask
    zeros = emit(torch.zeros_like, mask, dtype=like.meta["example_value"].dtype)
    return emit(torch.masked_fill, zeros, mask, float("-inf"))


def _is_plain_attention(node: fx.Node) -> bool:
    a = _attention_arguments(node)
    x, mask = a["query"], a["attn_mask"]
    plain = a["key"] is x and a["value"] is x and x.meta["example_value"].dim() == 3
    extras = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask")
    without = all(a.get(k) is None for k in extras) and not a["add_zero_attn"] and not a["use_separate_proj_weight"]
    quiet = not (a["training"] and a["dropout_p"])
    flat = mask is None or mask.meta["example_value"].dim() == 2
    return plain and without and quiet and flat and all(user.target is operator.getitem for user in node.users)


def _attention_arguments(node: fx.Node) -> dict[str, Any]:
    return _MHA_DEFAULTS | dict(zip(_MHA_NAMES, node.args, strict=False)) | dict(node.kwargs)


def _expand_attention(emit: Emitter, node: fx.Node) -> Sequence[fx.Node | None]:
    a = _attention_arguments(node)
    projected = emit(F.linear, a["query"], a["in_proj_weight"], a["in_proj_bias"])
    mask = _bias_of(emit, a["attn_mask"], projected)
    mixed, weights = _attention(emit, projected, a["num_heads"], False, mask, a["need_weights"])
    if weights is not None and a["average_attn_weights"]:
        weights = emit(torch.mean, weights, 1)
    return emit(F.linear, mixed, a["out_proj_weight"], a["out_proj_bias"]), weights


def _is_plain_layer(node: fx.Node) -> bool:
    """With batch first and no padding mask: a nested or masked batch stays fused."""
    return not node.kwargs and node.args[0].meta["example_value"].dim() == 3 and node.args[18:20] in ((), (None, None))  # type: ignore[union-attr]


def _expand_layer(emit: Emitter, node: fx.Node) -> fx.Node:
    x, width, heads, w_in, b_in, w_out, b_out, use_gelu, norm_first, eps = node.args[:10]
    g1, c1, g2, c2, w1, b1, w2, b2 = node.args[10:18]

    def norm(value: fx.Node, gain: Any, shift: Any) -> fx.Node:
        return emit(F.layer_norm, value, (width,), gain, shift, eps)

    def attend(value: fx.Node) -> fx.Node:
        mixed, _ = _attention(emit, emit(F.linear, value, w_in, b_in), heads, True, None, False)  # type: ignore[arg-type]
        return emit(F.linear, mixed, w_out, b_out)

    def feed(value: fx.Node) -> fx.Node:
        hidden = emit(F.gelu if use_gelu else F.relu, emit(F.linear, value, w1, b1))
        return emit(F.linear, hidden, w2, b2)

    assert isinstance(x, fx.Node)
    if norm_first:
        x = emit(torch.add, x, attend(norm(x, g1, c1)))
        return emit(torch.add, x, feed(norm(x, g2, c2)))
    x = norm(emit(torch.add, x, attend(x)), g1, c1)
    return norm(emit(torch.add, x, feed(x)), g2, c2)


_EXPANSIONS: dict[Any, tuple[Callable[[fx.Node], bool], Callable[[Emitter, fx.Node], Any]]] = {
    torch._transformer_encoder_layer_fwd: (_is_plain_layer, _expand_layer),
    F.multi_head_attention_forward: (_is_plain_attention, _expand_attention),
}
