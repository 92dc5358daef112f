"""Linears that share their input (q/k/v): [W_q; W_k; W_v] x, one site with one mask."""

from collections import defaultdict

from torch import fx

from rana_compile.passes.match import Linear, Match, Search, is_mutated
from rana_compile.passes.sites import make_match


def find_shared_inputs(search: Search) -> list[Match]:
    """Stacks of two or more unclaimed linears with one input and distinct weights; claims them."""
    by_input: dict[tuple[fx.Node, bool], list[Linear]] = defaultdict(list)
    for linear in search.free():
        by_input[linear.x, linear.transposed].append(linear)
    found = []
    for (x, _), stack in by_input.items():
        if len(stack) < 2:
            continue
        if is_mutated(x):
            search.skip(stack[0].weight_name, "not stacked: its input is changed in place")
            continue
        if len({lin.weight for lin in stack}) < len(stack):
            search.skip(stack[0].weight_name, "not stacked: one weight is used twice on the same input")
            continue
        search.claimed.update(lin.node for lin in stack)
        found.append(make_match(stack, "stacked"))
    return found
