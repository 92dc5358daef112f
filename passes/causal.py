"""Attention masks that are constant and causal → ``is_causal``, which says the same in one bit:

    scaled_dot_product_attention(q, k, v, arange(n) <= arange(n)[:, None])  →  …(q, k, v, is_causal=True)

Traced, transformers writes the mask out. Attention that knows what it looks like may skip the other half, and reads
no mask. Where sizes are symbolic, masks of plain comparisons of positions are recognised.
"""

import logging
import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

from rana_compile.passes.attend import SDPA, arguments
from rana_compile.passes.match import digraph_of, is_written, shape, written_memory

log = logging.getLogger(__name__)

MOST = 1 << 26  # elements of a mask that is looked at
COMPARISONS = {operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne}
AS_METHODS = {f"__{compare.__name__}__" for compare in COMPARISONS}  # torch 2.11 traces some so
WHOLE = {torch.bool, torch.int32, torch.int64}


def lower_causal_masks(gm: fx.GraphModule) -> int:
    """Replace them in place. Returns how many calls do without; recompiles if there is one."""
    calls = [(node, arguments(node)) for node in gm.graph.nodes if node.op == "call_function" and node.target is SDPA]
    masks = dict.fromkeys(given["attn_mask"] for _, given in calls if _is_square(given))
    if not masks:
        return 0
    flow, written = digraph_of(gm.graph), written_memory(gm.graph)
    causal = {mask for mask in masks if _is_causal(gm, mask, nx.ancestors(flow, mask) | {mask}, written)}
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


def _is_causal(gm: fx.GraphModule, mask: fx.Node, needed: set[fx.Node], written: set[int] | None) -> bool:
    """Whether it is [..., n, n], true up to the diagonal, for any sizes that it may have."""
    nodes = [node for node in gm.graph.nodes if node in needed]
    inputs = [node for node in nodes if node.op == "placeholder"]
    sizes = _sizes(nodes, inputs) if inputs else {}
    if sizes is None or not _is_small(nodes, max(sizes.values(), default=0)) or is_written(nodes, written):
        return False
    try:
        with unset_fake_temporarily(), torch.no_grad(), _Deterministic():
            return _is_lower(_value(gm, nodes, sizes))
    except Exception as error:  # outside of the modes, as vmap's, that parts of a graph run in
        log.debug("the attention mask %s stays as it is: %s", mask.name, error)
        return False


def _is_small(nodes: Sequence[fx.Node], size: int) -> bool:
    """Whether nothing exceeds ``MOST`` elements, with this for symbolic sizes."""
    shapes = [shape(node) for node in nodes if _dtype_of(node)]
    known = [[size + 1 if size and not isinstance(n, int) else n for n in sizes] for sizes in shapes]
    return all(statically_known_true(math.prod(sizes) <= MOST) for sizes in known)


def _is_lower(value: Tensor) -> bool:
    allowed = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    if value.dtype != torch.bool:
        forbidden = value <= torch.finfo(value.dtype).min
        value = torch.where(forbidden | (value == 0), ~forbidden, ~allowed)  # other numbers are no mask
    return bool((value == allowed).all())


