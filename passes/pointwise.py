"""Which nodes are elementwise, and the elementwise region between a linear and the node that uses it.

An activation may be one call (``silu``) or many (the tanh form of GELU written out), so a match walks
back through elementwise nodes until one tensor is left. PyTorch's own ``pointwise`` tag decides.
"""

from functools import cache

import torch
from torch import fx

from rana_compile.passes.match import op_name, shape

_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout"}
_LOOKUPS = {"embedding", "embedding_bag", "index_select", "size", "interpolate", "cat"}
_TRANSPOSES = {"t", "numpy_T", "mT", "transpose", "permute"}
_VIEWS = {"getattr", "getitem", "view", "reshape", "expand", "unsqueeze", "squeeze"} | _TRANSPOSES
_ALIASES = {"to", "float", "half", "bfloat16", "type_as", "contiguous", "clone"}


def is_pointwise(node: fx.Node) -> bool:
    """Whether the node maps each element on its own (dtype changes and inactive dropout included)."""
    name = op_name(node)
    if name in _DROPOUTS:
        return not is_active_dropout(node)
    return name in _ALIASES or _tagged_pointwise(name)


def is_active_dropout(node: fx.Node) -> bool:
    """Whether the node draws random zeros, attention's among them."""
    if op_name(node) == "scaled_dot_product_attention":
        return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) not in (0, None)
    if op_name(node) not in _DROPOUTS:
        return False
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return bool(training and probability != 0)


def readers(weight: fx.Node) -> set[str]:
    """Names of what computes with a weight, behind views of it; picking or placing values does not count."""
    names: set[str] = set()
    for user in weight.users:
        name = op_name(user)
        if name in _VIEWS:
            names |= readers(user)
        elif name not in _LOOKUPS and user.op != "output" and not is_pointwise(user):
            names.add(name)
    return names


def region_to(node: fx.Node, stops: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Walk back from ``node`` through elementwise nodes of its shape.

    Returns (the elementwise nodes, the nodes they start from: members of ``stops`` and whatever is not elementwise).
    """
    region: set[fx.Node] = set()
    starts: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in region or current in starts:
            continue
        same = "example_value" in current.meta and shape_of(current) == shape_of(node)
        if current in stops or not (same and is_pointwise(current)):
            starts.add(current)
        else:
            region.add(current)
            todo.extend(current.all_input_nodes)
    return region, starts


def shape_of(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("example_value")
    return shape(node) if isinstance(value, torch.Tensor) else None


@cache
def _tagged_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("_") else None
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
