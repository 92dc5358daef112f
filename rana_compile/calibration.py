"""Fit a plan to a model: record → fit → allocate → refit thresholds with the adapters on → measure.

Batches are split: most fit, every fourth is held back to measure realised cost and loss. Activations are
streamed; per site only a bounded sample of rows (and second moments for bases) is kept.
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rana_compile.adapters import Tensors
from rana_compile.data import Batch, as_batches, rows_of
from rana_compile.fitting import Candidate, Evidence
from rana_compile.flops import dense_flops, total_dense_flops
from rana_compile.objective import divergence, main_output, summed_loss
from rana_compile.passes.interpret import Capture, Handler, capturing, undisturbed
from rana_compile.passes.match import Found
from rana_compile.passes.mlp import hidden_function
from rana_compile.passes.record import Adapted, Recorder, dense_handler
from rana_compile.plan import Plan, SitePlan, weight_hash
from rana_compile.progress import Progress
from rana_compile.recipes import RECIPES, Choice, Mlp
from rana_compile.statistics import Sample
from rana_compile.types import ConfigError, RanaError, Site, Skipped, parameter_filter

SAMPLE_BYTES = 1_600_000_000  # for all samples together
MAX_SAMPLE_ROWS = 4096
MAX_REFITS = 3
TOLERANCE = 0.01  # relative miss of the chosen cost that is accepted without another refit


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    flops_budget: float = 0.6,
    recipe: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Fit adapters to ``model`` on calibration data, under one FLOPs budget for all included sites.

    Args:
        model: any module that Dynamo can trace; it is not changed.
        batches: an iterable of token tensors [batch, length] or of dicts of keyword arguments, or a
            ``datasets.Dataset`` with ``input_ids``. A few thousand tokens of the kind it will serve.
        flops_budget: FLOPs to keep per token, as a share (0, 1] of the dense FLOPs of the included linears.
        recipe: ``auto``, ``neuron`` or ``rana`` (the paper's).
        include, exclude: glob patterns over parameter names; ``lm_head`` also matches ``lm_head.weight``.
        seed: makes the plan reproducible.
        progress: show one progress bar.

    Returns:
        The plan, its realised cost and losses measured on held-back batches.

    Raises:
        ConfigError: bad arguments or data, or a budget that cannot be reached.
        RanaError: nothing to adapt, or non-finite activations.
    """
    check_arguments(flops_budget, recipe)
    keep = parameter_filter(include, exclude, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    data = as_batches(batches, device)
    _check_vocabulary(model, data)
    fitting, held_back = split_held_back(data)
    steps = len(fitting) + len(data) + 2 * len(held_back)
    with (
        undisturbed(model),
        capturing(model, keep, recipe == "rana") as (run, capture),
        Progress(progress, steps) as bar,
    ):
        session = _Session(dict(model.named_parameters(remove_duplicate=False)), run, capture, bar, seed)
        return session.fit(fitting, held_back, flops_budget, recipe)


def fit_recorded(
    parameters: Mapping[str, Tensor],
    calls: Sequence[tuple[int, Any]],
    replay: Callable[[Any, Handler], Any],
    found: Found,
    flops_budget: float,
    recipe: str,
    seed: int = 0,
) -> tuple[Plan, list[Any]]:
    """As ``calibrate``, on calls that were recorded instead of a model and batches; for the backend.

    Args:
        parameters: weights of all sites by name, as the model stores them.
        calls: (rows, call) of each recorded call.
        replay: runs a call with its sites in a handler's hands and returns what the model would.
        found: the sites, the MLPs they belong to, and what was skipped.

    Returns:
        (the plan, the calls that were held back from the fit). Raises RanaError as ``calibrate`` does.
    """
    capture = _Recorded(found)
    batches: list[Batch] = [{"rows": torch.empty(1, rows, device="meta"), "call": call} for rows, call in calls]
    fitting, held_back = split_held_back(batches)
    with Progress(False, 1) as bar:
        session = _Session(parameters, lambda rows, call: replay(call, capture.current), capture, bar, seed)
        plan = session.fit(fitting, held_back, flops_budget, recipe)
    return plan, [batch["call"] for batch in held_back]


class _Recorded:
    """What ``_Session`` needs of a capture, where the graphs were found before."""

    def __init__(self, found: Found) -> None:
        self.handler: Handler | None = None
        self.found = [found]

    @property
    def current(self) -> Handler:
        assert self.handler is not None
        return self.handler


def split_held_back(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(batches to fit on, batches held back): every fourth, or the last of fewer."""
    held_back = list(data[3::4]) or [data[-1]]
    return [batch for i, batch in enumerate(data) if i % 4 != 3 and batch is not held_back[-1]], held_back


def check_arguments(flops_budget: float, recipe: str) -> None:
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}; known recipes: {', '.join(RECIPES)}")
    if not isinstance(flops_budget, int | float) or not 0 < flops_budget <= 1:
        raise ConfigError(f"flops_budget is {flops_budget!r}; expected a share of the dense FLOPs in (0, 1]")


def _check_vocabulary(model: torch.nn.Module, data: Sequence[Batch]) -> None:
    getter: Any = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if getter else None
    size = getattr(embeddings, "num_embeddings", None)
    for i, batch in enumerate(data):
        ids = batch.get("input_ids")
        if size and ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ConfigError(
                f"batch {i} holds token id {worst}; this model's vocabulary is 0 to {size - 1}: use its own tokenizer"
            )


class _Session:
    """One calibration: what the stages share. Lives only inside ``calibrate``."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        run: Callable[..., Any],
        capture: "Capture | _Recorded",
        bar: Progress,
        seed: int,
    ) -> None:
        self.parameters = parameters
        self.run, self.capture, self.bar, self.seed = run, capture, bar, seed
        self.tokens = 0

    def fit(self, fitting: list[Batch], held_back: list[Batch], budget: float, recipe: str) -> Plan:
        recorder = self._record(fitting, with_bases=recipe != "neuron")
        found = self.capture.found[0]
        evidence = [self._evidence(site, sample, recorder) for site, sample in recorder.samples.items()]
        self.bar.say("choosing adapters")
        choices = RECIPES[recipe](evidence, self._mlps(found, recorder), budget)
        fitted = [self._fitted(choice, fitting, held_back) for choice in choices]
        choice, adapted, measured = min(fitted, key=lambda f: f[2]["divergence"])
        return self._plan(choice, adapted, measured, budget, recipe, found)

    def _fitted(
        self, choice: Choice, fitting: list[Batch], held_back: list[Batch]
    ) -> tuple[Choice, Adapted, dict[str, float]]:
        """The choice with thresholds that realise its cost when all adapters are on, and what was measured of it."""
        live = {site: c.live for site, c in choice.items() if "threshold" in c.tensors}
        wanted = sum(c.option.cost for c in choice.values())
        for _ in range(MAX_REFITS):
            choice = self._refit(choice, fitting + held_back, live)
            adapted, measured = self._measure(choice, held_back)
            miss = sum(map(adapted.flops, choice)) / wanted - 1
            if abs(miss) <= TOLERANCE:
                break
            live = {site: n / (1 + miss) for site, n in live.items()}
        return choice, adapted, measured

    def _record(self, batches: list[Batch], with_bases: bool) -> Recorder:
        rows = sum(map(rows_of, batches))
        recorder = Recorder(lambda: self._capacity(rows), self.seed)
        self.capture.handler = recorder
        generator = torch.Generator().manual_seed(self.seed)
        for i, batch in enumerate(batches):
            self.bar.say("recording inputs and gradients")
            recorder.basis_rows = with_bases and i % 2 == 1
            output = self.run(**batch)
            if recorder.samples:
                summed_loss(output, generator).backward()
            self.tokens += rows_of(batch)
            self.bar.step()
        if not recorder.samples:
            reasons = "; ".join(f"{s.name}: {s.reason}" for f in self.capture.found for s in f.skipped[:3])
            raise RanaError(f"no linear layer of the model can be adapted ({reasons or 'none was found'})")
        return recorder

    def _capacity(self, rows: int) -> int:
        """Rows per site that keep all samples within SAMPLE_BYTES."""
        per_row = sum(m.site.d_in * 6 for f in self.capture.found for m in f.matches)  # x 4 bytes, u 2
        return max(64, min(rows, MAX_SAMPLE_ROWS, SAMPLE_BYTES // max(per_row, 1)))

    def _evidence(self, site: Site, sample: Sample, recorder: Recorder) -> Evidence:
        weights = site.oriented([self.parameters[name] for name in site.weights])
        weight = torch.cat([w.detach().float().cpu() for w in weights])
        n = sample.rows
        assert sample.x is not None
        u = None if sample.u is None else sample.u[:n].float()
        return Evidence(site, weight, sample.x[:n].float(), u, recorder.moment(site), sample.fresh[:n])

    def _mlps(self, found: Found, recorder: Recorder) -> list[Mlp]:
        by_weights = {site.weights: site for site in recorder.samples}
        mlps = []
        for block in found.blocks:
            inputs = tuple(by_weights[(name,)] for name in block.up.weights if (name,) in by_weights)
            if len(inputs) == len(block.inputs) and block.down.weights in by_weights:
                mlps.append(Mlp(inputs, by_weights[block.down.weights], hidden_function(block)))
        return mlps

    def _refit(self, choice: Choice, batches: list[Batch], live: Mapping[Site, float]) -> Choice:
        """Thresholds again, on the inputs each site sees when the sites before it are adapted."""
        refitting = Adapted(_adapters(choice), live)
        self.capture.handler = refitting
        for batch in batches:
            self.bar.say("refitting thresholds with the adapters on")
            self.run(**batch)
            self.bar.step()
        return {site: c if site not in live else _scaled(c, refitting.scale[site]) for site, c in choice.items()}

    def _measure(self, choice: Choice, batches: list[Batch]) -> tuple[Adapted, dict[str, float]]:
        """Realised cost, and the divergence from the dense model, on held-back batches."""
        adapted = Adapted(_adapters(choice))
        total, rows = 0.0, 0
        for batch in batches:
            self.bar.say("measuring on held-back batches")
            outputs = []
            for handler in (dense_handler, adapted):
                self.capture.handler = handler
                outputs.append(main_output(self.run(**batch)))
                self.bar.step()
            total += divergence(*outputs) * rows_of(batch)
            rows += rows_of(batch)
        return adapted, {"divergence": total / max(rows, 1)}

    def _plan(
        self, choice: Choice, adapted: Adapted, measured: dict[str, float], budget: float, recipe: str, found: Found
    ) -> Plan:
        sites = []
        for site, c in choice.items():
            stored: Tensors = {k: t.detach().cpu().contiguous() for k, t in c.tensors.items()}
            flops = adapted.flops(site)
            live = c.live if c.family == "dense" else adapted.live(site)
            digest = weight_hash([self.parameters[name] for name in site.weights])
            sites.append(SitePlan(site, c.family, stored, live, flops / dense_flops(site), c.option.price, digest))
        dtype = {str(self.parameters[name].dtype) for site in choice for name in site.weights}
        info = {
            "recipe": recipe,
            "seed": self.seed,
            "tokens": self.tokens,
            "dtype": sorted(dtype),
            "torch": torch.__version__,
            "python": platform.python_version(),
        } | measured
        excluded = [s for s in found.skipped if s.name in self.parameters]
        extra = sum(2 * self.parameters[s.name].numel() for s in excluded if self.parameters[s.name].dim() == 2)
        model_flops = float(total_dense_flops(choice) + extra)
        skipped: tuple[Skipped, ...] = tuple(dict.fromkeys(s for f in self.capture.found for s in f.skipped))
        return Plan(tuple(sites), skipped, budget, model_flops, info)


def _adapters(choice: Choice) -> dict[Site, tuple[str, Tensors]]:
    return {site: (c.family, c.tensors) for site, c in choice.items() if c.family != "dense"}


def _scaled(candidate: Candidate, factor: float) -> Candidate:
    return replace(candidate, tensors=candidate.tensors | {"threshold": candidate.tensors["threshold"] * factor})
