"""What ``backend="rana"`` would do with a model, and why, without compiling it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rana_compile.backend import is_decode
from rana_compile.config import BackendOptions
from rana_compile.flops import dense_flops
from rana_compile.passes.interpret import capturing, undisturbed
from rana_compile.passes.match import Match
from rana_compile.passes.record import dense_handler
from rana_compile.plan import Plan
from rana_compile.profiled import MIN_FEATURES
from rana_compile.report import table_text
from rana_compile.types import Site, Skipped, parameter_filter


@dataclass(frozen=True)
class Outlook:
    """What would happen to one site.

    Attributes:
        rows: rows (batch · sequence) of its input on the call that was looked at, or None where they vary.
        share: its part of the dense FLOPs of all sites found.
        action: ``adapted`` or ``dense``.
        reason: how, or why not.
    """

    site: Site
    rows: int | None
    share: float
    action: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Every site of a model on one call, and what was left alone; ``str`` gives a table.

    Attributes:
        graphs: graphs that Dynamo makes of the call; more than one means that it breaks.
        when: without a plan, what comes first.
    """

    sites: tuple[Outlook, ...]
    skipped: tuple[Skipped, ...]
    graphs: int
    when: str = ""

    def __str__(self) -> str:
        rows = (
            (o.site.name, f"{o.site.d_in}→{o.site.d_out}", str(o.rows or "any"), f"{o.share:.1%}", o.action, o.reason)
            for o in self.sites
        )
        columns = ("site", "features", "rows", "of FLOPs", "", "why")
        adapted = sum(o.action == "adapted" for o in self.sites)
        summary = f"{adapted} of {len(self.sites)} sites would be adapted{self.when}, in {self.graphs} graph(s)"
        return table_text("rana_compile outlook", columns, ("site", "", "why"), rows, summary, self.skipped)


def explain(
    model: torch.nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """What ``model.compile(backend="rana", options=options)`` would do with the call ``model(*inputs, **kwargs)``.

    The model runs once, eagerly, and is not changed.

    Raises:
        ConfigError: an unknown option, or a pattern that matches no parameter.
        PlanError: the plan in the options cannot be read.
    """
    parsed = BackendOptions.parse(options)
    plan = None if parsed.plan is None else Plan.of(parsed.plan)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keep = parameter_filter(parsed.include, parsed.exclude, list(parameters))
    least = parsed.min_features
    if least is None:
        least = MIN_FEATURES if plan is None else 0
    with undisturbed(model), capturing(model, keep, parsed.recipe == "rana", least) as (run, capture):
        capture.handler = dense_handler
        with torch.no_grad():
            run(*inputs, **kwargs)
        matches = [match for found in capture.found for match in found.matches]
        skipped = tuple(dict.fromkeys(s for found in capture.found for s in found.skipped))
        total = max(sum(dense_flops(match.site) for match in matches), 1)
        entries = {} if plan is None else {entry.site.weights: entry for entry in plan.sites}
        sites = []
        for match in matches:
            weights = [parameters[name] for name in match.site.weights if name in parameters]
            action, reason = _outlook(match, plan, parsed, is_decode(match, weights, entries.get(match.site.weights)))
            sites.append(Outlook(match.site, match.rows, dense_flops(match.site) / total, action, reason))
        when = f" after {parsed.calibration_tokens:,} tokens, at {parsed.flops_budget:.0%} of their FLOPs"
        return Explanation(tuple(sites), skipped, len(capture.found), when if plan is None else "")


def _outlook(match: Match, plan: Plan | None, options: BackendOptions, decode: bool) -> tuple[str, str]:
    adapter = "the fit decides how"
    if plan is not None:
        entry = next((entry for entry in plan.sites if entry.site.weights == match.site.weights), None)
        if entry is None or entry.family == "dense":
            return "dense", "not in the plan" if entry is None else "the plan keeps it dense"
        adapter = f"{entry.family}, {entry.flops_kept:.0%} of its FLOPs"
    if decode:
        return "adapted", f"{adapter}; masked kernels"
    if options.prefill == "dense" and match.rows != 1:
        return "dense", "more than one row, and prefill='dense'"
    return "adapted", f"{adapter}; masked dense form, no faster"
