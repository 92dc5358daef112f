"""Values the patterns share: a linear node seen uniformly, a match, and the graph questions.

A ``Match`` holds live ``fx.Node``s and belongs to one graph; its ``Site`` is portable.
"""

import inspect
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx
from torch._ops import HigherOrderOperator

from rana_compile.types import Site, Skipped

_IN_PLACE = {
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift"),
    *("irshift", "iconcat", "setitem", "delitem"),
}


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Linear:
    """One node that computes y = x Wᵀ + b, W [d_out, d_in]; ``transposed``: the parameter holds Wᵀ."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    weight_name: str
    transposed: bool = False

    @property
    def d_out(self) -> int:
        return int(shape(self.weight)[1 if self.transposed else 0])

    @property
    def d_in(self) -> int:
        return int(shape(self.weight)[0 if self.transposed else 1])


@dataclass(frozen=True)
class Match:
    """A site in a graph: the linears (in the site's order) that an adapter replaces."""

    site: Site
    linears: tuple[Linear, ...]

    @property
    def x(self) -> fx.Node:
        return self.linears[0].x

    @property
    def rows(self) -> int | None:
        """Rows of the input if fixed at compile time (batch · sequence), else None."""
        rows = 1
        for size in shape(self.x)[:-1]:
            if not isinstance(size, int):
                return None
            rows *= size
        return rows


@dataclass(frozen=True)
class Block:
    """An MLP: its two sites and the elementwise region between them.

    Attributes:
        up, down: the sites; ``up`` is the stack of gate and up where the MLP is gated.
        inputs: the nodes the region starts from, (gate, up) or (up,).
        hidden: the node it ends in, the input of ``down``.
    """

    name: str
    up: Site
    down: Site
    inputs: tuple[fx.Node, ...]
    hidden: fx.Node
    region: frozenset[fx.Node]


@dataclass(frozen=True)
class Found:
    """What ``find_sites`` found in one graph."""

    matches: tuple[Match, ...]
    blocks: tuple[Block, ...]
    skipped: tuple[Skipped, ...]


@dataclass
class Search:
    """A graph being searched: its linears, which of them are claimed, what was given up and why."""

    graph: fx.Graph
    linears: Mapping[fx.Node, Linear]
    digraph: nx.DiGraph
    claimed: set[fx.Node] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)

    def free(self) -> Iterable[Linear]:
        """Linears not yet claimed, in graph order."""
        return [linear for node, linear in self.linears.items() if node not in self.claimed]

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))


def digraph_of(graph: fx.Graph) -> nx.DiGraph:
    """Data flow of a graph: an edge from each node to each of its users."""
    digraph = nx.DiGraph()
    digraph.add_nodes_from(graph.nodes)
    digraph.add_edges_from((node, user) for node in graph.nodes for user in node.users)
    return digraph


def escapes(nodes: set[fx.Node], outputs: set[fx.Node]) -> list[fx.Node]:
    """Nodes, other than the outputs, that someone outside uses: their values may not disappear."""
    return [n for n in nodes - outputs if any(user not in nodes for user in n.users)]


def is_convex(digraph: nx.DiGraph, nodes: set[fx.Node]) -> bool:
    """Whether no path leaves the set and comes back, so that the set can be replaced by one node."""
    leaving = {v for u in nodes for v in digraph.successors(u)} - nodes
    outside = digraph.subgraph(set(digraph) - nodes)
    reachable = set(leaving).union(*(nx.descendants(outside, v) for v in leaving)) if leaving else set()
    return not any(v in nodes for u in reachable for v in digraph.successors(u))


def op_name(node: fx.Node) -> str:
    """The name of the function or method a node calls, or an empty string."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def is_mutated(node: fx.Node) -> bool:
    """Whether a user changes the value in place, so that its readers may not be moved."""
    return any(map(is_in_place, node.users))


def is_in_place(node: fx.Node) -> bool:
    """Whether a node may write to what it is given (``add_``, ``iadd``, ``inplace=True``)."""
    name = op_name(node)
    keyword = getattr(operator, name, None) is node.target  # and_, not_
    named = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and not keyword)
    return named or "out" in node.kwargs or _asks_for_it(node) or _is_mutable(node.target)


def writes_to(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node may write to: of ``add_`` the first, of what says less about itself all."""
    if not is_in_place(node) and not isinstance(node.target, HigherOrderOperator):
        return []
    first: list[fx.Node] = []
    if op_name(node).endswith("_") or op_name(node) in _IN_PLACE:
        fx.node.map_arg((node.args[:1], node.kwargs.get("input")), first.append)
    return node.all_input_nodes if "out" in node.kwargs or not first else first


def written_memory(graph: fx.Graph) -> set[int] | None:
    """What the graph may write to, as ``memory_of`` has it; None where that is not known."""
    targets = [n for node in graph.nodes for n in writes_to(node) if n.op != "get_attr"]
    found = {memory_of(n) for n in targets if not isinstance(n.meta.get("example_value"), SYMBOLIC)}
    return None if None in found else {m for m in found if m is not None}


def is_written(nodes: Iterable[fx.Node], written: set[int] | None) -> bool:
    """Whether one of the nodes may be, where this is ``written_memory``."""
    tensors = [n for n in nodes if isinstance(n.meta.get("example_value"), torch.Tensor)]
    return written is None or any((memory := memory_of(n)) is None or memory in written for n in tensors)


def memory_of(node: fx.Node) -> int | None:
    """The same number for all views of one tensor; None where that is not known."""
    value = node.meta.get("example_value")
    try:
        return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
    except (NotImplementedError, RuntimeError):  # inside of vmap
        return None


def _asks_for_it(node: fx.Node) -> bool:
    if node.op != "call_function" or not any(a is True for a in (*node.args, *node.kwargs.values())):
        return False
    try:
        given = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin
        given = node.kwargs
    return bool(given.get("inplace"))


def _is_mutable(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_is_mutable(getattr(target, name)) for name in target.overloads())
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def shape(node: fx.Node) -> torch.Size:
    return node.meta["example_value"].shape
