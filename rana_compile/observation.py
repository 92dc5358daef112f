"""What a plan does on some text, token by token, for its page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.data import as_batches
from rana_compile.evaluation import running
from rana_compile.flops import dense_flops
from rana_compile.offload import Weights
from rana_compile.page import layer_of
from rana_compile.passes.record import Adapted, flat_rows
from rana_compile.picture import QUANTILES, Observed
from rana_compile.plan import Plan, SitePlan
from rana_compile.types import Site

ENERGY_ROWS = 1024  # tokens that an energy curve is made of
ENERGY_SITES = 6
ENERGY_POINTS = 128


def observe(
    model: torch.nn.Module, plan: Plan, batches: Iterable[Any], progress: Callable[[], None] = lambda: None
) -> Observed:
    """Run the adapted model eagerly on batches, as ``calibrate`` takes them, and note what each token takes.

    Raises PlanError if the plan belongs to other weights.
    """
    looked_at = _looked_at(plan)
    handler = _Watching({s.site: (s.family, s.tensors) for s in plan.adapted}, looked_at)
    with running(model, plan, handler) as run, torch.no_grad():
        for batch in as_batches(batches, Weights(model).device):
            run(**batch)
            progress()
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    live = {}
    for site, parts in handler.taken.items():
        shares = torch.cat(parts).double().cpu() / dense_flops(site)
        live[site.name] = torch.quantile(shares, levels).tolist()
    tokens = max((sum(map(len, parts)) for parts in handler.taken.values()), default=0)
    return Observed(tokens, live, {site.name: _energy(parts) for site, parts in handler.outputs.items()})


def _looked_at(plan: Plan) -> list[Site]:
    """Sites whose energy is of interest: those with a basis, then one of each kind from the middle of the model."""
    by_kind: dict[str, list[SitePlan]] = {}
    for entry in plan.sites:
        by_kind.setdefault(layer_of(entry.site.name)[1], []).append(entry)
    middle = [entries[len(entries) // 2] for entries in by_kind.values()]
    based = [entry for entry in plan.sites if "output_basis" in entry.tensors]
    chosen = [*based[:: -(-len(based) // 3) or 1], *middle]
    return list(dict.fromkeys(entry.site for entry in chosen))[:ENERGY_SITES]


class _Watching(Adapted):
    """Keeps FLOPs per token of each masked site, and outputs of a few."""

    def __init__(self, adapters: Mapping[Site, tuple[str, Tensors]], looked_at: Sequence[Site]) -> None:
        super().__init__(adapters)
        self.taken: dict[Site, list[Tensor]] = {}
        self.outputs: dict[Site, list[Tensor]] = {site: [] for site in looked_at}
        self._given = adapters

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        left = ENERGY_ROWS - sum(map(len, self.outputs.get(site, ())))
        if site in self.outputs and left > 0:
            rows = flat_rows(x)[:left].float()
            self.outputs[site].append(torch.cat([rows @ w.float().t() for w in weights], -1))
        return super().__call__(site, x, weights, biases)

    def count(self, site: Site, index: int, dead: Tensor) -> int:
        family, tensors = FAMILIES[self._given[site][0]], self._given[site][1]
        flops = (dead.shape[1] - dead.sum(1)) * family.mask_flops(site)[index]
        if index == 0:
            self.taken.setdefault(site, []).append(flops + family.fixed_flops(site, tensors))
        else:
            self.taken[site][-1] += flops
        return super().count(site, index, dead)


def _energy(parts: Sequence[Tensor]) -> list[float]:
    """Share of the energy of outputs [rows, d_out] that the k largest directions hold, k in at most ENERGY_POINTS."""
    outputs = torch.cat(list(parts))
    gram = outputs @ outputs.t() if outputs.shape[0] <= outputs.shape[1] else outputs.t() @ outputs
    energies = torch.linalg.eigvalsh(gram.double()).flip(0).clamp_min(0)
    shares = energies.cumsum(0) / energies.sum().clamp_min(1e-30)
    step = -(-len(shares) // ENERGY_POINTS)
    return shares[step - 1 :: step].tolist()
