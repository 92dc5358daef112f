"""A gated MLP whose sites are both masked becomes one op for decode:

masked(gate, up), act(gate) * up, masked(down)   →   gated_mlp(x, …, activation)
"""

from collections.abc import Sequence

from rana_compile.passes.match import Block, escapes
from rana_compile.passes.mlp import activation_of, hidden_function
from rana_compile.passes.pointwise import region_to
from rana_compile.passes.rewrite import FusedMlp, Lowering


def fuse_gated_mlps(lowerings: Sequence[Lowering]) -> list[Lowering | FusedMlp]:
    """The same lowerings, with each pair that one op can compute put together."""
    ups = {low.match.site.block: low for low in lowerings if low.match.site.kind == "gate_up" and _is_masked(low)}
    fused: dict[int, FusedMlp] = {}
    for down in lowerings:
        up = ups.get(down.match.site.block)
        if up is None or down.match.site.kind != "down" or not _is_masked(down) or len(down.buffers["probe"]):
            continue
        if mlp := _fused(up, down):
            fused |= {id(up): mlp, id(down): mlp}
    result = [fused.get(id(low), low) for low in lowerings]
    return [low for i, low in enumerate(result) if low not in result[:i]]


def _is_masked(lowering: Lowering) -> bool:
    return lowering.decode and lowering.family == "neuron"


def _fused(up: Lowering, down: Lowering) -> FusedMlp | None:
    (last,) = down.match.linears
    inputs = tuple(lin.node for lin in up.match.linears)
    region, starts = region_to(last.x, set(inputs))
    if starts != set(inputs) or escapes({*region, *inputs, last.node}, {last.node}):
        return None  # in this graph someone else reads between them
    name = up.match.site.block or ""
    block = Block(name, up.match.site, down.match.site, inputs, last.x, frozenset(region))
    activation = activation_of(hidden_function(inputs, block.region, block.hidden))
    return FusedMlp(up, down, block, activation) if activation else None
