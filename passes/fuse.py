"""A gated MLP whose sites are both masked becomes one op for decode:

masked(gate, up), act(gate) * up, masked(down)   →   gated_mlp(x, …, activation)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rana_compile.kernels.reference import ACTIVATIONS
from rana_compile.passes.match import Block, escapes
from rana_compile.passes.mlp import hidden_function
from rana_compile.passes.pointwise import region_to
from rana_compile.passes.rewrite import FusedMlp, Lowering


def fuse_gated_mlps(lowerings: Sequence[Lowering]) -> list[Lowering | FusedMlp]:
    """The same lowerings, with each pair that one op can compute put together."""
    ups = {low.match.site.block: low for low in lowerings if low.match.site.kind == "gate_up" and _is_masked(low)}
    fused: dict[int, FusedMlp] = {}
    for down in lowerings:
        up = ups.get(down.match.site.block)
        if up is None or down.match.site.kind != "down" or not _is_masked(down):
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
    activation = _activation_of(hidden_function(block))
    return FusedMlp(up, down, block, activation) if activation else None


def _activation_of(hidden: Callable[..., Tensor]) -> str | None:
    """The known activation ``act`` for which hidden(gate, up) = act(gate) * up, found by evaluating it, or None."""
    points = torch.linspace(-8, 8, 1001)
    factor = torch.linspace(-2, 3, 1001)
    with torch.no_grad():
        values = hidden(points, factor).float()
    known = (name for name, act in ACTIVATIONS.items() if torch.allclose(values, act(points) * factor, atol=1e-5))
    return next(known, None)
