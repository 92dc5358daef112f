"""Attention masks that are constant and causal → ``is_causal``, which says the same in one bit:

    scaled_dot_product_attention(q, k, v, arange(n) <= arange(n)[:, None])  →  …(q, k, v, is_causal=True)

Traced, transformers writes the mask out. Attention that knows what it looks like may skip the other half, and reads
no mask. Where sizes are symbolic, masks of plain comparisons of positions are recognised.
"""

import logging
import math
import operator
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

from rana_compile.passes.attend import SDPA, arguments, is_written_to
from rana_compile.passes.match import digraph_of

log = logging.getLogger(__name__)

MOST = 1 << 26  # elements of a mask that is looked at
FUNCTIONS = {
    *(torch.arange, torch.diff, torch.cumsum, operator.getitem, operator.add, operator.sub),
    *(operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne, operator.and_, operator.or_),
}
METHODS = {"unsqueeze", "expand", "cumsum", "new_ones", "to"}
WHOLE = {torch.bool, torch.int32, torch.int64}


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
    """Whether there is a mask [..., n, n], for as many queries as keys, and no larger than theirs."""
    if not isinstance(given.get("attn_mask"), fx.Node) or given.get("is_causal"):
        return False
    mask, query, key = (given[name].meta["example_value"] for name in ("attn_mask", "query", "key"))
    sizes = [*mask.shape[-2:], query.shape[-2], key.shape[-2]]
    pairs = [*pairwise(sizes), *zip(mask.shape[-3::-1], query.shape[-3::-1], strict=False)]
    same = [statically_known_true(n == m) for n, m in pairs]
    one = [isinstance(n, int) and n == 1 for n, _ in pairs]
    return 2 <= mask.dim() <= query.dim() and all(same[:3]) and all(map(operator.or_, same[3:], one[3:]))


def _is_causal(gm: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether it is [..., n, n], true up to the diagonal, for any sizes that it may have."""
    needed = nx.ancestors(digraph_of(gm.graph), mask) | {mask}
    if is_written_to(gm.graph, needed):
        return False
    cases = _cases(mask, [node for node in gm.graph.nodes if node in needed])
    return bool(cases) and all(_is_lower(_value(gm, mask, needed, sizes)) for sizes in cases)


def _is_lower(value: Tensor | None) -> bool:
    if value is None:
        return False
    allowed = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    if value.dtype != torch.bool:
        forbidden = value <= torch.finfo(value.dtype).min
        value = torch.where(forbidden | (value == 0), ~forbidden, ~allowed)  # other numbers are no mask
    return bool((value == allowed).all())


def _cases(mask: fx.Node, needed: Sequence[fx.Node]) -> list[dict[fx.Node, int]]:
    """The symbolic sizes that a mask is to be looked at with; none if that would not tell, or it follows from an input.

    Of sizes and positions it may do no more than add, count and compare. What comes of that changes where positions
    differ by the numbers in the graph, so that sizes well beyond these show all that there is.
    """
    sizes = [node for node in needed if node.op == "placeholder"]
    if not sizes:
        return [{}] if mask.meta["example_value"].numel() <= MOST else []
    if not all(isinstance(node.meta.get("example_value"), torch.SymInt) for node in sizes):
        return []
    if not all(node in sizes or _is_plain(node) for node in needed):
        return []
    most = 4 * (_numbers_in(needed) + 4)
    if (most + 1) ** (len(sizes) + 1) > MOST:
        return []
    return [dict(zip(sizes, each, strict=True)) for each in product((2, most, most + 1), repeat=len(sizes))]


def _is_plain(node: fx.Node) -> bool:
    known = FUNCTIONS if node.op == "call_function" else METHODS if node.op == "call_method" else set()
    value = node.meta.get("example_value")
    return node.target in known and isinstance(value, Tensor) and value.dtype in WHOLE


def _numbers_in(nodes: Sequence[fx.Node]) -> int:
    """The sum of the absolute values of all numbers that the graph holds there, at most ``MOST``."""
    total = 0.0

    def add(value: Any) -> Any:
        nonlocal total
        if isinstance(value, int | float) and not isinstance(value, bool):
            total += abs(value)
        return value

    for node in nodes:
        fx.node.map_aggregate((node.args, node.kwargs), add)
    return math.ceil(total) if total < MOST else MOST


class _Deterministic(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def _value(gm: fx.GraphModule, node: fx.Node, needed: set[fx.Node], sizes: dict[fx.Node, int]) -> Tensor | None:
    """The node's value with these sizes, if it follows from nothing else."""
    if any(n.op not in ("call_function", "call_method") for n in needed - sizes.keys()):
        return None
    interpreter = fx.Interpreter(gm)
    interpreter.env.update(sizes)
    try:
        with unset_fake_temporarily(), torch.no_grad(), _Deterministic():
            for n in gm.graph.nodes:
                if n in needed and n not in sizes:
                    interpreter.env[n] = interpreter.run_node(n)
    except Exception as error:  # outside of the modes, as vmap's, that parts of a graph run in
        log.debug("the attention mask %s stays as it is: %s", node.name, error)
        return None
    return interpreter.env[node]
