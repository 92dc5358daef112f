"""What ``backend="rana"`` does with each architecture, as a table in Markdown.

    python examples/architectures.py --out docs/architectures.md

Tiny random models of two layers, compiled in full with Inductor.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tiny_models import MODELS, Tiny, mask_by_hooks

import rana_compile
from rana_compile.objective import main_output
from rana_compile.testing import count_compilations

HEADER = """# Architectures

Written by `python examples/architectures.py --out docs/architectures.md`: tiny random models of two layers, two
sequences of 9 tokens.

- **sites**: found / adapted at a budget of 60 %; weights that no site covers are named below the table.
- **graphs**: Dynamo's for one call, with the backend / with stock `eager`.
- **error at 1.0**: largest difference of any output from the dense model's at a budget of 100 %.
- **tokens**: whether 12 greedily generated tokens equal those of the adapted model run without a compiler.

| architecture | sites | graphs | error at 1.0 | tokens |
|---|---:|---:|---:|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write here instead of to the terminal")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--compiler", default="inductor", help="what compiles the rewritten graphs")
    settings = parser.parse_args()
    rows, notes = [], []
    for name in track(settings.only, "architectures", console=Console(stderr=True)):
        row, note = examined(name, MODELS[name], settings.compiler)
        rows.append(row)
        notes += note
        torch.compiler.reset()
    text = HEADER + "\n".join(rows) + "\n\nNot adapted:\n\n" + "\n".join(notes) + "\n"
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(text, encoding="utf-8")
    else:
        print(text)


def examined(name: str, tiny: Tiny, compiler: str) -> tuple[str, list[str]]:
    """(a line of the table, what was skipped and why)."""
    model = tiny.make(2)
    inputs = tiny.inputs(2, 9)
    batches = [{k: v.roll(i, -1) for k, v in inputs.items()} for i in range(4)]
    plan = rana_compile.calibrate(model, batches, 0.6, recipe="neuron", progress=False)
    whole = rana_compile.calibrate(model, batches, 1.0, recipe="neuron", progress=False)
    with torch.no_grad():
        dense = main_output(model(**inputs))
        with count_compilations() as stock:
            torch.compile(model, backend="eager")(**inputs)
        torch.compiler.reset()
        with count_compilations() as ours:
            options: dict[str, Any] = {"plan": whole, "compiler": compiler}
            exact = torch.compile(model, backend="rana", options=options)(**inputs)
    error = float((main_output(exact) - dense).abs().max())
    tokens = same_tokens(model, plan, inputs, compiler) if tiny.generates else "–"
    sites = f"{len(plan.sites)} / {len(plan.adapted)}"
    row = f"| {name} | {sites} | {ours.graphs} / {stock.graphs} | {error:.1e} | {tokens} |"
    return row, [f"- {name}: `{s.name}`, {s.reason}" for s in plan.skipped]


def same_tokens(model: Any, plan: rana_compile.Plan, inputs: dict[str, Any], compiler: str) -> str:
    """Greedy tokens of the compiled model against those of masked inputs, put in by hooks."""
    inputs = {"input_ids" if k == "decoder_input_ids" and len(inputs) == 1 else k: v[:1] for k, v in inputs.items()}
    settings = {"max_new_tokens": 12, "do_sample": False}
    hooks = mask_by_hooks(model, plan)
    expected = model.generate(**inputs, **settings)
    for hook in hooks:
        hook.remove()
    torch.compiler.reset()
    model.compile(backend="rana", options={"plan": plan, "compiler": compiler})
    got = model.generate(**inputs, **settings)
    return "equal" if torch.equal(got, expected) else "differ"


if __name__ == "__main__":
    main()
