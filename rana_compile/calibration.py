"""Fit a plan to a model: record → candidates → allocate → refit and measure with the adapters on → correct.

Batches are split: most fit, every fourth is held back to measure realised cost and loss. Activations are
streamed; per site only a bounded sample of rows (and second moments for bases) is kept.
"""

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor

from rana_compile.adapters import Tensors
from rana_compile.allocation import Option
from rana_compile.binding import succeed
from rana_compile.checkpoint import Checkpoint, fingerprint
from rana_compile.checks import check_vocabulary, check_weights
from rana_compile.correction import MAX_REFITS, Fitted, Fitter, Problem, Target, thinned
from rana_compile.data import Batch, as_batches, check_enough, rows_of
from rana_compile.fitting import Candidate, Evidence, is_tall
from rana_compile.flops import bytes_read, dense_flops, total_dense_flops
from rana_compile.learning import LEARNING_STEPS, check_steps
from rana_compile.memory import naming_remedy, one_by_one
from rana_compile.objective import differentiate, writes_text
from rana_compile.offload import SiteWeights, Weights
from rana_compile.passes.interpret import Handler, capturing
from rana_compile.passes.match import Found
from rana_compile.passes.mlp import hidden_function
from rana_compile.passes.record import Recorder, dense_handler, every_site
from rana_compile.plan import Plan, SitePlan, weight_hash
from rana_compile.processes import ALONE, Processes
from rana_compile.progress import Progress
from rana_compile.recipes import DIRECT, GLOBAL, SEPARATE_GATES, Measure, Mlp, Recipe, check_recipe
from rana_compile.statistics import Sample
from rana_compile.types import RanaError, Site, Skipped, parameter_filter

log = logging.getLogger(__name__)

SAMPLE_BYTES = 1_000_000_000  # for all samples together
MAX_SAMPLE_ROWS = 4096
RECORD_TOKENS = 8192  # for which gradients are computed
LESS_MEMORY = "batches of fewer tokens need less (one is held at a time), and so do bfloat16 and fewer layers (include)"


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    flops_budget: float | None = None,
    recipe: str | Recipe = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    bytes_budget: float | None = None,
    max_loss_increase: float | None = None,
    learning_steps: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    group: Any = None,
) -> Plan:
    """Fit adapters to ``model`` on calibration data, under one budget for all included sites.

    Args:
        model: any module that Dynamo can trace; it is not changed.
        batches: an iterable of token tensors [batch, length] or of dicts of keyword arguments, or a
            ``datasets.Dataset`` with ``input_ids``. A few thousand tokens of the kind it will serve.
        flops_budget: FLOPs to keep per token, as a share (0, 1] of the dense FLOPs of the included linears; 0.6 if
            no other budget is given.
        recipe: ``auto``, ``neuron`` or ``rana`` (the paper's), or a callable (evidence of all sites, MLPs, share)
            → one candidate per site, as ``rana_compile.recipes`` has them.
        include, exclude: glob patterns over parameter names; ``lm_head`` also matches ``lm_head.weight``.
        seed: makes the plan reproducible.
        progress: show one progress bar.
        bytes_budget: instead, bytes read per decoded token, as a share (0, 1] of those of the included weights.
        max_loss_increase: instead, the quality to keep: the cheapest plan whose divergence from the dense model on
            held-back batches (KL, nats per token: the loss it adds to text the model itself would write) stays
            below this.
        learning_steps: with recipes ``auto`` and ``neuron``, steps in which the thresholds of inputs and ranks move
            together, down the divergence of the adapted model from the dense one, at the same cost; each takes about
            as long as a step of training on one batch. Kept if it helps on held-back batches. By default 256 on an
            accelerator and 0, for the time it would take, on a CPU and where weights are offloaded.
        checkpoint: a file for what was recorded so far. A killed calibration of the same model, data and settings
            goes on from it and gives the same plan; it is removed when the plan is there.
        group: a process group of ``torch.distributed`` whose processes all call this, each with its own batches of the
            same sizes: what they record is put together, and each gets the same plan. Before DDP wraps the model.

    Returns:
        The plan, its realised cost and losses measured on held-back batches.

    Raises:
        ConfigError: bad arguments or data, or a budget that cannot be reached.
        OutOfMemoryError: of the device or the machine; it says what needs less.
        RanaError: nothing to adapt, or non-finite activations.
    """
    target = Target.of(flops_budget, bytes_budget, max_loss_increase)
    check_recipe(recipe, target.unit)
    check_steps(learning_steps)
    separate = isinstance(recipe, str) and recipe in SEPARATE_GATES
    with calibration(
        model, batches, include, exclude, seed, progress, separate, checkpoint=checkpoint, group=group
    ) as session:
        return session.fit(target, recipe, learning_steps=learning_steps)


