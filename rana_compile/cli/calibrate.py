"""``rana-compile calibrate``: text → plan. What is recorded lies beside the plan until that is saved."""

import argparse
import time
from pathlib import Path

from rana_compile.calibration import calibration
from rana_compile.checkpoint import Checkpoint
from rana_compile.cli.inputs import load, windows
from rana_compile.cli.screen import Screen
from rana_compile.correction import Target
from rana_compile.files import check_writable
from rana_compile.plan import IN_DIRECTORY, Plan
from rana_compile.recipes import SEPARATE_GATES, check_recipe
from rana_compile.report import totals


def run(settings: argparse.Namespace, screen: Screen) -> int:
    target = Target.of(settings.flops_budget, settings.bytes_budget, settings.max_loss_increase)
    check_recipe(settings.recipe, target.unit)
    out: Path = settings.out / IN_DIRECTORY if settings.out.is_dir() else settings.out
    recording = out.with_name(out.name + ".recording")
    if settings.no_resume:
        recording.unlink(missing_ok=True)
    check_writable(out)
    model, tokenizer = load(settings, screen)
    batches = windows(settings, tokenizer, screen, settings.text, settings.tokens).split(1)
    if recording.exists():
        screen.say(f"going on from {recording}, if it is of this model, text and settings")
    begin = time.perf_counter()
    separate = settings.recipe in SEPARATE_GATES
    checkpoint = Checkpoint(recording, settings.save_every)
    sites = (settings.include, settings.exclude)
    progress = not settings.quiet
    with calibration(model, batches, *sites, settings.seed, progress, separate, checkpoint=checkpoint) as session:
        plan = session.fit(target, settings.recipe, learning_steps=settings.learning_steps)
        plan.save(out)
    seconds = time.perf_counter() - begin
    screen.result(summary(plan) | {"plan": str(out), "seconds": seconds}, f"{totals(plan)}\nplan saved: {out}")
    return 0


def summary(plan: Plan) -> dict[str, object]:
    """A plan's totals, for machines."""
    return {
        "sites": len(plan.sites),
        "adapted": len(plan.adapted),
        "skipped": len(plan.skipped),
        "flops_asked": plan.flops_asked,
        "flops_kept": plan.flops_kept,
        "flops_kept_model": plan.flops_kept_model,
        "divergence": plan.info.get("divergence"),
        "loss_increase": plan.loss_increase,
    }
