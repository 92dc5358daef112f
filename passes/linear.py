"""Every linear that no larger pattern claimed: y = x Wᵀ + b."""

from rana_compile.passes.match import Match, Search
from rana_compile.passes.sites import make_match


def find_linears(search: Search) -> list[Match]:
    """One match per unclaimed linear; claims them."""
    free = list(search.free())
    search.claimed.update(lin.node for lin in free)
    return [make_match((lin,), "linear") for lin in free]