def refit(
    model: torch.nn.Module,
    batches: Iterable[Any],
    plan: Plan | str | PathLike[str],
    *,
    seed: int = 0,
    progress: bool = True,
    group: Any = None,
) -> Plan:
    """The plan with thresholds fitted to the weights as they are now, so that it costs what was asked while they train.

    Adapters, ranks and bases stay. A model that is compiled with ``plan`` goes on with the new thresholds: those its
    graphs hold are overwritten, nothing is compiled again, and ``plan_of`` gives the new plan.

    Args:
        model: the trained model, as ``calibrate`` takes it.
        batches: as ``calibrate`` takes them; a few thousand tokens.
        plan: the plan it is trained with, or the path of it.
        group: as ``calibrate`` takes it.

    Raises:
        ConfigError: bad data.
        PlanError: the plan cannot be read or is for another model.
        RanaError: non-finite activations.
    """
    old = Plan.of(plan)
    old.check(model, values=False)
    names = [name for entry in old.sites for name in entry.site.weights]
    separate = any(entry.site.kind == "gate" for entry in old.sites)
    with calibration(model, batches, names, None, seed, progress, separate, group=group) as session:
        new = session.refit(old)
    succeed(old, new)
    return new


@contextmanager
def calibration(
    model: torch.nn.Module,
    batches: Iterable[Any],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    separate_gates: bool = False,
    fits: int = 1,
    checkpoint: "str | PathLike[str] | Checkpoint | None" = None,
    group: Any = None,
) -> Iterator["Session"]:
    """A session whose ``fit`` may be called for many budgets and recipes on what was recorded once.

    Arguments and errors as of ``calibrate``; ``separate_gates`` is what recipe ``rana`` needs; after the last of
    ``fits`` what was recorded is forgotten (one more records anew). The checkpoint is removed when the block ends well.
    """
    processes = Processes(group)
    parameters = Weights(model)
    check_weights(parameters)
    keep = parameter_filter(include, exclude, list(parameters))
    data = as_batches(batches, parameters.device)
    check_vocabulary(model, data)
    processes.check_same(
        str([rows_of(batch) for batch in data]),
        "the sizes of the batches differ between processes; give each as many batches of the same sizes",
    )
    if all("input_ids" in batch for batch in data):  # of other data the recorder knows how many rows a linear sees
        check_enough(processes.count * sum(map(rows_of, data)))
    with naming_remedy(LESS_MEMORY), capturing(model, parameters, keep, separate_gates) as (run, capture):
        with Progress(progress, (1 + 2 * fits) * len(data)) as bar:
            kept = Checkpoint(processes.own(checkpoint)) if isinstance(checkpoint, str | PathLike) else checkpoint
            settings = (separate_gates, [keep(name) for name in parameters])
            split, writes = split_held_back(data), writes_text(model)
            yield Session(parameters, run, capture, bar, seed, *split, kept, settings, processes, fits, writes)
            if kept is not None:
                kept.remove()


