"""MLPs, gated or not:

    down(act(gate(x)) * up(x))   →  sites {gate,up} (stacked) and down, one block
    down(act(up(x)))             →  sites up and down, one block

``act`` is any elementwise region; the product's operands come in either order. A near-miss (an
intermediate that someone else reads, active dropout inside, shapes that differ) is recorded and its
linears are left to the patterns for plain linears.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rana_compile.kernels.reference import ACTIVATIONS
from rana_compile.passes.match import Block, Linear, Match, Search, escapes, is_convex
from rana_compile.passes.pointwise import is_active_dropout, region_to
from rana_compile.passes.sites import make_match
from rana_compile.types import common_name


@dataclass(frozen=True)
class _Candidate:
    down: Linear
    inputs: tuple[Linear, ...]  # (gate, up) or (up,)
    region: set[fx.Node]


def find_mlps(search: Search) -> list[tuple[Match, Match, Block]]:
    """All MLPs of the graph, each as (stacked gate/up or up, down, block); claims their linears."""
    found = []
    for down in search.free():
        candidate = _candidate(search, down)
        if candidate is None or any(lin.node in search.claimed for lin in candidate.inputs):
            continue
        if reason := _near_miss(search, candidate):
            search.skip(_block_name(candidate), f"not matched as an MLP: {reason}")
            continue
        search.claimed.update({down.node, *(lin.node for lin in candidate.inputs)})
        found.append(_matches(candidate))
    return found


def _candidate(search: Search, down: Linear) -> _Candidate | None:
    """The MLP that ends in ``down``, if its input is an elementwise function of one or two linears."""
    region, starts = region_to(down.x, set(search.linears))
    if not region or not starts or not all(s in search.linears for s in starts) or down.node in starts:
        blocked = [s for s in starts if is_active_dropout(s)]
        if blocked and all(s in search.linears or s in blocked for s in starts):
            search.skip(down.weight_name.rpartition(".")[0], "not matched as an MLP: dropout is active inside it")
        return None
    inputs = [search.linears[s] for s in starts]
    if len(inputs) == 1:
        return _Candidate(down, (inputs[0],), region)
    if len(inputs) == 2:
        return _Candidate(down, _gate_first(inputs, down.x), region)
    return None


def _gate_first(inputs: list[Linear], product: fx.Node) -> tuple[Linear, ...]:
    """The gate is the operand that passes through the activation: the one not read by the last product itself."""
    last = product
    while len(last.all_input_nodes) == 1:  # inactive dropout or a dtype change behind the product
        last = last.all_input_nodes[0]
    direct = [lin for lin in inputs if lin.node in last.all_input_nodes]
    if len(direct) == 1:
        return tuple(sorted(inputs, key=lambda lin: lin is direct[0]))
    return tuple(inputs)


def _near_miss(search: Search, mlp: _Candidate) -> str | None:
    if len({lin.x for lin in mlp.inputs}) > 1:
        return "gate and up do not share their input"
    if len({lin.transposed for lin in mlp.inputs}) > 1:
        return "gate and up are stored in different orientations"
    if len({lin.d_out for lin in mlp.inputs}) > 1 or mlp.inputs[0].d_out != mlp.down.d_in:
        return "the shapes of its linears differ"
    nodes = {mlp.down.node, *mlp.region, *(lin.node for lin in mlp.inputs)}
    if escaped := escapes(nodes, {mlp.down.node}):
        return f"its intermediate {escaped[0].name!r} is also used elsewhere"
    if not is_convex(search.digraph, nodes):
        return "a value leaves it and comes back"
    return None


def _block_name(mlp: _Candidate) -> str:
    return common_name(tuple(lin.weight_name for lin in (*mlp.inputs, mlp.down)))


def _matches(candidate: _Candidate) -> tuple[Match, Match, Block]:
    name = _block_name(candidate)
    inputs = tuple(lin.node for lin in candidate.inputs)
    region, hidden = frozenset(candidate.region), candidate.down.x
    activation = activation_of(hidden_function(inputs, region, hidden)) if len(inputs) == 2 else None
    up = make_match(candidate.inputs, "gate_up" if len(inputs) == 2 else "up", name, activation)
    down = make_match((candidate.down,), "down", name)
    return up, down, Block(name, up.site, down.site, inputs, hidden, region)


def hidden_function(inputs: Sequence[fx.Node], region: Collection[fx.Node], hidden: fx.Node) -> fx.GraphModule:
    """The elementwise region of an MLP as a callable of its linears' outputs: (gate, up) or (up,) → hidden."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    for node in hidden.graph.nodes:
        if node in region:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[hidden])
    return fx.GraphModule(torch.nn.Module(), graph)


def activation_of(hidden: Callable[..., Tensor]) -> str | None:
    """The known activation ``act`` for which hidden(gate, up) = act(gate) * up, found by evaluating it, or None."""
    points = torch.linspace(-8, 8, 1001)
    factor = torch.linspace(-2, 3, 1001)
    with torch.no_grad():
        values = hidden(points, factor).float()
    known = (name for name, act in ACTIVATIONS.items() if torch.allclose(values, act(points) * factor, atol=1e-5))
    return next(known, None)
