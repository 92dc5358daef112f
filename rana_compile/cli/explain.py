"""``rana-compile explain``: what would be done with every linear of a model, or the graph of one of its layers."""

import argparse
from dataclasses import asdict
from typing import Any

import torch

from rana_compile.cli.inputs import load
from rana_compile.cli.screen import Screen
from rana_compile.outlook import explain
from rana_compile.plan import Plan
from rana_compile.testing import graph_text, graphs_of, rewritten_graphs
from rana_compile.types import ConfigError


def run(settings: argparse.Namespace, screen: Screen) -> int:
    plan = None if settings.plan is None else Plan.load(settings.plan)
    model, _ = load(settings, screen, text=False)
    if plan is not None:
        plan.check(model)
    ids = torch.zeros(1, settings.rows, dtype=torch.long, device=settings.device)
    if settings.graph:
        return _graph(settings, screen, model, plan, ids)
    given = {"plan": plan, "include": settings.include, "exclude": settings.exclude}
    with screen.stage("tracing the model"):
        found = explain(
            model, input_ids=ids, use_cache=False, options={k: v for k, v in given.items() if v is not None}
        )
    sites = [asdict(outlook) for outlook in found.sites]
    document = {"sites": sites, "skipped": [asdict(s) for s in found.skipped], "graphs": found.graphs}
    screen.result(document, str(found))
    return 0


def _graph(settings: argparse.Namespace, screen: Screen, model: Any, plan: Plan | None, ids: torch.Tensor) -> int:
    with screen.stage("tracing the model"):
        before = _lines(graphs_of(model, input_ids=ids, use_cache=False), settings.graph)
        if not before:
            names = [name for name, _ in model.named_modules() if name and name.count(".") < 3]
            raise ConfigError(f"no module {settings.graph!r} computes anything; names look like {names[-1]!r}")
        torch._dynamo.reset()
        graphs = [] if plan is None else rewritten_graphs(model, plan, input_ids=ids, use_cache=False)
        after = _lines(graphs, settings.graph)
    title = f"{settings.graph}, a call of {settings.rows} token(s)"
    text = [f"before: {title}, {len(before)} operations", *before]
    if plan is None:
        screen.say("with --plan PLAN the graph with its adapters is shown too")
    else:
        text += ["", f"after: with the plan's adapters, {len(after)} operations", *after]
    screen.result({"module": settings.graph, "rows": settings.rows, "before": before, "after": after}, "\n".join(text))
    return 0


def _lines(graphs: list[Any], module: str) -> list[str]:
    lines = [line for gm in graphs for line in graph_text(gm.graph, module)]
    return [line.replace(f"{module}.", "") for line in lines]
