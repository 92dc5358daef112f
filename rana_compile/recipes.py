"""From evidence to choices of one candidate per site.

A recipe either offers candidates, among which one global allocation chooses (``GLOBAL``), or chooses itself
(``DIRECT``; a callable of the same form may be given to ``calibrate``). To add one: a function and a line.

``auto``    every family competes at every site under the same allocation: the best we have.
``neuron``  neuron adapters everywhere, loss-aware thresholds, the same allocation.
``rana``    the paper's (algorithms 1–3): uniform ratio, rank adapters judged by retained energy,
            MLP budgets split by the error of the MLP's output, o_proj and lm_head dense.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from rana_compile.adapters import FAMILIES, adapter_flops
from rana_compile.allocation import ROUNDING, Option, allocate
from rana_compile.fitting import (
    Candidate,
    Evidence,
    dense_candidate,
    gated_candidates,
    neuron_at,
    neuron_candidates,
    output_basis_of,
    quantiles,
    rank_candidates,
)
from rana_compile.flops import dense_flops
from rana_compile.memory import one_by_one
from rana_compile.types import ConfigError, Site

SHARES = tuple(range(3, 10))  # of eighteenths


@dataclass(frozen=True)
class Mlp:
    """A matched MLP: its sites, and the region between as a callable of the outputs of the inputs' linears."""

    inputs: tuple[Site, ...]
    down: Site
    hidden: Callable[..., Tensor]


Choice = dict[Site, Candidate]
Candidates = dict[Site, list[Candidate]]
Recipe = Callable[[Sequence[Evidence], Sequence[Mlp], float], Choice]


