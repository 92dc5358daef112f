"""Thresholds learnt end to end, past what can be predicted site by site.

Allocation and thresholds were chosen as if errors of different sites added up, and from one scale for every coordinate.
Here those of inputs and ranks move together, down the divergence of the adapted model from the dense one, at the cost
that was asked:

    log t = log t₀ + a of the coordinate + b of its mask + c of the model;   loss = KL(dense ‖ adapted) + μ·FLOPs

A mask has no gradient, so in the backward pass it counts as σ((log |z|·s - log t) / T) (a straight-through estimate,
Bengio et al. 2013, arXiv 1308.3432). μ is what makes the common c indifferent, and c follows the realised cost. No
weight changes.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors, adapter_flops
from rana_compile.adapters.base import nearness
from rana_compile.data import Batch
from rana_compile.kernels.reference import is_dropped
from rana_compile.objective import main_output
from rana_compile.passes.interpret import Handler
from rana_compile.passes.record import dense, dense_handler, flat_rows
from rana_compile.processes import Processes
from rana_compile.progress import Progress
from rana_compile.types import ConfigError, Site

log = logging.getLogger(__name__)

LEARNING_STEPS = 256  # where the user says nothing and the model is on an accelerator
LEARNT = ("threshold",)  # of inputs and ranks; of hidden neurons, each live for few tokens, it does not carry over
RATE, RATE_OF_MASKS = 0.005, 0.02  # of Adam, in units of log t; a cosine brings them to FLOOR of that
FLOOR = 0.05
BETAS = (0.9, 0.98)
MEMORY = 0.9  # of the mean that μ is
RETURN = 0.3  # of a miss of the cost that c makes good in a step
MOST = 0.1  # that c moves in a step
RECENT = 0.9  # of the mean that live coordinates are
TINY = 1e-30

Run = Callable[[Handler, Batch], Any]
Adapters = Mapping[Site, tuple[str, Tensors]]


def check_steps(steps: int | None) -> None:
    """Raises ConfigError unless it is a number of steps, or None."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise ConfigError(f"learning_steps is {steps!r}; expected a number of steps, 0 for none")


