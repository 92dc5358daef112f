"""Gradient checkpointing as Dynamo writes it → plain nodes, so that linears inside can be found and adapted:

    tag_activation_checkpoint(body, x, w, …)[0]   →  linear(x, w), …, each tagged ``recompute``

The call itself does no more than tag its body's nodes, for the partitioner to compute them again in the backward pass;
tagged nodes outside a body mean the same. Selective checkpointing (``context_fn``) tags by operator and stays as it is.
"""

from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from rana_compile.passes.rewrite import copy_dynamo_graph

_GROUPS = count(1 << 20)  # apart from the numbers that PyTorch gives to bodies it tags itself


def inline_checkpoints(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, or where it checkpoints a copy with the bodies in place of the calls."""
    if not any(_body(gm, node) for node in gm.graph.nodes):
        return gm
    copy, env = copy_dynamo_graph(gm)
    for node in list(gm.graph.nodes):
        if (body := _body(gm, node)) is not None:
            _inline(copy, env[node], body)
    copy.graph.lint()
    copy.recompile()
    return inline_checkpoints(copy)  # a body may checkpoint in turn


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The body of a checkpointing call that can be inlined."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    body: Any = getattr(gm, str(node.args[0].target))  # type: ignore[union-attr]
    inputs = sum(n.op == "placeholder" for n in body.graph.nodes)
    plain = "_checkpoint_context_fn" not in body.meta and inputs == len(node.args) - 1
    attributes = any(n.op in ("get_attr", "call_module") for n in body.graph.nodes)
    return body if plain and not attributes else None


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
    tags = {"ac_graph_id": next(_GROUPS), "recompute": CheckpointPolicy.PREFER_RECOMPUTE}
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    env = dict(zip(inputs, call.args[1:], strict=True))
    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(call):
        results = gm.graph.graph_copy(body.graph, env)  # type: ignore[arg-type]
    for node in gm.graph.nodes:
        if node not in before:
            node.meta.update(tags)
    (holder,) = [n for n in call.all_input_nodes if n is call.args[0]]
    for user in list(call.users):  # all take one of the results
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not holder.users:
        gm.graph.erase_node(holder)
