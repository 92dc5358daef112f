"""From candidates to a choice that measures what it promises: allocate → refit thresholds → measure → correct → again.

Predicted prices rank candidates of one kind well and of different kinds badly. So each kind of adapter is switched
on alone on held-back batches; measured over predicted re-weighs its prices, and the allocation is solved again. Of
the two choices the one that diverges less is kept.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.data import Batch, rows_of
from rana_compile.fitting import Candidate
from rana_compile.learning import learn
from rana_compile.memory import one_by_one
from rana_compile.objective import NO_LABEL, distances, main_output, next_tokens
from rana_compile.passes.interpret import Handler
from rana_compile.passes.record import Adapted, dense_handler
from rana_compile.processes import ALONE, Processes
from rana_compile.progress import Progress
from rana_compile.recipes import Candidates, Choice, Measure, solve
from rana_compile.types import ConfigError, Site

log = logging.getLogger(__name__)

REFIT_TOKENS = 8192  # that thresholds are refitted on
CHECK_TOKENS = 1024  # that each kind of adapter is measured on, alone
MAX_REFITS = 3
MAX_SEARCHES = 4  # plans fitted to find the cheapest within a loss increase
TOLERANCE = 0.01  # relative miss of the chosen cost that is accepted without another refit
HIGHER = 1.5  # times the thresholds, with which the loss rises by more than its noise does
SPREAD = 0.3  # standard deviation, over models and texts, of the loss increase as a multiple of the divergence
SAME = 1e-3  # relative difference of what is computed twice
KEPT_BYTES = 1_000_000_000  # of dense outputs, on a CPU; after the last fit samples were as large
DEFAULT_SHARE = 0.6

Unit = Literal["flops", "bytes", "loss"]
Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """What is asked: a share of FLOPs or bytes to keep, or a loss increase (nats) not to exceed."""

    unit: Unit
    value: float

    @classmethod
    def of(cls, flops: float | None, bytes_: float | None, loss: float | None) -> "Target":
        """The one budget that is given, or the default. Raises ConfigError."""
        given = {"flops_budget": flops, "bytes_budget": bytes_, "max_loss_increase": loss}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} contradict each other; give one budget")
        name, value = next(iter(given.items()), ("flops_budget", DEFAULT_SHARE))
        most = math.inf if name == "max_loss_increase" else 1
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            expected = "a positive number of nats" if name == "max_loss_increase" else "a share in (0, 1]"
            raise ConfigError(f"{name} is {value!r}; expected {expected}")
        units: dict[str, Unit] = {"flops_budget": "flops", "bytes_budget": "bytes", "max_loss_increase": "loss"}
        return cls(units[name], float(value))

    @property
    def share(self) -> float:
        """The share of FLOPs that candidates are made for."""
        return DEFAULT_SHARE if self.unit == "loss" else self.value


@dataclass(frozen=True)
class Problem:
    """Candidates of all sites, and what they cost in the target's unit (None: FLOPs)."""

    candidates: Candidates
    cost: Measure | None = None

    def solve(self, share: float, price: Measure | None = None) -> Choice:
        """The allocation that keeps this share of the dense cost."""
        return solve(self.candidates, share * sum(each[0] for each in self._costs()), self.cost, price)

    def least_share(self) -> float:
        """What the cheapest candidates keep of the dense cost."""
        costs = self._costs()
        return sum(map(min, costs)) / sum(each[0] for each in costs)

    def _costs(self) -> list[list[float]]:
        """Of each site's candidates, the dense one first."""
        cost = self.cost or (lambda site, c: c.option.cost)
        return [[cost(site, c) for c in each] for site, each in self.candidates.items()]


@dataclass(frozen=True)
class Text:
    """What was measured on the held-back text's own next tokens: divergence and loss increase, in nats per token."""

    tokens: int
    divergence: float
    increase: float


@dataclass(frozen=True)
class Fitted:
    """A choice with refitted thresholds, and what was measured of it on held-back batches, in nats per token.

    ``loss_increase`` is None where it was not predicted.
    """

    choice: Choice
    adapted: Adapted
    divergence: float
    text: Text
    loss_increase: float | None = None


