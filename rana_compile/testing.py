"""For test suites: which sites a model has, what the compiler made of its graphs, how often it compiled.

    from rana_compile import testing

    testing.assert_sites(model, {"mlp.{gate,up}_proj": "gate_up", "mlp.down_proj": "down"}, x)
    testing.assert_rewrites(model, plan, ["rana_neuron", "rana_neuron"], x)
    with testing.count_compilations() as counts:
        model.generate(...)
    assert (counts.graphs, counts.breaks) == (2, 0)

Graphs are compared as text, one call a line, parameters under their own names, so that a failing test shows a diff.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rana_compile.backend import adapt_graph
from rana_compile.config import BackendOptions
from rana_compile.passes.expand import expand
from rana_compile.passes.find import find_sites
from rana_compile.passes.match import op_name
from rana_compile.passes.names import module_name, source_name
from rana_compile.plan import Plan

_Graphs = list[tuple[fx.GraphModule, list[Any]]]


@dataclass
class Compilations:
    """What Dynamo did inside ``count_compilations``: graphs it handed to backends, and graph breaks."""

    graphs: int = 0
    breaks: int = 0


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Yields counts that are complete when the block ends."""
    from torch._dynamo.utils import counters

    def now() -> tuple[int, int]:
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    counts, before = Compilations(), now()
    try:
        yield counts
    finally:
        after = now()
        counts.graphs, counts.breaks = after[0] - before[0], after[1] - before[1]


def graphs_of(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[fx.GraphModule]:
    """The graphs that one call of a model gives to a backend, without gradients; nothing is compiled."""
    return [gm for gm, _ in _graphs(model, args, kwargs)]


def _graphs(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Graphs:
    seen: _Graphs = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append((expand(gm), list(example_inputs)))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=keep)(*args, **kwargs)
    return seen


def graph_text(graph: fx.Graph, module: str = "") -> list[str]:
    """One line per call: results numbered, parameters under their own names, getitem as an index.

    With a module's dotted name only the calls inside of it.
    """
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    inside = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = source_name(node) or str(node.target).removeprefix("L_").rstrip("_").lower()
            continue
        args = ", ".join(_shown(a, names) for a in (*node.args, *node.kwargs.values()))
        names[node] = f"%{len(lines)}"
        lines.append(f"{names[node]} = {op_name(node) or node.op}({args})")
        inside.append(_is_inside(node, module))
    return [line for line, shown in zip(lines, inside, strict=True) if shown]


def _is_inside(node: fx.Node, module: str) -> bool:
    """Whether the node, or, where a pass put it in, what it is for, belongs to the module."""
    name = module_name(node)
    if not module or name is not None:
        return not module or f"{name}.".startswith(f"{module}.")
    return any(_is_inside(user, module) for user in node.users)


def _shown(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_shown(v, names) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v, names)}" for k, v in value.items()) + "}"
    return str(value)


def assert_graph(graph: fx.Graph, golden: str | Sequence[str]) -> None:
    """Raises AssertionError with a diff unless ``graph_text`` of the graph is the golden text."""
    expected = golden.strip().split("\n") if isinstance(golden, str) else list(golden)
    found = graph_text(graph)
    if found != expected:
        raise AssertionError("\n".join(difflib.unified_diff(expected, found, "expected", "found", lineterm="")))


def assert_sites(model: Callable[..., Any], expected: Mapping[str, str], *args: Any, **kwargs: Any) -> None:
    """Raises AssertionError unless one call of the model shows exactly these sites, {name: kind}, over all graphs."""
    found = {m.site.name: m.site.kind for gm in graphs_of(model, *args, **kwargs) for m in find_sites(gm).matches}
    if found != dict(expected):
        missing = sorted(set(expected.items()) - set(found.items()))
        other = sorted(set(found.items()) - set(expected.items()))
        raise AssertionError(f"expected but not found: {missing}; found but not expected: {other}")


def rewritten_graphs(
    model: torch.nn.Module, plan: Plan, *args: Any, prefill: str = "adapted", **kwargs: Any
) -> list[fx.GraphModule]:
    """The graphs of one call, without gradients, with the plan's adapters in them; nothing is compiled."""
    options = BackendOptions.parse({"plan": plan, "prefill": prefill})
    with torch.no_grad():
        return [adapt_graph(gm, inputs, plan, options)[0] for gm, inputs in _graphs(model, args, kwargs)]


def assert_rewrites(
    model: torch.nn.Module, plan: Plan, expected: Sequence[str], *args: Any, prefill: str = "adapted", **kwargs: Any
) -> None:
    """Raises AssertionError unless the plan puts exactly these adapters into one call's graphs, in order.

    Args:
        expected: names of the calls that were put in: ``rana_neuron``, ``rana_rank_decode``, ``rana_gated_mlp_decode``.
    """
    graphs = rewritten_graphs(model, plan, *args, prefill=prefill, **kwargs)
    names = [op_name(node) for gm in graphs for node in gm.graph.nodes if op_name(node).startswith("rana_")]
    if names != list(expected):
        raise AssertionError("\n".join(difflib.unified_diff(list(expected), names, "expected", "found", lineterm="")))
