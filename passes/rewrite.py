"""Put adapters into a Dynamo graph: ``GraphModule + adapters → GraphModule``; the given graph is never changed.

    linear(x, Wq), linear(x, Wk), linear(x, Wv)   →  out = adapter(x, …); getitem(out, 0), (out, 1), (out, 2)

A site is lowered to its masked kernels where they were measured faster for its number of rows, else to the masked
dense form in plain torch, which Inductor fuses and autograd differentiates. Fitted tensors become buffers, which are
lifted inputs: the code depends on shapes alone, so a cached artefact is never stale.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.adapters.base import Fitted, batched_parts, part, sensitivity, stack
from rana_compile.passes.match import Block, Linear, Match


@dataclass(frozen=True)
class Lowering:
    """How one match is lowered.

    Attributes:
        family: a name in FAMILIES, or ``dense``.
        decode: through the masked kernels (one dtype, no gradients).
        buffers: tensors of the form chosen; keys as the family's ``pack`` (decode, and parts computed together) or
            ``stored`` and ``derive``.
        fitted: holds some of the buffers, which become one input of the graph.
    """

    match: Match
    family: str
    decode: bool
    buffers: Tensors
    fitted: Fitted | None = field(default=None, compare=False)


@dataclass(frozen=True)
class FusedMlp:
    """A gated MLP lowered to one op: both sites masked, ``activation`` between them."""

    up: Lowering
    down: Lowering
    block: Block
    activation: str


def rewrite(gm: fx.GraphModule, lowerings: Sequence[Lowering | FusedMlp]) -> fx.GraphModule:
    """A copy of ``gm`` in which every lowering's linears are replaced. Linted and recompiled."""
    copy, env = copy_dynamo_graph(gm)
    for lowering in lowerings:
        if isinstance(lowering, FusedMlp):
            _replace_mlp(copy, lowering, env)
        else:
            _replace(copy.graph, lowering, _buffers(copy, lowering), env)
    copy.graph.lint()
    copy.recompile()
    return copy


def copy_dynamo_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy that AOTAutograd accepts, and the map from old nodes to new ones.

    The one place that touches Dynamo's private attributes: ``_dynamo_source`` on placeholders and
    ``_param_name_to_source`` on the module are not carried over by copying.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    for old, new in env.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    output = next(node for node in gm.graph.nodes if node.op == "output")
    next(node for node in graph.nodes if node.op == "output").meta = dict(output.meta)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy._param_name_to_source = dict(getattr(gm, "_param_name_to_source", None) or {})  # type: ignore[assignment]
    return copy, env


def _buffers(gm: fx.GraphModule, lowering: Lowering) -> dict[str, fx.Node]:
    match, fitted = lowering.match, lowering.fitted
    places = fitted.places if fitted else {}
    nodes = {name: _buffer(gm, match, name, t) for name, t in lowering.buffers.items() if name not in places}
    if fitted:
        one = _buffer(gm, match, "fitted", fitted.tensor)
        with gm.graph.inserting_after(one):
            nodes |= {name: gm.graph.call_function(part, (one, *place)) for name, place in places.items()}
    return nodes


