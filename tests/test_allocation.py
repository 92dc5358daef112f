"""The knapsack: exact on its hulls, never above the budget, near the optimum found by brute force."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rana_compile.allocation import GAP, ROUNDING, Option, allocate, convex_hull
from rana_compile.types import ConfigError

SITES = st.lists(
    st.lists(st.builds(Option, st.integers(1, 40), st.floats(0, 10, width=32)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def cost(sites: list[list[Option]], chosen: list[int]) -> float:
    return sum(options[k].cost for options, k in zip(sites, chosen, strict=True))


def price(sites: list[list[Option]], chosen: list[int]) -> float:
    return sum(options[k].price for options, k in zip(sites, chosen, strict=True))


def best_price(sites: list[list[Option]], budget: float) -> float:
    choices = product(*(range(len(options)) for options in sites))
    return min(price(sites, list(c)) for c in choices if cost(sites, list(c)) <= budget)


def spread(sites: list[list[Option]], share: float) -> float:
    """The budget at this share of the way from the cheapest choice to the dearest."""
    least, most = (sum(end(o.cost for o in options) for options in sites) for end in (min, max))
    return least + share * (most - least)


@given(SITES, st.floats(0, 1))
def test_within_budget_and_a_hundredth_of_the_optimum(sites: list[list[Option]], share: float) -> None:
    budget = spread(sites, share)
    chosen = allocate(sites, budget)
    assert cost(sites, chosen) <= budget * (1 + ROUNDING) ** 2
    assert price(sites, chosen) <= best_price(sites, budget * (1 + ROUNDING)) * (1 + GAP) + 1e-12
    assert GAP < 0.01


@given(SITES, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_never_costs_quality(sites: list[list[Option]], one: float, other: float) -> None:
    """But for ``GAP``: the choices are as good as the best to within it."""
    small, large = (price(sites, allocate(sites, spread(sites, share))) for share in sorted((one, other)))
    assert large <= small * (1 + GAP) + 1e-12


def test_few_large_steps_are_packed_best() -> None:
    """The step that saves most per cost comes first, and then neither of the others fits."""
    sites = [[Option(0, 40), Option(60, 0)], [Option(0, 30), Option(50, 0)], [Option(0, 30), Option(50, 0)]]
    assert allocate(sites, 100) == [0, 1, 1]


@given(SITES)
def test_an_ample_budget_takes_the_best_of_every_site(sites: list[list[Option]]) -> None:
    budget = sum(max(o.cost for o in options) for options in sites)
    expected = sum(min(o.price for o in options) for options in sites)
    assert price(sites, allocate(sites, budget)) == pytest.approx(expected)


def test_many_sites_come_within_a_hundredth_of_the_optimum() -> None:
    """Smooth curves as real sites have them: the gap of the relaxation is one step of one site."""
    sites = [[Option(c, w * (40 - c) ** 2) for c in range(1, 41)] for w in (1.0, 2.0, 0.5, 3.0)]
    for budget in (40, 80, 120):
        exact = best_price_by_dynamic_programming(sites, budget)
        assert price(sites, allocate(sites, budget)) <= exact * 1.01


def best_price_by_dynamic_programming(sites: list[list[Option]], budget: int) -> float:
    best = {0: 0.0}
    for options in sites:
        step: dict[int, float] = {}
        for spent, total in best.items():
            for o in options:
                at = spent + int(o.cost)
                if at <= budget:
                    step[at] = min(step.get(at, float("inf")), total + o.price)
        best = step
    return min(best.values())


def test_unreachable_budget_says_what_is_reachable() -> None:
    with pytest.raises(ConfigError, match="cheapest candidates cost 5"):
        allocate([[Option(5, 1), Option(9, 0)]], 4)


def test_hull_is_convex_and_falls() -> None:
    options = [Option(1, 10), Option(2, 9), Option(3, 4), Option(4, 5), Option(5, 1), Option(6, 1), Option(7, 0.9)]
    hull = [options[k] for k in convex_hull(options)]
    assert [o.cost for o in hull] == [1, 3, 5, 7]
    slopes = [(b.price - a.price) / (b.cost - a.cost) for a, b in pairwise(hull)]
    assert slopes == sorted(slopes)


def test_infinite_prices_are_never_chosen() -> None:
    sites = [[Option(1, float("inf")), Option(2, 3.0)]]
    assert allocate(sites, 2) == [1]
