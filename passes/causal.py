"""Attention masks that are constant and causal → ``is_causal``, which says the same in one bit:

    scaled_dot_product_attention(q, k, v, arange(n) <= arange(n)[:, None])  →  …(q, k, v, is_causal=True)

Traced, transformers writes the mask out. Attention that knows what it looks like may skip the other half, and reads
no mask.
"""

import logging
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from rana_compile.passes.attend import SDPA, arguments, is_written_to
from rana_compile.passes.match import digraph_of

log = logging.getLogger(__name__)

MOST = 1 << 26  # elements of a mask that is looked at


def lower_causal_masks(gm: fx.GraphModule) -> int:
    """Replace them in place. Returns how many calls do without; recompiles if there is one."""
    calls = [(node, arguments(node)) for node in gm.graph.nodes if node.op == "call_function" and node.target is SDPA]
    masks = dict.fromkeys(given["attn_mask"] for _, given in calls if _is_square(given))
    causal = {mask for mask in masks if _is_causal(gm, mask)}
    changed = [(node, given) for node, given in calls if given.get("attn_mask") in causal and _is_square(given)]
    for node, given in changed:
        node.args, node.kwargs = (), given | {"attn_mask": None, "is_causal": True}
    if changed:  # what made the mask stays for the compiler to remove, which knows what writes in place
        gm.recompile()
    return len(changed)


def _is_square(given: dict[str, Any]) -> bool:
    """Whether there is a mask [..., n, n] of known size, for as many queries as keys, and no larger than theirs."""
    if not isinstance(given.get("attn_mask"), fx.Node) or given.get("is_causal"):
        return False
    mask, query, key = (given[name].meta["example_value"] for name in ("attn_mask", "query", "key"))
    sizes = [*mask.shape, query.shape[-2], key.shape[-2]]
    if not all(isinstance(n, int) for n in sizes) or len({*sizes[-4:]}) > 1 or mask.numel() > MOST:
        return False
    pairs = zip(mask.shape[-3::-1], query.shape[-3::-1], strict=False)
    return mask.dim() <= query.dim() and all(n == 1 or (isinstance(m, int) and n == m) for n, m in pairs)


def _is_causal(gm: fx.GraphModule, mask: fx.Node) -> bool:
    value = _constant(gm, mask)
    if value is None:
        return False
    allowed = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    if value.dtype != torch.bool:
        forbidden = value <= torch.finfo(value.dtype).min
        value = torch.where(forbidden | (value == 0), ~forbidden, ~allowed)  # other numbers are no mask
    return bool((value == allowed).all())


class _Deterministic(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def _constant(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The node's value if it follows from no input, and nothing writes to it or what it is made of."""
    needed = nx.ancestors(digraph_of(gm.graph), node) | {node}
    if any(n.op not in ("call_function", "call_method") for n in needed) or is_written_to(gm.graph, needed):
        return None
    interpreter = fx.Interpreter(gm)
    try:
        with unset_fake_temporarily(), torch.no_grad(), _Deterministic():
            for n in gm.graph.nodes:
                if n in needed:
                    interpreter.env[n] = interpreter.run_node(n)
    except Exception as error:  # outside of the modes, as vmap's, that parts of a graph run in
        log.debug("the attention mask %s stays as it is: %s", node.name, error)
        return None
    return interpreter.env[node]
