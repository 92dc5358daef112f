"""Choose one candidate per site under one budget: a multiple-choice knapsack (pure, no graphs, no tensors).

    minimise Σ price_i(k_i)   subject to   Σ cost_i(k_i) ≤ budget

Lagrangian sweep: on each site's lower convex hull the best candidate for a multiplier is found by
slope, so taking all hull steps in order of price per cost solves the relaxation; what is left of the
budget is then spent on the best single exchanges, off-hull candidates included. Source: Sinha &
Zoltners 1979, "The multiple-choice knapsack problem".

With many sites that is the optimum to a fraction of one step. With few it need not be: where the relaxation leaves
more than ``GAP`` open, partial choices are enumerated site by site, and those dropped that cost and lose more than
another, or that the relaxation of the sites to come cannot bring below the best choice known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import accumulate, pairwise

from rana_compile.types import ConfigError

ROUNDING = 1e-9  # relative: sums of costs in any order
GAP = 1e-3  # relative distance of a price from its lower bound that is not worth a search
STATES = 4096  # partial choices that a search keeps; fewer sites than about 30 never have more that matter


@dataclass(frozen=True)
class Option:
    """What a candidate costs (FLOPs, bytes or seconds per token) and the loss increase it brings (nats)."""

    cost: float
    price: float


def allocate(sites: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The chosen option of each site: within ``GAP`` of the least price, unless more than ``STATES`` choices compete.

    Raises:
        ConfigError: if even the cheapest options exceed the budget (the message states the least budget).
    """
    least = sum(min(o.cost for o in options) for options in sites)
    if least > budget * (1 + ROUNDING):
        raise ConfigError(f"the budget {budget:.4g} cannot be reached: the cheapest candidates cost {least:.4g}")
    chosen = [_cheapest(options) for options in sites]
    most = budget * (1 + ROUNDING)
    left = most - _sum(sites, chosen)[0].cost
    rate = 0.0  # of price per cost, where the budget cuts the hulls
    for slope, i, k in sorted(_hull_steps(sites)):
        step = sites[i][k].cost - sites[i][chosen[i]].cost
        if step > left:
            rate = rate or -slope
        elif sites[i][k].price < sites[i][chosen[i]].price:
            chosen[i] = k
            left -= step
    chosen = _spend(sites, chosen, left)
    bounds = _bounds(sites, rate)
    if _sum(sites, chosen)[0].price - (bounds[0] - rate * most) <= GAP * abs(bounds[0] - rate * most):
        return chosen
    return _searched(sites, chosen, most, bounds, rate)


def combined(groups: Sequence[Sequence[Option]]) -> list[tuple[Option, tuple[int, ...]]]:
    """The hull of the sums of one option of each group, cheapest first, with the options each sum is made of."""
    chosen = [_cheapest(options) for options in groups]
    result = [_sum(groups, chosen)]
    for _, i, k in sorted(_hull_steps(groups)):
        chosen[i] = k
        result.append(_sum(groups, chosen))
    return result


def _sum(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> tuple[Option, tuple[int, ...]]:
    parts = [options[k] for options, k in zip(groups, chosen, strict=True)]
    return Option(sum(p.cost for p in parts), sum(p.price for p in parts)), tuple(chosen)


def _cheapest(options: Sequence[Option]) -> int:
    return min(range(len(options)), key=lambda k: (options[k].cost, options[k].price))


def _hull_steps(sites: Sequence[Sequence[Option]]) -> list[tuple[float, int, int]]:
    """(slope = -price saved per cost, site, option reached) for every step on every hull."""
    steps = []
    for i, options in enumerate(sites):
        hull = convex_hull(options)
        for a, b in pairwise(hull):
            slope = (options[b].price - options[a].price) / (options[b].cost - options[a].cost)
            steps.append((slope, i, b))
    return steps


def convex_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower-left convex hull, cheapest first, prices strictly falling."""
    hull: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (options[k].cost, options[k].price)):
        if not math.isfinite(options[k].price) or (hull and options[k].price >= options[hull[-1]].price):
            continue
        while len(hull) > 1 and _is_above(options, hull[-2], hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _is_above(options: Sequence[Option], a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    run_ab, run_ac = options[b].cost - options[a].cost, options[c].cost - options[a].cost
    rise_ab, rise_ac = options[b].price - options[a].price, options[c].price - options[a].price
    return rise_ab * run_ac >= rise_ac * run_ab


def _bounds(sites: Sequence[Sequence[Option]], rate: float) -> list[float]:
    """The least price + rate · cost of the sites from each on, and 0 behind the last."""
    least = [min((o.price + rate * o.cost for o in _priced(options)), default=math.inf) for options in sites]
    return [*accumulate(reversed(least), initial=0.0)][::-1]


def _priced(options: Sequence[Option]) -> list[Option]:
    return [o for o in options if math.isfinite(o.price)]


def _searched(
    sites: Sequence[Sequence[Option]], known: list[int], most: float, bounds: Sequence[float], rate: float
) -> list[int]:
    """The best choice that costs at most this, or the one known if none is better."""
    limit = _sum(sites, known)[0].price
    cheapest = [min((o.cost for o in _priced(options)), default=math.inf) for options in sites]
    rest = [*accumulate(reversed(cheapest), initial=0.0)][::-1]
    states: list[_State] = [(0.0, 0.0, None)]
    for i, options in enumerate(sites):
        grown: list[_State] = [
            (cost + o.cost, price + o.price, (k, way))
            for cost, price, way in states
            for k, o in enumerate(options)
            if math.isfinite(o.price)
        ]
        # what the sites to come can at best add, at their relaxed prices
        grown = [s for s in grown if s[0] + rest[i + 1] <= most and s[1] + bounds[i + 1] - rate * (most - s[0]) < limit]
        states = _undominated(grown, rate)
    if not states:
        return known
    _, _, way = min(states, key=lambda s: s[1])
    chosen: list[int] = []
    while way is not None:
        k, way = way
        chosen.append(k)
    return chosen[::-1]


_Way = tuple[int, "_Way"] | None  # the options chosen so far, last first
_State = tuple[float, float, _Way]  # cost, price, how


def _undominated(states: list[_State], rate: float) -> list[_State]:
    """Those that no other undercuts in both cost and price; of too many the most promising."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda s: s[:2]):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept if len(kept) <= STATES else nsmallest(STATES, kept, key=lambda s: s[1] + rate * s[0])


def _spend(sites: Sequence[Sequence[Option]], chosen: list[int], left: float) -> list[int]:
    """Spend what is left on the single exchanges that save the most price per cost, until none fits."""
    while True:
        best: tuple[float, int, int] | None = None
        for i, options in enumerate(sites):
            now = options[chosen[i]]
            for k, option in enumerate(options):
                cost, saved = option.cost - now.cost, now.price - option.price
                if not saved > 0 or cost > left:  # NaN is not a saving
                    continue
                rate = saved / cost if cost > 0 else math.inf
                if best is None or rate > best[0]:
                    best = (rate, i, k)
        if best is None:
            return chosen
        _, i, k = best
        left -= sites[i][k].cost - sites[i][chosen[i]].cost
        chosen[i] = k
