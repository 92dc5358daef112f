"""``rana-compile show``: a plan as a table, as JSON, or as a page."""

import argparse
from typing import Any

from rana_compile.cli.calibrate import summary
from rana_compile.cli.inputs import load, windows
from rana_compile.cli.screen import Screen
from rana_compile.files import check_writable
from rana_compile.plan import Plan
from rana_compile.types import ConfigError


def run(settings: argparse.Namespace, screen: Screen) -> int:
    plan = Plan.load(settings.plan)
    if settings.html is None:
        if settings.points or settings.model or settings.text:
            raise ConfigError("--points, --model and --text are for the page; give --html FILE too")
        screen.result(summary(plan) | plan.as_dict(), str(plan))
        return 0
    from rana_compile.page import read_points

    check_writable(settings.html)
    points = [point for path in settings.points for point in read_points(path)]
    plan.report(settings.html, points=points, observed=_observed(settings, screen, plan))
    screen.result({"page": str(settings.html)}, f"page written: {settings.html}")
    return 0


def _observed(settings: argparse.Namespace, screen: Screen, plan: Plan) -> Any:
    if not settings.model and not settings.text:
        return None
    if not settings.model or not settings.text:
        raise ConfigError("live shares token by token need both --model and --text")
    from rana_compile.observation import observe

    model, tokenizer = load(settings, screen)
    batches = windows(settings, tokenizer, screen, settings.text, settings.tokens).split(1)
    with screen.steps("running the adapted model", len(batches)) as step:
        return observe(model, plan, batches, step)