class _Learner:
    """A handler that computes adapters with thresholds that move, and counts what they keep."""

    def __init__(self, adapters: Adapters, live: Mapping[Site, Sequence[float]]) -> None:
        self.sites = adapters
        self.live = {site: list(live[site]) for site in adapters}  # running means
        self.shift = 0.0  # c
        self._first = {s: {k: t for k, t in tensors.items() if k in LEARNT} for s, (_, tensors) in adapters.items()}
        self.place = next((t.device for first in self._first.values() for t in first.values()), torch.device("cpu"))
        self._own: dict[Site, Tensors] = {}  # a
        self._common: dict[Site, Tensors] = {}  # b
        for site, first in self._first.items():
            zeros = {k: torch.zeros_like(t, device=self.place) for k, t in first.items()}
            self._own[site] = {k: t.clone().requires_grad_() for k, t in zeros.items()}
            self._common[site] = {k: t[..., :1].clone().requires_grad_() for k, t in zeros.items()}
        self._derived: dict[Site, Tensors] = {}
        self.start()

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of coordinates and those of masks."""
        own, common = ([t for each in of.values() for t in each.values()] for of in (self._own, self._common))
        return own, common

    def start(self) -> None:
        """Before a pass of the model."""
        self._seen: dict[Site, list[tuple[int, list[float], Tensor]]] = {}  # by call: rows, live, slope of the FLOPs

    def tensors(self, site: Site) -> Tensors:
        """What a plan stores, with the thresholds as they are now."""
        own, common = self._own[site], self._common[site]
        now = {k: _moved(t, (own[k] + common[k] + self.shift).to(t.device)) for k, t in self._first[site].items()}
        return self.sites[site][1] | now

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        if site not in self.sites or not x.numel():
            return dense(x, weights, biases)
        family = FAMILIES[self.sites[site][0]]
        stored = {k: t.to(x.device) for k, t in self.tensors(site).items()}
        if site not in self._derived:
            with torch.autocast(x.device.type, enabled=False), torch.no_grad():
                self._derived[site] = dict(family.derive(weights, stored))
        tensors = stored | self._derived[site]
        live, slope = [], torch.zeros((), device=x.device)
        for i, flops in enumerate(family.mask_flops(site)):
            mask = family.mask(i, site, x.detach(), weights, biases, tensors)
            z, threshold = flat_rows(mask.z.detach()), mask.threshold.detach()
            live.append(float((~is_dropped(z, threshold)).sum()) / len(z))
            near = nearness(z, threshold).mean(0)  # live coordinates that a unit of log t costs
            by_threshold = flops * near / threshold.clamp_min(TINY)
            slope = slope - torch.where(by_threshold == 0, 0.0, by_threshold * mask.threshold).sum()
        self._seen.setdefault(site, []).append((x.numel() // x.shape[-1], live, slope.to(self.place)))
        return family.forward(site, x, weights, biases, tensors)

    def cost(self) -> tuple[float, Tensor]:
        """FLOPs per token (at sites that no row reached, as before) and what has their gradient."""
        total, slopes = 0.0, torch.zeros((), device=self.place)
        for site, (name, tensors) in self.sites.items():
            calls = self._seen.get(site, [])
            rows = sum(n for n, _, _ in calls)
            now = [sum(n * live[i] for n, live, _ in calls) / max(rows, 1) for i in range(len(self.live[site]))]
            if calls:
                self.live[site] = [RECENT * b + (1 - RECENT) * x for b, x in zip(self.live[site], now, strict=True)]
            total += adapter_flops(FAMILIES[name], site, now if calls else self.live[site], tensors)
            slopes = slopes + sum(n / rows * slope for n, _, slope in calls)
        return total, slopes


def _moved(threshold: Tensor, by: Tensor) -> Tensor:
    """Thresholds times exp(by), but for those that keep or drop a coordinate whatever it is."""
    moves = (threshold > 0) & threshold.isfinite()
    return torch.where(moves, threshold.where(moves, 1.0) * by.exp(), threshold)


def learn(
    run: Run,
    batches: Sequence[Batch],
    adapters: Adapters,
    live: Mapping[Site, Sequence[float]],
    wanted: float,
    steps: int,
    seed: int,
    bar: Progress,
    processes: Processes,
) -> tuple[Adapters, Mapping[Site, Sequence[float]]]:
    """Adapters with learnt thresholds, and the mean live coordinates of their masks.

    Args:
        run: runs the model on a batch with its sites in a handler's hands.
        batches: one for each step, in an order that ``seed`` draws anew each time round.
        live: mean coordinates that each of a site's masks keeps with the thresholds as given.
        wanted: FLOPs per token of all adapted sites together.
        steps: of Adam, each a dense pass, an adapted one and the gradient of that.
        processes: each with batches of its own; their gradients count together.
    """
    learner = _Learner(adapters, live)
    own, common = learner.parameters()
    every = [*own, *common]
    optimizer = torch.optim.Adam([{"params": own}, {"params": common}], lr=RATE, betas=BETAS)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    price: float | None = None
    left_out = 0
    for step in range(steps):
        bar.say("learning thresholds")
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        errors, costs, cost = _gradients(run, batches[order.pop()], learner, every, wanted)
        errors, costs = processes.sum(errors), processes.sum(costs)
        (cost,) = (total / processes.count for total in processes.total(cost))
        bar.step()
        if not (errors.isfinite().all() and costs.isfinite().all()):
            left_out += 1
            continue
        sizes = [t.numel() for t in every]
        masks = sum(sizes[len(own) :])  # their sums are those of all coordinates
        slope = float(costs[-masks:].sum())
        now = max(0.0, -float(errors[-masks:].sum()) / slope) if slope else 0.0
        price = now if price is None else MEMORY * price + (1 - MEMORY) * now
        for parameter, gradient in zip(every, (errors + price * costs).split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        decay = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, (RATE, RATE_OF_MASKS), strict=True):
            group["lr"] = rate * decay
        optimizer.step()
        if slope:
            back = RETURN * (cost - 1) * processes.count / slope
            learner.shift -= min(max(back, -MOST), MOST)
    if left_out:
        log.warning("%d of %d learning steps were left out: their gradients were not finite", left_out, steps)
    means = {site: [n / processes.count for n in processes.total(*each)] for site, each in learner.live.items()}
    with torch.no_grad():
        return {site: (name, learner.tensors(site)) for site, (name, _) in adapters.items()}, means


def _gradients(
    run: Run, batch: Batch, learner: _Learner, parameters: Sequence[Tensor], wanted: float
) -> tuple[Tensor, Tensor, float]:
    """Of the divergence and of the cost, a vector of all parameters each; and the cost, in units of what is wanted."""
    with torch.no_grad():
        expected = main_output(run(dense_handler, batch)).float().softmax(-1)
    learner.start()
    with torch.enable_grad():
        output = main_output(run(learner, batch))
        flops, slope = learner.cost()
    if not output.requires_grad:  # it reached no adapted site
        return _flat([None] * len(parameters), parameters), _flat([None] * len(parameters), parameters), flops / wanted
    # of KL(dense ‖ adapted) by what the model returned, summed over rows: float16 has no room for less
    with torch.no_grad():
        upstream = output.float().softmax(-1).sub_(expected).to(output.dtype)
    costs = torch.autograd.grad(slope / wanted, parameters, retain_graph=True, allow_unused=True)
    errors = torch.autograd.grad(output, parameters, upstream, allow_unused=True)
    rows = output.numel() // output.shape[-1]
    return _flat(errors, parameters) / rows, _flat(costs, parameters), flops / wanted


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])
