"""Find the sites of a Dynamo graph: ``GraphModule → Found``. The graph is only read.

Patterns run in the order of ``PATTERNS``, larger ones first; each claims the linears it explains. To
add a pattern: one file in this folder and one line here.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rana_compile.passes.linear import find_linears
from rana_compile.passes.match import Block, Found, Linear, Match, Search, digraph_of
from rana_compile.passes.mlp import find_mlps
from rana_compile.passes.names import module_name, source_name, used_name
from rana_compile.passes.pointwise import readers
from rana_compile.passes.products import products
from rana_compile.passes.shared_input import find_shared_inputs
from rana_compile.passes.sites import make_match
from rana_compile.types import Site, SiteKind

PATTERNS = (find_mlps, find_shared_inputs, find_linears)


def find_sites(
    gm: fx.GraphModule,
    eligible: Callable[[str], str | None] = lambda name: None,
    separate_gates: bool = False,
    min_features: int = 0,
) -> Found:
    """All sites of a torch-level graph as Dynamo hands it to a backend, in graph order.

    Args:
        gm: the graph; every node that holds a tensor carries ``meta["example_value"]``.
        eligible: given a weight's name, the reason to leave that linear alone, or None.
        separate_gates: gate and up as sites of their own, as the paper adapts them, not as one stack.
        min_features: a linear with fewer inputs or outputs is left alone.

    Linears whose weight is not a parameter of the compiled module are reported as skipped.
    """
    search = Search(gm.graph, {}, digraph_of(gm.graph))
    search.linears = _linears(search, eligible, min_features)
    matches: list[Match] = []
    blocks: list[Block] = []
    for pattern in PATTERNS:
        for found in pattern(search):
            up_down_block = found if isinstance(found, tuple) else (found,)
            matches.extend(m for m in up_down_block if isinstance(m, Match))
            blocks.extend(b for b in up_down_block if isinstance(b, Block))
    if separate_gates:
        matches = [part for match in matches for part in _separated(match)]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    matches.sort(key=lambda m: order[m.linears[0].node])
    _report_other_weights(search)
    return Found(tuple(matches), tuple(blocks), tuple(search.skipped))


def _separated(match: Match) -> list[Match]:
    if match.site.kind != "gate_up":
        return [match]
    kinds: tuple[SiteKind, SiteKind] = ("gate", "up")
    return [make_match((lin,), kind, match.site.block) for lin, kind in zip(match.linears, kinds, strict=True)]


def _linears(search: Search, eligible: Callable[[str], str | None], min_features: int = 0) -> dict[fx.Node, Linear]:
    linears = {}
    for p in products(search.graph):
        if reason := _unusable(p.weight, p.bias):
            search.skip(used_name(p.node, p.weight) or module_name(p.node) or p.node.name, reason)
            continue
        name = used_name(p.node, p.weight)
        assert name is not None  # _unusable asked for a module's parameter
        if reason := eligible(name):
            search.skip(name, reason)
            continue
        linear = Linear(p.node, p.x, p.weight, p.bias, name, p.transposed)
        if min(linear.d_in, linear.d_out) < min_features:
            search.skip(name, f"maps {linear.d_in} to {linear.d_out} features, fewer than min_features={min_features}")
            continue
        linears[p.node] = linear
    return linears


def _report_other_weights(search: Search) -> None:
    """Weights that something other than a linear multiplies with: convolutions, grouped experts."""
    used = {p.weight for p in products(search.graph)}
    for node in search.graph.find_nodes(op="placeholder"):
        value, name = node.meta.get("example_value"), source_name(node)
        if not isinstance(value, torch.nn.Parameter) or value.dim() < 2 or node in used or name is None:
            continue
        if found := readers(node):
            search.skip(name, f"read by {', '.join(sorted(found))}; only linears are adapted")


def _unusable(weight: fx.Node, bias: fx.Node | None) -> str | None:
    if weight.op != "placeholder" or source_name(weight) is None:
        return "its weight is computed in the graph, not a parameter of the module"
    if bias is not None and bias.op != "placeholder":
        return "its bias is computed in the graph, not a parameter of the module"
    value = weight.meta["example_value"]
    if is_traceable_wrapper_subclass(value):
        return f"its weight is a {type(value).__name__}; only plain tensors are adapted, no quantised ones"
    if value.dim() != 2:
        return f"its weight has {value.dim()} dimensions, expected 2"
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return f"its weight is {value.dtype}; only floating-point weights of 16 bits or more are adapted"
    return None


def bind_sites(gm: fx.GraphModule, sites: Sequence[Site]) -> list[Match]:
    """The given sites in this graph, found by the names of their weights, in graph order.

    A compiled part of a model sees names relative to itself, so a name also matches as the end of a site's. A site
    whose linears are not all here, or do not share their input, is absent from the result.
    """
    search = Search(gm.graph, {}, digraph_of(gm.graph))
    by_name: dict[str, list[Linear]] = defaultdict(list)
    for linear in _linears(search, lambda name: None).values():
        by_name[linear.weight_name].append(linear)
    matches = []
    for site in sites:
        columns = [_named(by_name, name) for name in site.weights]
        for uses in zip(*columns, strict=False):  # a shared module is used more than once
            if len({lin.x for lin in uses}) == 1:
                matches.append(Match(site, uses))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    return sorted(matches, key=lambda m: order[m.linears[0].node])


def _named(by_name: Mapping[str, list[Linear]], name: str) -> list[Linear]:
    if name in by_name:
        return by_name[name]
    return next((uses for found, uses in by_name.items() if name.endswith(f".{found}")), [])
