"""``rana-compile sweep``: recorded once, one plan for each budget, each measured on text it was not fitted on."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from rana_compile.calibration import calibration
from rana_compile.cli.inputs import load, windows
from rana_compile.cli.screen import Screen
from rana_compile.correction import Target
from rana_compile.files import check_writable, replacing
from rana_compile.plan import Plan
from rana_compile.quality import Quality, measure_quality
from rana_compile.recipes import SEPARATE_GATES
from rana_compile.types import ConfigError

Row = dict[str, Any]


def run(settings: argparse.Namespace, screen: Screen) -> int:
    targets = [Target.of(budget, None, None) for budget in sorted(set(settings.budgets), reverse=True)]
    check_writable(settings.out / "sweep.json")
    model, tokenizer = load(settings, screen)
    fitting, held_out = _texts(settings, tokenizer, screen)
    plans = _fitted(settings, screen, model, fitting, targets)
    rows = []
    with screen.steps("measuring each plan", len(plans) * len(held_out)) as step:
        for path, plan in plans:
            found = measure_quality(model, plan, list(held_out), step)
            rows.append(_row(path, plan, found))
    document = {"model": settings.model, "recipe": settings.recipe, "points": rows}
    with replacing(settings.out / "sweep.json") as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    screen.say(f"written: {settings.out / 'sweep.json'}, and the plans beside it")
    screen.result(document, _table(rows))
    return 0


def _texts(settings: argparse.Namespace, tokenizer: Any, screen: Screen) -> tuple[Tensor, Tensor]:
    """Windows to fit on, and windows to measure on: of other files, or kept from the fit."""
    if settings.test_text:
        measured = windows(settings, tokenizer, screen, settings.test_text, settings.test_tokens)
        return windows(settings, tokenizer, screen, settings.text, settings.tokens), measured
    drawn = windows(settings, tokenizer, screen, settings.text, settings.tokens + settings.test_tokens)
    count = max(1, len(drawn) * settings.test_tokens // (settings.tokens + settings.test_tokens))
    return drawn[count:], drawn[:count]


def _fitted(
    settings: argparse.Namespace, screen: Screen, model: Any, fitting: Tensor, targets: Sequence[Target]
) -> list[tuple[Path, Plan]]:
    """A saved plan for each budget that can be reached. Raises ConfigError if none can."""
    plans, refused = [], []
    separate = settings.recipe in SEPARATE_GATES
    shown, fits = not settings.quiet, len(targets)
    sites = (settings.include, settings.exclude)
    with calibration(model, fitting.split(1), *sites, settings.seed, shown, separate, fits) as session:
        for target in targets:
            try:
                plan = session.fit(target, settings.recipe, learning_steps=settings.learning_steps)
            except ConfigError as error:
                refused.append(f"{target.value:.0%}: {error}")
                continue
            path = settings.out / f"plan-{target.value:g}.safetensors"
            plan.save(path)
            plans.append((path, plan))
    for line in refused:
        screen.say(f"no plan at {line}")
    if not plans:
        raise ConfigError(f"no budget can be reached: {refused[0]}")
    return plans


def _row(path: Path, plan: Plan, found: Quality) -> Row:
    return {
        "method": "rana",
        "asked": plan.flops_asked,
        "kept": found.kept,
        "increase": found.increase,
        "divergence": found.divergence,
        "perplexity": found.perplexity,
        "dense_perplexity": found.dense_perplexity,
        "agreement": found.agreement,
        "tokens": found.tokens,
        "plan": str(path),
    }


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=f"{rows[0]['tokens']:,} tokens that no plan was fitted on, masks on for every one")
    for column in ("budget", "FLOPs kept", "perplexity", "loss increase", "divergence", "plan"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    table.add_row("dense", "100.0%", f"{rows[0]['dense_perplexity']:.3f}", "0", "0", "")
    for r in rows:
        table.add_row(
            f"{r['asked']:.0%}", f"{r['kept']:.1%}", f"{r['perplexity']:.3f}", f"{r['increase']:+.4f}",
            f"{r['divergence']:.4f}", r["plan"],
        )  # fmt: skip
    return table
