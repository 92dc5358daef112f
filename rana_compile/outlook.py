"""What ``backend="rana"`` would do with a model, and why, without compiling it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rana_compile.backend import is_decode, is_left_dense
from rana_compile.config import BackendOptions
from rana_compile.flops import dense_flops
from rana_compile.offload import Weights
from rana_compile.passes.interpret import capturing
from rana_compile.passes.match import Match
from rana_compile.passes.record import dense_handler
from rana_compile.plan import Plan, SitePlan
from rana_compile.recipes import SEPARATE_GATES
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

    The model runs once, eagerly, and is not changed. Kernels are measured for its shapes, once per machine.

    Raises:
        ConfigError: an unknown option, or a pattern that matches no parameter.
        PlanError: the plan in the options cannot be read.
    """
    parsed = BackendOptions.parse(options)
    plan = None if parsed.plan is None else Plan.of(parsed.plan)
    weights_of = Weights(model)
    keep = _within(plan, parameter_filter(parsed.include, parsed.exclude, list(weights_of)))
    separate = any(s.site.kind == "gate" for s in plan.sites) if plan else parsed.recipe in SEPARATE_GATES
    with capturing(model, weights_of, keep, separate, parsed.least_features) as (run, capture):
        capture.handler = dense_handler
        with torch.no_grad():
            run(*inputs, **kwargs)
        matches = [match for found in capture.found for match in found.matches]
        skipped = tuple(dict.fromkeys(s for found in capture.found for s in found.skipped))
        total = max(sum(dense_flops(match.site) for match in matches), 1)
        sites = []
        for match in matches:
            weights = [lin.weight.meta["example_value"] for lin in match.linears]
            entry = None if plan is None else _entry_of(plan, match)
            action, reason = _outlook(match, entry, parsed, is_decode(match, weights, entry))
            sites.append(Outlook(match.site, match.rows, dense_flops(match.site) / total, action, reason))
        when = f" after {parsed.calibration_tokens:,} tokens, at {parsed.flops_budget:.0%} of their FLOPs"
        return Explanation(tuple(sites), skipped, len(capture.found), when if plan is None else "")


def _within(plan: Plan | None, keep: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """The filter, narrowed to the plan's weights."""
    if plan is None:
        return keep
    reasons: dict[str, str | None] = {s.name: s.reason for s in plan.skipped}
    reasons |= {name: None for entry in plan.sites for name in entry.site.weights}
    return lambda name: keep(name) or next((r for whole, r in reasons.items() if _is(whole, name)), "not in the plan")


def _is(whole: str, name: str) -> bool:
    """Whether a name as a graph has it, which in a part of a model is relative to it, may mean that parameter."""
    return f".{whole}".endswith(f".{name}")


def _entry_of(plan: Plan, match: Match) -> SitePlan | None:
    names = match.site.weights
    same = (e for e in plan.sites if len(e.site.weights) == len(names) and all(map(_is, e.site.weights, names)))
    return next(same, None)


def _outlook(match: Match, entry: SitePlan | None, options: BackendOptions, decode: bool) -> tuple[str, str]:
    adapter = "the fit decides how"
    if options.plan is not None:
        if entry is None or entry.family == "dense":
            return "dense", "not in the plan" if entry is None else "the plan keeps it dense"
        adapter = f"{entry.family}, {entry.flops_kept:.0%} of its FLOPs"
    if is_left_dense(match, options, decode):
        return "dense", "the rows of a prompt, and prefill='dense'"
    if decode:
        return "adapted", f"{adapter}; masked kernels"
    return "adapted", f"{adapter}; masked dense form, no faster"
