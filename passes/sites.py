"""Make a match, and with it its portable site, out of linears that share their input."""

from collections.abc import Sequence

from rana_compile.passes.match import Linear, Match
from rana_compile.types import Site, SiteKind, common_name


def make_match(
    linears: Sequence[Linear], kind: SiteKind, block: str | None = None, activation: str | None = None
) -> Match:
    """A match of linears that share their input, stacked in the given order and stored alike."""
    weights = tuple(lin.weight_name for lin in linears)
    d_outs = tuple(lin.d_out for lin in linears)
    site = Site(common_name(weights), kind, weights, linears[0].d_in, d_outs, block, linears[0].transposed, activation)
    return Match(site, tuple(linears))