def neuron_recipe(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Candidates:
    return {e.site: [dense_candidate(e), *neuron_candidates(e)] for e in one_by_one(evidence)}


def auto_recipe(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Candidates:
    candidates = neuron_recipe(evidence, mlps, share)
    by_site = {e.site: e for e in evidence}
    first = solve(candidates, share * sum(map(dense_flops, candidates)))
    for mlp in one_by_one(mlps):  # what a gate saves depends on what down drops anyway
        for site in mlp.inputs:
            candidates[site] += gated_candidates(by_site[site], by_site[mlp.down], first[mlp.down])
    for e in one_by_one(evidence):
        candidates[e.site] += rank_candidates(e)
    return candidates


Measure = Callable[[Site, Candidate], float]


def solve(candidates: Candidates, budget: float, cost: Measure | None = None, price: Measure | None = None) -> Choice:
    """One candidate per site under one budget. ``cost`` and ``price`` default to the candidates' own.

    Raises ConfigError if the budget cannot be reached.
    """
    cost = cost or (lambda site, c: c.option.cost)
    price = price or (lambda site, c: c.option.price)
    options = [[Option(cost(site, c), price(site, c)) for c in each] for site, each in candidates.items()]
    _check_reachable(options, budget)
    chosen = allocate(options, budget)
    return {site: each[k] for (site, each), k in zip(candidates.items(), chosen, strict=True)}


def _check_reachable(options: Sequence[Sequence[Option]], budget: float) -> None:
    """Says in shares what ``allocate`` would say in FLOPs or bytes. A site's first candidate is the dense one."""
    least, dense = (sum(pick(each) for each in options) for pick in (_least, lambda each: each[0].cost))
    if least > budget * (1 + ROUNDING):
        raise ConfigError(
            f"a budget of {budget / dense:.1%} cannot be reached: the cheapest adapters keep {least / dense:.1%} of "
            "what the included weights cost; raise the budget"
        )


def _least(options: Sequence[Option]) -> float:
    return min(option.cost for option in options)


def rana_recipe(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    by_site = {e.site: e for e in evidence}
    in_mlp = {s for m in mlps for s in (*m.inputs, m.down)}
    adapted = in_mlp | {site for site in by_site if site.kind == "stacked"}
    ratio = _uniform_ratio(by_site, adapted, share)
    choice = {site: dense_candidate(e) for site, e in by_site.items() if site not in adapted}
    choice |= {site: best_rank(by_site[site], ratio) for site in adapted - in_mlp}
    for mlp in mlps:
        choice |= _split_mlp(mlp, by_site, ratio)
    return choice


def _uniform_ratio(by_site: Mapping[Site, Evidence], adapted: set[Site], budget: float) -> float:
    total = sum(map(dense_flops, by_site))
    adaptable = sum(map(dense_flops, adapted))
    ratio = (budget * total - (total - adaptable)) / max(adaptable, 1)
    if ratio <= 0:
        raise ConfigError(
            f'flops_budget={budget} cannot be reached by recipe="rana", which keeps {1 - adaptable / total:.1%} of the '
            'included FLOPs dense (o_proj, lm_head); raise the budget, exclude them, or use recipe="auto"'
        )
    return min(ratio, 1.0)


def best_rank(evidence: Evidence, ratio: float) -> Candidate:
    """Algorithm 1: over r, spend what B leaves of the budget on live ranks; keep the r of most retained energy."""
    site = evidence.site
    if ratio >= 1:
        return dense_candidate(evidence)
    output_basis, _ = output_basis_of(evidence)
    energies = (evidence.x @ (evidence.weight.t() @ output_basis)).square()  # [rows, r_max]
    best: tuple[float, int, float] | None = None
    for r in range(10, energies.shape[1] + 10, 10):
        r = min(r, energies.shape[1])
        live = min((ratio * site.d_in * site.d_out - r * site.d_in) / site.d_out, r)
        if live < 1:
            break
        level = float(quantiles(energies[:, :r], (live / r,))[0]) if live < r else 0.0
        kept = float((energies[:, :r] * (energies[:, :r] >= level)).sum())
        if best is None or kept > best[0]:
            best = (kept, r, level)
    if best is None:
        raise ConfigError(
            f"{site.name}: no rank adapter fits {ratio:.1%} of its FLOPs (B alone costs more: d_in {site.d_in}, "
            f'd_out {site.d_out}); exclude it, raise the budget, or use recipe="auto"'
        )
    _, r, level = best
    live = float((energies[:, :r] >= level).sum()) / len(energies)
    tensors = {"output_basis": output_basis[:, :r], "threshold": output_basis.new_full((r,), level**0.5)}
    lost = 1 - best[0] / float(energies.sum())
    return Candidate("rank", tensors, (live,), Option(adapter_flops(FAMILIES["rank"], site, (live,), tensors), lost))


def _split_mlp(mlp: Mlp, by_site: Mapping[Site, Evidence], ratio: float) -> Choice:
    """Algorithm 2: the split of the MLP's budget, in eighteenths, with the least error of its output."""
    down = by_site[mlp.down]
    weight = down.weight
    sites = [*mlp.inputs, mlp.down]
    total = ratio * sum(map(dense_flops, sites))
    shares = SHARES if len(sites) == 3 else range(3, 16)
    options: list[dict[int, tuple[Candidate, Tensor]]] = []
    for site in mlp.inputs:
        evidence = by_site[site]
        fitted = {s: _rank_or_none(evidence, total * s / 18 / dense_flops(site)) for s in shares}
        options.append({s: (c, _run(c, evidence)) for s, c in fitted.items() if c is not None})
    exact = mlp.hidden(*(by_site[s].x @ by_site[s].weight.t() for s in mlp.inputs)) @ weight.t()
    lasts = {s: neuron_at(down, min(total * s / 18 / dense_flops(mlp.down), 1.0)) for s in shares}
    best: tuple[float, list[Candidate]] | None = None
    for combo in product(*(o.items() for o in options)):
        rest = 18 - sum(s for s, _ in combo)
        if rest not in shares:
            continue
        hidden = mlp.hidden(*(y for _, (_, y) in combo))
        last = lasts[rest]
        if last.family != "dense":
            hidden = hidden * (hidden.abs() >= last.tensors["threshold"][0])
        error = float((hidden @ weight.t() - exact).square().sum())
        if best is None or error < best[0]:
            best = (error, [*(c for _, (c, _) in combo), last])
    if best is None:
        raise ConfigError(f'{mlp.down.block}: no split of the MLP fits {ratio:.1%} of its FLOPs; use recipe="auto"')
    return dict(zip(sites, best[1], strict=True))


def _rank_or_none(evidence: Evidence, ratio: float) -> Candidate | None:
    try:
        return best_rank(evidence, ratio)
    except ConfigError:
        return None  # this share is too small for B; other splits are tried, and none left is an error


def _run(candidate: Candidate, evidence: Evidence) -> Tensor:
    x, weight = evidence.x, evidence.weight
    if candidate.family == "dense":
        return x @ weight.t()
    family = FAMILIES[candidate.family]
    tensors = candidate.tensors | family.derive([weight], candidate.tensors)
    site = replace(evidence.site, d_outs=(evidence.site.d_out,))
    return family.forward(site, x, [weight], [None], tensors)[0]


GLOBAL: dict[str, Callable[[Sequence[Evidence], Sequence[Mlp], float], Candidates]] = {
    "auto": auto_recipe,
    "neuron": neuron_recipe,
}
DIRECT: dict[str, Recipe] = {"rana": rana_recipe}
RECIPES = (*GLOBAL, *DIRECT)
SEPARATE_GATES = frozenset({"rana"})  # recipes that take gate and up as sites of their own


def check_recipe(recipe: str | Recipe, unit: str) -> None:
    """Raises ConfigError unless there is such a recipe and it takes budgets in this unit (``Target.unit``)."""
    if recipe not in RECIPES if isinstance(recipe, str) else not callable(recipe):
        raise ConfigError(f"unknown recipe {recipe!r}; known recipes: {', '.join(RECIPES)}, or a callable")
    if unit != "flops" and recipe not in GLOBAL:
        raise ConfigError(f"this recipe takes flops_budget only; {unit} needs one of {', '.join(GLOBAL)}")