class Fitter:
    """Fits choices on the batches of one calibration. ``run(handler, batch)`` gives the model's output.

    ``writes_text``: whether it may be logits of the next tokens of the batches' text.
    """

    def __init__(
        self,
        run: Callable[[Handler, Batch], Any],
        fitting: Sequence[Batch],
        held_back: Sequence[Batch],
        bar: Progress,
        refits: int = MAX_REFITS,
        processes: Processes = ALONE,
        writes_text: bool = False,
    ) -> None:
        self._processes, self._writes_text = processes, writes_text
        self._run, self._bar, self._held_back, self._refits = run, bar, held_back, refits
        self.everything = thinned([*fitting, *held_back], REFIT_TOKENS)
        self._kept: dict[int, Tensor] = {}  # dense outputs, by the batch's id

    def search(self, problem: Problem, target: Target) -> Fitted:
        """The best plan found for the target. Raises ConfigError if none meets it."""
        if target.unit == "loss":
            return self._cheapest(problem, target.value)
        fitted, weights, _ = self._corrected(problem, target.value)
        return replace(fitted, choice=_priced(fitted.choice, weights))

    def _corrected(self, problem: Problem, share: float) -> tuple[Fitted, Measure, bool]:
        """The better of two plans, by prices as predicted and as measured; these prices; whether they did better."""
        first = self.fitted(problem.solve(share), thinned(self.everything, REFIT_TOKENS // 2))
        weights = self._weights(first)
        second = self.fitted(problem.solve(share, weights), self.everything)
        better = second.divergence < first.divergence
        return second if better else first, weights, better

    def _cheapest(self, problem: Problem, most: float) -> Fitted:
        """The cheapest plan whose measured divergence is at most this, by bisection between confirmed and refused."""
        low, high = problem.least_share(), 1.0
        share = max(DEFAULT_SHARE, low)
        fitted, weights, better = self._corrected(problem, share)
        best: Fitted | None = None
        seen: list[str] = []
        for _ in range(MAX_SEARCHES):
            seen.append(f"{fitted.divergence:.4f} at {share:.0%}")
            if fitted.divergence <= most:
                high, best = share, fitted
            else:
                low = share
            share = _next_share(share, fitted.divergence / most, low, high)
            fitted = self.fitted(problem.solve(share, weights if better else None), self.everything)
        if fitted.divergence <= most and (best is None or share < high):
            best = fitted
        if best is None:
            raise ConfigError(
                f"no plan within a loss increase of {most} nats was found (measured {', '.join(seen)}); raise "
                "max_loss_increase, or give more or more typical calibration data"
            )
        return replace(best, choice=_priced(best.choice, weights))

    def learned(self, fitted: Fitted, batches: Sequence[Batch], steps: int, seed: int) -> Fitted:
        """The same adapters with thresholds learnt end to end on these batches, if that helps on held-back ones."""
        adapted = {site: c for site, c in fitted.choice.items() if c.family != "dense"}
        before = {site: c.live for site, c in adapted.items()}
        if not any(before.values()):
            return fitted
        wanted = sum(c.option.cost for c in adapted.values())
        self._bar.expect(steps)
        try:
            adapters, live = learn(
                self._run, batches, _adapters(adapted), before, wanted, steps, seed, self._bar, self._processes
            )
        except torch.OutOfMemoryError:
            if self._processes.count > 1:  # the others would wait
                raise
            log.warning("thresholds were not learnt, for want of memory; batches of fewer tokens need less")
            return fitted
        new = {site: replace(c, tensors=adapters[site][1], live=tuple(live[site])) for site, c in adapted.items()}
        better = self.fitted(fitted.choice | new, self.everything)
        cost, most = (sum(map(f.adapted.flops, f.choice)) for f in (better, fitted))
        helps = 0 <= better.divergence < fitted.divergence and cost <= most * (1 + TOLERANCE)
        told = "divergence %.4f with learnt thresholds, %.4f as they were: %s"
        log.info(told, better.divergence, fitted.divergence, "kept" if helps else "not kept")
        if not helps:
            return fitted
        gained = better.divergence / fitted.divergence
        return replace(better, choice=_priced(better.choice, lambda site, c: gained * c.option.price))

    def foreseen(self, fitted: Fitted) -> Fitted:
        """With the loss increase to be expected on the text's own next tokens, where batches hold any.

        Of a model that is calibrated on a text it is the divergence. Measured on few tokens it is mostly noise (of each
        token's log-likelihood ratio, whose variance is twice the divergence). So what is measured is its ratio to the
        divergence, with thresholds as they are and with higher ones, and drawn towards 1 by as much as it is noise.
        """
        if not fitted.text.tokens or not self._is_causal():
            return fitted
        self._bar.expect(len(self._held_back))
        higher = {site: _scaled(c, [HIGHER] * len(c.live)) for site, c in fitted.choice.items()}
        ((_, further),) = self._measured([Adapted(_adapters(higher))], self._held_back)
        apart, increases = zip(*((t.divergence, t.increase) for t in (fitted.text, further)), strict=True)
        if not all(map(math.isfinite, (*apart, *increases))):
            return fitted
        if min(apart) <= 0:  # nothing is adapted
            return replace(fitted, loss_increase=max(apart[0], 0.0))
        noise = sum(math.sqrt(2 * each / further.tokens) for each in apart) / sum(apart)
        ratio = sum(increases) / sum(apart)
        expected = 1 + (ratio - 1) * SPREAD**2 / (SPREAD**2 + noise**2)
        log.info("loss increase over divergence: %.2f ± %.2f, taken as %.2f", ratio, noise, expected)
        return replace(fitted, loss_increase=expected * apart[0])

    def _is_causal(self) -> bool:
        """Whether the second half of a text leaves the outputs of the first as they are, in all processes."""
        batch, same = self._held_back[0], True
        first = self._dense(batch)
        if next_tokens(batch, first) is not None:
            ids, half = batch["input_ids"], first.shape[-2] // 2
            turned = torch.cat([ids[..., :half], ids[..., half:].flip(-1)], -1)
            second = main_output(self._run(dense_handler, {**batch, "input_ids": turned}))
            before, after = (z[..., :half, :].float() for z in (first, second))
            same = bool((after - before).norm() <= SAME * before.norm())
        return self._processes.total(float(same))[0] == self._processes.count

    def fitted(self, choice: Choice, batches: Sequence[Batch]) -> Fitted:
        """The choice with thresholds that realise its cost when all adapters are on, and what was measured of it."""
        live = {site: c.live for site, c in choice.items() if c.live}
        wanted = sum(c.option.cost for c in choice.values())
        left = self._refits
        while True:
            if left:
                choice = self._refit(choice, batches, live)
            adapted = Adapted(_adapters(choice), processes=self._processes)
            (measured,) = self._measured([adapted], self._held_back)
            adapted.assume({site: c.live for site, c in choice.items()})
            miss = sum(map(adapted.flops, choice)) / wanted - 1
            left -= 1
            if left <= 0 or abs(miss) <= TOLERANCE or not live:
                return Fitted(choice, adapted, *measured)
            live = {site: tuple(n / (1 + miss) for n in each) for site, each in live.items()}

    def _refit(self, choice: Choice, batches: Sequence[Batch], live: Mapping[Site, Sequence[float]]) -> Choice:
        """Thresholds again, on the inputs each site sees when the sites before it are adapted."""
        refitting = Adapted(_adapters(choice), live, self._processes)
        for batch in one_by_one(batches):
            self._bar.say("refitting thresholds with the adapters on")
            self._run(refitting, batch)
            self._bar.step()
        return {site: _scaled(c, refitting.scale.get(site, ())) for site, c in choice.items()}

    def _measured(self, handlers: Sequence[Handler], batches: Sequence[Batch]) -> list[tuple[float, Text]]:
        """With each handler: divergence from the dense model, in nats per row, and on these batches' text."""
        sums, rows, tokens = [[0.0, 0.0, 0.0] for _ in handlers], 0, 0
        for batch in one_by_one(batches):
            self._bar.say("measuring on held-back batches")
            dense = self._dense(batch)
            labels = next_tokens(batch, dense) if self._writes_text else None
            for total, handler in zip(sums, handlers, strict=True):
                mean, *others = distances(dense, main_output(self._run(handler, batch)), labels)
                total[:] = (a + b for a, b in zip(total, (mean * rows_of(batch), *others), strict=True))
            rows += rows_of(batch)
            tokens += 0 if labels is None else int((labels != NO_LABEL).sum())
            self._bar.step()
        seen, known, *nats = self._processes.total(rows, tokens, *(each for total in sums for each in total))
        per_row, per_token = max(seen, 1), max(known, 1)
        return [
            (total / per_row, Text(int(known), apart / per_token, increase / per_token))
            for total, apart, increase in zip(nats[::3], nats[1::3], nats[2::3], strict=True)
        ]

    def _dense(self, batch: Batch) -> Tensor:
        """The dense model's output on a held-back batch; on a CPU, where a pass takes a second, ``KEPT_BYTES`` stay."""
        if id(batch) in self._kept:
            return self._kept[id(batch)]
        output = main_output(self._run(dense_handler, batch)).detach()
        held = sum(kept.untyped_storage().nbytes() for kept in (*self._kept.values(), output))
        if output.is_cpu and held * self._processes.count <= KEPT_BYTES:
            self._kept[id(batch)] = output
        return output

    def _weights(self, fitted: Fitted) -> Measure:
        """Prices as measured: each kind of adapter alone against what was predicted for it, and all together."""
        kinds: dict[Kind, Choice] = defaultdict(dict)
        for site, c in fitted.choice.items():
            if c.family != "dense":
                kinds[kind_of(site, c)][site] = c
        handlers = [Adapted(_adapters(alone)) for alone in kinds.values()]
        measured = [apart for apart, _ in self._measured(handlers, thinned(self._held_back, CHECK_TOKENS))]
        predicted = [sum(c.option.price for c in alone.values()) for alone in kinds.values()]
        ratio = {k: m / p if p > 0 < m else 1.0 for k, m, p in zip(kinds, measured, predicted, strict=True)}
        together = fitted.divergence / max(sum(measured), 1e-12) if len(kinds) > 1 else 1.0
        usual = math.exp(sum(map(math.log, ratio.values())) / max(len(ratio), 1))
        return lambda site, c: c.option.price * ratio.get(kind_of(site, c), usual) * together


def kind_of(site: Site, candidate: Candidate) -> Kind:
    """Sites of one kind and shape under one family are re-weighed together."""
    return site.kind, site.d_in, site.d_outs, candidate.family


def _next_share(share: float, excess: float, low: float, high: float) -> float:
    """Where the divergence should meet the target: it falls about with the cube of the share that is skipped."""
    guess = 1 - (1 - share) / max(excess, 1e-6) ** (1 / 3)
    margin = (high - low) / 10
    return min(max(guess, low + margin), high - margin)


def thinned(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Evenly spaced batches that hold about this many tokens together, or all if they hold fewer."""
    total = sum(map(rows_of, batches))
    if total <= tokens:
        return list(batches)
    count = max(1, round(len(batches) * tokens / total))
    return [batches[i * len(batches) // count] for i in range(count)]


def _priced(choice: Choice, price: Measure) -> Choice:
    return {site: replace(c, option=replace(c.option, price=price(site, c))) for site, c in choice.items()}


def _adapters(choice: Choice) -> dict[Site, tuple[str, Tensors]]:
    return {site: (c.family, c.tensors) for site, c in choice.items() if c.family != "dense"}


def _scaled(candidate: Candidate, factors: Sequence[float]) -> Candidate:
    tensors = candidate.tensors
    for i, factor in enumerate(factors):
        tensors = FAMILIES[candidate.family].scaled(tensors, i, factor)
    return replace(candidate, tensors=tensors)
