"""A graph in segments whose insides autograd forgets, and computes again in the backward pass.

    site site │ site site │ site site …      only what crosses a line is kept

With √n segments of n sites, memory grows with √n (Chen et al. 2016, "Training deep nets with sublinear memory cost",
arXiv 1604.06174), for less than one more forward pass.
"""

import math
import re
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import fx

from rana_compile.passes.match import Match, is_in_place, op_name

_MODES = re.compile("_set_|_enter_|_exit_|_saved_tensors_hooks|.*_nesting")  # a segment could not begin or end inside


def segments(graph: fx.Graph, matches: Iterable[Match]) -> list[list[fx.Node]]:
    """All nodes in order: what leads to the first site; segments to forget; the last one, which is needed at once.

    A site's linears stay together. One part holds all where nodes cannot run twice: they write in place, enter modes.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    spans = sorted((min(at), max(at)) for match in matches if (at := [place[lin.node] for lin in match.linears]))
    each = math.isqrt(len(spans)) or 1
    cuts = [begin for i, (begin, _) in enumerate(spans) if i % each == 0 and all(end < begin for _, end in spans[:i])]
    if any(_runs_once(node) for cut in cuts[:1] for node in nodes[cut:]):
        return [nodes]
    return [nodes[begin:end] for begin, end in pairwise([0, *cuts, len(nodes)])]


def _runs_once(node: fx.Node) -> bool:
    body = isinstance(node.target, torch._ops.HigherOrderOperator)  # may write to anything
    return body or is_in_place(node) or _MODES.match(op_name(node)) is not None
