"""``rana-compile eval``: what a plan costs in quality, and what it saves, on text that no fit has seen."""

import argparse
from dataclasses import asdict

from rich.table import Table

from rana_compile.cli.inputs import load, windows
from rana_compile.cli.screen import Screen
from rana_compile.plan import Plan
from rana_compile.quality import Quality, measure_quality


def run(settings: argparse.Namespace, screen: Screen) -> int:
    plan = Plan.load(settings.plan)
    model, tokenizer = load(settings, screen)
    plan.check(model)
    texts = windows(settings, tokenizer, screen, settings.text, settings.tokens)
    with screen.steps("scoring both models", len(texts)) as step:
        found = measure_quality(model, plan, list(texts), step)
    limits = {
        "loss increase": (found.increase, settings.max_loss_increase),
        "FLOPs kept": (found.kept, settings.max_cost),
    }
    failed = [name for name, (value, most) in limits.items() if most is not None and not value <= most]
    for name in failed:
        screen.say(f"check failed: {name} is {limits[name][0]:.4f}, more than {limits[name][1]}")
    derived = {k: getattr(found, k) for k in ("increase", "perplexity", "dense_perplexity")}
    screen.result(asdict(found) | derived | {"failed": failed}, _table(found))
    return 1 if failed else 0


def _table(found: Quality) -> Table:
    table = Table(title=f"{found.tokens:,} tokens, masks on for every one")
    for column in ("", "dense", "adapted"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("FLOPs of the included linears", "100.0%", f"{found.kept:.1%}")
    table.add_row("perplexity", f"{found.dense_perplexity:.3f}", f"{found.perplexity:.3f}")
    table.add_row("loss, nats per token", f"{found.dense_loss:.4f}", f"{found.loss:.4f} ({found.increase:+.4f})")
    table.add_row("divergence, nats per token", "0", f"{found.divergence:.4f}")
    table.add_row("same likeliest next token", "100.0%", f"{found.agreement:.1%}")
    return table