def drop_unused(gm: fx.GraphModule, places: Iterable[int]) -> list[int]:
    """Remove the inputs at these places that no longer have a user, in place. Returns the places of those that stay.

    Each input costs something at every call, and most in CUDA graphs.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    unused = {i for i in places if not inputs[i].users}
    for i in unused:
        gm.graph.erase_node(inputs[i])
    if unused:
        gm.recompile()
    return [i for i in range(len(inputs)) if i not in unused]


def _buffer(gm: fx.GraphModule, match: Match, name: str, tensor: Tensor) -> fx.Node:
    """A buffer of the graph module, registered so that AOTAutograd lifts it, and the node that reads it."""
    key = f"rana_{match.linears[0].node.name}_{name}"
    gm.register_buffer(key, tensor)
    gm._param_name_to_source[key] = ConstantSource(key)  # type: ignore[index, operator, assignment]
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        return gm.graph.get_attr(key)


def _replace(graph: fx.Graph, lowering: Lowering, buffers: Mapping[str, fx.Node], env: dict[fx.Node, fx.Node]) -> None:
    linears = lowering.match.linears
    targets = [env[lin.node] for lin in linears]
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min(targets, key=order.__getitem__)
    before = set(graph.nodes)
    with graph.inserting_before(first):
        outputs = _emit(graph, lowering, buffers, env)
    tags = {key: first.meta[key] for key in ("ac_graph_id", "recompute") if key in first.meta}  # gradient checkpointing
    for node in set(graph.nodes) - before if tags else ():
        node.meta.update(tags)
    for linear, target, output in zip(linears, targets, outputs, strict=True):
        output.meta = dict(target.meta)
        target.replace_all_uses_with(output)
        graph.erase_node(target)
        env[linear.node] = output  # the input of a site still to come


def _replace_mlp(gm: fx.GraphModule, mlp: FusedMlp, env: dict[fx.Node, fx.Node]) -> None:
    graph, (last,) = gm.graph, mlp.down.match.linears
    up, down = _buffers(gm, mlp.up), _buffers(gm, mlp.down)
    target, probed = env[last.node], len(mlp.up.buffers["probe"]) > 0
    with graph.inserting_before(target):
        args = (
            env[mlp.up.match.x],
            up["threshold"],
            up["weight_t"],
            _stacked_bias(graph, mlp.up.match.linears, env),
            down["threshold"],
            down["weight_t"],
            _bias(env, last),
            mlp.activation,
            *((graph.call_function(sensitivity, (env[mlp.up.match.x], up["probe"])),) if probed else ()),
        )
        output = graph.call_function(rana_gated_mlp_decode, args)
    output.meta = dict(target.meta)
    target.replace_all_uses_with(output)
    dead = {target, *(env[node] for node in (*mlp.block.region, *mlp.block.inputs))}
    for node in reversed(list(graph.nodes)):
        if node in dead:
            graph.erase_node(node)
    env[last.node] = output


def _emit(
    graph: fx.Graph, lowering: Lowering, buffers: Mapping[str, fx.Node], env: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    linears = lowering.match.linears
    x = env[linears[0].x]
    if lowering.decode:
        return _emit_decode(graph, lowering, buffers, x, env)
    read = _read(lowering)
    weights = tuple(_weight(graph, env, lin) if i in read else None for i, lin in enumerate(linears))
    biases = tuple(None if lin.bias is None else env[lin.bias] for lin in linears)
    call = graph.call_function(_forward(lowering), (x, weights, biases, dict(buffers)))
    return [graph.call_function(operator.getitem, (call, i)) for i in range(len(linears))]


def _read(lowering: Lowering) -> set[int]:
    """Which of the weights the form reads, not copies of them: others need not be inputs of the graph."""
    if "weight_t" in lowering.buffers:
        return set()
    copied = batched_parts(lowering.match.site.d_outs) if "batched_weight_t" in lowering.buffers else set()
    return set(range(len(lowering.match.linears))) - copied


def _forward(lowering: Lowering) -> Callable[..., tuple[Tensor, ...]]:
    """The family's plain form; what derives from the weights is computed in the graph unless it was folded."""
    chosen, site, given = FAMILIES[lowering.family], lowering.match.site, len(lowering.buffers)

    def adapter(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tensors: Tensors):  # type: ignore[no-untyped-def]
        if given == len(chosen.stored):
            tensors = tensors | chosen.derive(weights, tensors)
        return chosen.forward(site, x, weights, biases, tensors)

    adapter.__name__ = adapter.__qualname__ = f"rana_{chosen.name}"
    return adapter


def _emit_decode(
    graph: fx.Graph,
    lowering: Lowering,
    buffers: Mapping[str, fx.Node],
    x: fx.Node,
    env: Mapping[fx.Node, fx.Node],
) -> list[fx.Node]:
    linears = lowering.match.linears
    if lowering.family == "dense":
        return [graph.call_function(_dense_decode, (x, _weight(graph, env, lin), _bias(env, lin))) for lin in linears]
    bias = _stacked_bias(graph, linears, env)
    call = graph.call_function(_decode(lowering), (x, dict(buffers), bias))
    if len(linears) == 1:
        return [call]
    sizes = [lin.d_out for lin in linears]
    parts = graph.call_method("split", (call, sizes), {"dim": -1})
    return [graph.call_function(operator.getitem, (parts, i)) for i in range(len(linears))]


def _dense_decode(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.rana.linear(x, weight, bias)


def _decode(lowering: Lowering) -> Callable[..., Tensor]:
    family, site = FAMILIES[lowering.family], lowering.match.site

    def adapter(x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        return family.decode(site, x, packed, bias)

    adapter.__name__ = adapter.__qualname__ = f"rana_{family.name}_decode"
    return adapter


def rana_gated_mlp_decode(*args: Any) -> Tensor:
    """``torch.ops.rana.gated_mlp``, looked up when called: schemas are registered on demand."""
    return torch.ops.rana.gated_mlp(*args)


def _weight(graph: fx.Graph, env: Mapping[fx.Node, fx.Node], linear: Linear) -> fx.Node:
    """The node that holds W [d_out, d_in]."""
    weight = env[linear.weight]
    return graph.call_function(torch.t, (weight,)) if linear.transposed else weight


def _bias(env: Mapping[fx.Node, fx.Node], linear: Linear) -> fx.Node | None:
    return None if linear.bias is None else env[linear.bias]


def _stacked_bias(graph: fx.Graph, linears: Sequence[Linear], env: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    biases = [_bias(env, lin) for lin in linears]
    if all(b is None for b in biases):
        return None
    weights = [_weight(graph, env, lin) for lin in linears]
    return graph.call_function(stack_biases, (weights, biases))


def stack_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Biases of stacked weights as one [d_out], zeros where there is none."""
    return stack([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
