"""Run a graph again on recorded inputs, to calibrate inside the backend, where there is a graph but no module.

What differs from running it as it is: gradients are recorded although the graph was traced without; where only the last
rows of a sequence reach the head (``generate`` asks for no more), all rows do; the one output that stands for the
model's result is returned.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from rana_compile.passes.interpret import Handler, SiteInterpreter
from rana_compile.passes.match import Match, digraph_of
from rana_compile.passes.pointwise import is_active_dropout, is_pointwise, region_to
from rana_compile.passes.products import products

_MODES = {torch._C._set_grad_enabled, torch.autograd.grad_mode._enter_inference_mode}


@dataclass(frozen=True)
class Output:
    """The model's result on one call, named as transformers does; ``logits`` only where a linear gave it."""

    last_hidden_state: Tensor
    logits: Tensor | None


class Replay:
    """A graph prepared for replaying.

    Attributes:
        matches: the sites in this graph.
        is_random: whether dropout is active in it, so that no two runs agree.
    """

    def __init__(self, gm: fx.GraphModule, matches: Sequence[Match]) -> None:
        self.matches = tuple(matches)
        self.is_random = any(is_active_dropout(node) for node in gm.graph.nodes)
        self._gm = gm
        self._widened = _narrowings(gm.graph)
        self._main = _main_output(gm.graph, matches)
        self._is_logits = self._main is not None and _is_linear_output(gm.graph, self._main)

    @property
    def has_output(self) -> bool:
        return self._main is not None

    def rows(self, args: Sequence[Any]) -> int:
        """Most rows (batch · sequence) that a site of this graph sees on these inputs."""
        nodes = [n for n in self._gm.graph.nodes if n.op == "placeholder"]
        pairs = zip((n.meta.get("example_value") for n in nodes), args, strict=True)
        symbols = {value.node.expr: arg for value, arg in pairs if isinstance(value, torch.SymInt)}
        return max((_rows(match, symbols) for match in self.matches), default=0)

    def run(self, args: Sequence[Any], handler: Handler) -> Output:
        """The result on these inputs, which in-place operations change, with every site in the handler's hands."""
        assert self._main is not None
        value = _Interpreter(self._gm, self.matches, handler, self._widened, self._main).run(*args)
        return Output(value, value if self._is_logits else None)


class _Interpreter(SiteInterpreter):
    def __init__(
        self, gm: fx.GraphModule, matches: Sequence[Match], handler: Handler, widened: set[fx.Node], main: fx.Node
    ) -> None:
        super().__init__(gm, matches, handler)
        self._widened, self._main = widened, main

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return self.env[self._main]
        if n.target in _MODES:
            return None
        if n in self._widened:
            return self.env[n.all_input_nodes[0]]
        return super().run_node(n)


def _rows(match: Match, symbols: dict[Any, int]) -> int:
    rows = 1
    for size in match.x.meta["example_value"].shape[:-1]:
        rows *= int(size.node.expr.subs(symbols)) if isinstance(size, torch.SymInt) else size
    return rows


def _narrowings(graph: fx.Graph) -> set[fx.Node]:
    """``hidden[:, -1:, :]`` and the like, where nothing but linears and elementwise operations follows."""
    linears = {p.node for p in products(graph)}
    return {node for node in graph.nodes if _is_narrowing(node) and _leads_only_to_output(node, linears)}


def _is_narrowing(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in node.args[1]) or not node.users:
        return False
    before, after = (n.meta.get("example_value") for n in (node.args[0], node))  # type: ignore[union-attr]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not before.is_floating_point():
        return False
    widths = (before.shape[-1], after.shape[-1])
    rows_only = all(isinstance(n, int) for n in widths) and widths[0] == widths[1]
    return rows_only and before.dim() == after.dim() > 1 and node.args[1][2:] in ((), (slice(None),))


def _leads_only_to_output(node: fx.Node, linears: set[fx.Node]) -> bool:
    todo, seen, through = [node], {node}, False
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or user in seen:
                continue
            if user not in linears and not is_pointwise(user):
                return False
            through = through or user in linears
            seen.add(user)
            todo.append(user)
    return through


def _main_output(graph: fx.Graph, matches: Sequence[Match]) -> fx.Node | None:
    """The floating-point output behind (almost) all sites; of several (a hidden state, its pooled row) the largest."""
    last = next(node for node in graph.nodes if node.op == "output")
    digraph = digraph_of(graph)
    linears = {lin.node for match in matches for lin in match.linears}
    depth: dict[fx.Node, int] = {}
    for node in last.all_input_nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.is_floating_point() and node.op != "placeholder":
            depth[node] = len(linears & (nx.ancestors(digraph, node) | {node}))
    deepest = max(depth.values(), default=0)
    if not deepest:
        return None
    return max((n for n in depth if depth[n] >= deepest - 1), key=_size)


def _size(node: fx.Node) -> int:
    count = node.meta["example_value"].numel()
    return count.node.hint if isinstance(count, torch.SymInt) else count


def _is_linear_output(graph: fx.Graph, node: fx.Node) -> bool:
    linears = {p.node for p in products(graph)}
    if node in linears:
        return True
    _, starts = region_to(node, linears)
    return len(starts) == 1 and starts <= linears