def split_held_back(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(batches to fit on, batches held back): every fourth, or the last of fewer."""
    held_back = list(data[3::4]) or [data[-1]]
    return [batch for i, batch in enumerate(data) if i % 4 != 3 and batch is not held_back[-1]], held_back


class Captured(Protocol):
    """What a session needs of a capture: whose hands the sites are in, and what was found in each graph."""

    handler: Handler | None
    found: list[Found]


class Session:
    """One calibration: the data, and what was recorded of it. ``found`` holds sites, MLPs and what was skipped."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        run: Callable[..., Any],
        capture: Captured,
        bar: Progress,
        seed: int,
        fitting: Sequence[Batch],
        held_back: Sequence[Batch],
        checkpoint: Checkpoint | None = None,
        settings: Sequence[Any] = (),
        processes: Processes = ALONE,
        fits: int = 1,
        writes: bool = False,
    ) -> None:
        self._left, self._writes_text = fits, writes
        self.parameters = parameters
        self._processes = processes
        self._checkpoint, self._settings = checkpoint, settings
        self.run, self.capture, self.bar, self.seed = run, capture, bar, seed
        self.fitting, self.held_back = fitting, held_back
        self._recorder: Recorder | None = None

    def fit(
        self, target: Target, recipe: str | Recipe = "auto", refit: bool = True, learning_steps: int | None = None
    ) -> Plan:
        """A plan for the target. Raises ConfigError if it cannot be reached, RanaError as ``calibrate`` does.

        Without ``refit`` thresholds stay as fitted on dense inputs, which shows what refitting them brings.
        ``learning_steps`` as ``calibrate`` takes them.
        """
        check_recipe(recipe, target.unit)
        check_steps(learning_steps)
        several = GLOBAL.get(recipe) if isinstance(recipe, str) else None
        self._record(is_tall if several else every_site)
        found = self.capture.found[0]
        fitter = self._fitter(MAX_REFITS if refit else 0)
        self.bar.say("choosing adapters")
        if several:
            problem = Problem(self._chosen(several, target, found), self._cost_of(target))
            fitted = fitter.search(problem, target)
            if learning_steps is None:
                learning_steps = LEARNING_STEPS if self._has_accelerator(problem.candidates) else 0
            if learning_steps:
                fitted = fitter.learned(fitted, self.fitting, learning_steps, self.seed)
        else:
            direct = DIRECT[recipe] if isinstance(recipe, str) else recipe
            fitted = fitter.fitted(self._chosen(direct, target, found), fitter.everything)
        return self._plan(fitter.foreseen(fitted), target, recipe, found)

    def _chosen(self, recipe: Callable[..., Any], target: Target, found: Found) -> Any:
        """What the recipe makes of what was recorded, which after the last fit goes: it is most of the memory."""
        recorder = self._recorder
        assert recorder is not None
        evidence = [self._evidence(site, sample, recorder) for site, sample in recorder.samples.items()]
        self._left -= 1
        if self._left <= 0:
            self._recorder = None
        return recipe(evidence, self._mlps(found, recorder), target.share)

    def refit(self, plan: Plan) -> Plan:
        """The plan's adapters with thresholds that realise what it was asked for on these batches."""
        fitter = self._fitter(MAX_REFITS)
        rate = plan.flops_asked / plan.flops_kept
        choice = {
            s.site: Candidate(s.family, s.tensors, s.live, Option(rate * s.flops_kept * dense_flops(s.site), s.error))
            for s in plan.sites
        }
        fitted = fitter.foreseen(fitter.fitted(choice, fitter.everything))
        new = self._plan(fitted, Target("flops", plan.flops_asked), "", self.capture.found[0])
        info = {**plan.info, "divergence": fitted.divergence, "loss_increase": fitted.loss_increase}
        return replace(new, skipped=plan.skipped, flops_asked=plan.flops_asked, model_flops=plan.model_flops, info=info)

    def run_with(self, handler: Handler, batch: Batch) -> Any:
        """The model's output with every site in the handler's hands."""
        self.capture.handler = handler
        return self.run(**batch)

    def _fitter(self, refits: int) -> Fitter:
        data = self.fitting, self.held_back
        return Fitter(self.run_with, *data, self.bar, refits, self._processes, self._writes_text)

    def _has_accelerator(self, sites: Iterable[Site]) -> bool:
        """Whether all weights of these sites are on one, none offloaded."""
        whole = not isinstance(self.parameters, Weights) or self.parameters.has_all
        return whole and not any(self._placed(name).is_cpu for site in sites for name in site.weights)

    def _cost_of(self, target: Target) -> Measure | None:
        if target.unit != "bytes":
            return None
        return lambda site, c: bytes_read(c.option.cost, self._itemsize(site), c.tensors)

    def _itemsize(self, site: Site) -> int:
        return self._placed(site.weights[0]).dtype.itemsize

    def _placed(self, name: str) -> Tensor:
        """The parameter, for its dtype and shape."""
        return self.parameters.placed(name) if isinstance(self.parameters, Weights) else self.parameters[name]

    def _record(self, has_moment: Callable[[Site], bool]) -> Recorder:
        """Samples of all sites and moments of those that need one, from one pass with gradients."""
        if self._recorder is not None and self._recorder.has_moment in (has_moment, every_site):
            return self._recorder
        self._recorder = None  # before there is another: samples and moments are gigabytes
        batches = thinned(self.fitting, RECORD_TOKENS)
        rows = sum(map(rows_of, batches))
        recorder = Recorder(lambda: self._capacity(rows), self.seed, has_moment)
        generator = torch.Generator().manual_seed(self.seed + self._processes.rank)
        done = self._recorded_before(batches, recorder, generator)
        for i, batch in one_by_one(enumerate(batches[done:], done)):
            self.bar.say("recording inputs and gradients")
            recorder.basis_rows = i % 2 == 1 or len(batches) == 1
            output = self.run_with(recorder, batch)
            if recorder.samples:
                differentiate(output, generator)
            del output  # logits are large
            if self._checkpoint is not None:
                self._checkpoint.keep(i + 1, recorder, generator, last=i + 1 == len(batches))
            self.bar.step()
        if not recorder.samples:
            reasons = "; ".join(f"{s.name}: {s.reason}" for f in self.capture.found for s in f.skipped[:3])
            raise RanaError(f"no linear layer of the model can be adapted ({reasons or 'none was found'})")
        for name in (name for site in recorder.samples for name in site.weights if name not in self.parameters):
            raise RanaError(
                f"Dynamo compiles the model in parts, and in one of them a weight is only called {name!r}. Remove the "
                'graph breaks (fullgraph=True shows them), or use model.compile(backend="rana") without a plan, which '
                "calibrates part by part"
            )
        recorder.gather(self._processes)
        check_enough(max(sample.seen for sample in recorder.samples.values()))
        self._recorder = recorder
        return recorder

    def _recorded_before(self, batches: Sequence[Batch], recorder: Recorder, generator: torch.Generator) -> int:
        """How many batches the checkpoint holds, which are in the recorder then."""
        if self._checkpoint is None:
            return 0
        limits = (RECORD_TOKENS, SAMPLE_BYTES, MAX_SAMPLE_ROWS, self.seed, torch.__version__)
        whose = fingerprint(self.parameters, batches, (*limits, recorder.has_moment.__name__, *self._settings))
        done = self._checkpoint.restore(whose, recorder, generator)
        if done:
            self.bar.step(done)
            self.run_with(dense_handler, batches[0])  # the graph is captured, and its sites found
        return done

    def _capacity(self, rows: int) -> int:
        """Rows per site that keep all samples within SAMPLE_BYTES."""
        sites = [m.site for f in self.capture.found for m in f.matches]
        per_row = sum(site.d_in * (2 + len(site.weights)) for site in sites)  # x, and u of each linear
        n = self._processes.count
        return max(64, min(rows, MAX_SAMPLE_ROWS // n, SAMPLE_BYTES // max(per_row, 1) // n))

    def _evidence(self, site: Site, sample: Sample, recorder: Recorder) -> Evidence:
        if isinstance(self.parameters, Weights) and not self.parameters.has_all:
            return Evidence(site, SiteWeights(self.parameters, site), sample, recorder.moment(site))
        weights = site.oriented([self.parameters[name].detach() for name in site.weights])
        return Evidence(site, weights, sample, recorder.moment(site))

    def _mlps(self, found: Found, recorder: Recorder) -> list[Mlp]:
        by_weights = {site.weights: site for site in recorder.samples}
        mlps = []
        for block in found.blocks:
            keys = [block.up.weights] if block.up.weights in by_weights else [(name,) for name in block.up.weights]
            if block.down.weights in by_weights and all(key in by_weights for key in keys):
                hidden = hidden_function(block.inputs, block.region, block.hidden)
                mlps.append(Mlp(tuple(by_weights[key] for key in keys), by_weights[block.down.weights], hidden))
        return mlps

    def _plan(self, fitted: Fitted, target: Target, recipe: str | Recipe, found: Found) -> Plan:
        sites = []
        for site, c in fitted.choice.items():
            stored: Tensors = {k: t.detach().cpu().contiguous() for k, t in c.tensors.items()}
            flops, live = fitted.adapted.flops(site), () if c.family == "dense" else fitted.adapted.live(site)
            digest = weight_hash([self.parameters[name] for name in site.weights])
            sites.append(SitePlan(site, c.family, stored, live, flops / dense_flops(site), c.option.price, digest))
        dtype = {str(self._placed(name).dtype) for site in fitted.choice for name in site.weights}
        info = {
            "recipe": recipe if isinstance(recipe, str) else getattr(recipe, "__name__", repr(recipe)),
            "budget": {"unit": target.unit, "value": target.value},
            "seed": self.seed,
            "tokens": self._processes.count * sum(map(rows_of, self.fitting)),
            "dtype": sorted(dtype),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "divergence": fitted.divergence,
            "loss_increase": fitted.loss_increase,
        }
        excluded = [s for s in found.skipped if s.name in self.parameters]
        extra = sum(2 * self._placed(s.name).numel() for s in excluded if self._placed(s.name).dim() == 2)
        total = float(total_dense_flops(fitted.choice))
        asked = target.value if target.unit == "flops" else sum(c.option.cost for c in fitted.choice.values()) / total
        skipped: tuple[Skipped, ...] = tuple(dict.fromkeys(s for f in self.capture.found for s in f.skipped))
        plan = Plan(tuple(sites), skipped, asked, total + extra, info)
        for dead in plan.dead:
            log.warning("rana: %s: a mask let nothing through on held-back tokens", dead.site.name)
        self._processes.check_same(
            plan.digest(), "the plans differ between processes: their models do; give all the same weights"
        )
        return plan