def _sizes(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> dict[fx.Node, int] | None:
    """Symbolic sizes with which a mask shows what it is with any; None if none would tell, or it follows from an input.

    Its elements may not depend on sizes, so that smaller masks are parts of larger ones. They may depend on positions
    that numbers of the graph are added to, on counts of what holds up to a position, on differences and comparisons of
    such: but for the first, these grow by 0 or 1 from one position to the next, and how they compare changes no more
    once they are farther apart than all numbers of the graph together. Counts are looked up once, which doubles that.
    """
    if not all(isinstance(node.meta.get("example_value"), torch.SymInt) for node in inputs):
        return None
    plain, numbers = _Plain(), float(len(nodes))
    for node in nodes:
        if node in inputs:
            continue
        if not plain.takes(node):
            return None
        if node.target not in ("expand", "new_ones"):
            numbers += _numbers_in((node.args, node.kwargs))
    return {node: 4 * math.ceil(numbers) + i for i, node in enumerate(inputs)} if numbers < MOST else None


class _Plain:
    """Tells whether operations, in their order, are among those of ``_sizes``."""

    def __init__(self) -> None:
        self._positions: dict[fx.Node, set[fx.Node]] = {}  # of each node, the ranges that it depends on
        self._looked_up: set[fx.Node] = set()  # what depends on a lookup

    def takes(self, node: fx.Node) -> bool:
        target, args, inputs = node.target, node.args, node.all_input_nodes
        named = {key for key in node.kwargs if key not in ("device", "dtype")}
        self._positions[node] = set().union(*(self._positions.get(n, ()) for n in inputs))
        if not self._looked_up.isdisjoint(inputs):
            self._looked_up.add(node)
        if _dtype_of(node) not in WHOLE:
            return False
        if target is torch.arange:
            self._positions[node] = {node}
            return len(args) == 1 and not named
        if target in ("expand", "new_ones"):
            return not named
        if None in map(_dtype_of, inputs):  # a size
            return False
        if target is operator.getitem:
            return self._is_index(node, args[1] if isinstance(args[1], tuple) else (args[1],))
        if target in (torch.cumsum, "cumsum"):
            return named <= {"dim"} and _dtype_of(inputs[0]) == torch.bool and len(self._positions[node]) <= 1
        return _is_local(node, named)

    def _is_index(self, node: fx.Node, index: Sequence[Any]) -> bool:
        """Whether it counts from the start, or looks up what depends on no other lookup."""
        tables = [_dtype_of(i) for i in index if isinstance(i, fx.Node)]
        if tables and (node in self._looked_up or torch.bool in tables):
            return False
        self._looked_up.update([node] if tables else [])
        ends = [end for i in index if isinstance(i, slice) for end in (i.start, i.stop, i.step and -1)]
        counted = [i for i in (*index, *ends) if i is not None and not isinstance(i, fx.Node | slice)]
        return all(isinstance(i, int) and i >= 0 for i in counted)


def _is_local(node: fx.Node, named: set[str]) -> bool:
    """Whether each element follows from one of each input, or from neighbours."""
    target, inputs = node.target, node.all_input_nodes
    if target is torch.diff:
        before = node.kwargs.get("prepend")
        one = before is None or (isinstance(before, fx.Node) and statically_known_true(shape(before)[-1] == 1))
        last = node.kwargs.get("dim", -1) == -1
        return len(node.args) == 1 and named <= {"prepend", "dim"} and bool(last) and one
    if target in (operator.add, operator.sub):
        return len(inputs) == 1 and isinstance(node.args[1], int)
    if target in (operator.and_, operator.or_):  # of whole numbers, bit by bit
        return {_dtype_of(n) for n in inputs} == {torch.bool}
    return target in COMPARISONS or target in AS_METHODS or target in ("unsqueeze", "to")


def _dtype_of(node: Any) -> torch.dtype | None:
    """None of what is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _numbers_in(arguments: Any) -> float:
    """What the numbers in there add up to, without their signs."""
    total = 0.0

    def add(value: Any) -> Any:
        nonlocal total
        if isinstance(value, int | float) and not isinstance(value, bool):
            total += abs(value)
        return value

    fx.node.map_aggregate(arguments, add)
    return total


class _Deterministic(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


class _Lookups(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype != torch.bool and (i < 0).any() for i in index):
                raise ValueError("what is looked up counts from the end, which depends on the size")
        return super().call_function(target, args, kwargs)


def _value(gm: fx.GraphModule, nodes: Sequence[fx.Node], sizes: dict[fx.Node, int]) -> Tensor:
    """The last node's value with these sizes. Raises ValueError if it follows from something else."""
    interpreter = _Lookups(gm) if sizes else fx.Interpreter(gm)
    interpreter.env.update(sizes)
    for node in nodes:
        if node in sizes:
            continue
        if node.op not in ("call_function", "call_method"):
            raise ValueError(f"{node.name} is no operation")
        interpreter.env[node] = interpreter.run_node(node)
    return interpreter.env[nodes[-1]]
