"""One training step of an adapted model against the dense one under Inductor, in turns in one process.

    python benchmarks/train.py --flops-budget 0.6 --batch 2 --length 256

Training computes every masked product in its dense form: nothing is skipped, and B = UᵀW is derived in every step. What
that costs is what this measures. Correctness is checked first: the compiled loss must be that of the plain formulas.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inputs import load_smollm2, pydoc_topics
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan
from rana_compile.loading import load_causal

console = Console(width=120)


def main() -> None:
    settings = parse_arguments()
    dtype = getattr(torch, settings.dtype)
    make: Callable[[], tuple[Any, Any]]
    make = (lambda: load_causal(settings.model, dtype)) if settings.model else (lambda: load_smollm2(dtype))
    device = torch.device(settings.device)
    model, tokenizer = make()
    model.to(device)
    calibration, _ = pydoc_topics(tokenizer, settings.length, settings.windows)
    if settings.plan:
        plan = Plan.load(settings.plan)
    else:
        plan = rana_compile.calibrate(model, calibration.split(1), settings.flops_budget, exclude=["lm_head"])
    ids = calibration[: settings.batch].to(device)
    sides = {"dense": model, "rana": make()[0].to(device)}
    expected = expected_loss(sides["rana"], plan, ids)
    steps = {name: step_of(side, plan if name == "rana" else None, ids) for name, side in sides.items()}
    first = {name: timed(step) for name, step in steps.items()}  # compiles
    torch.testing.assert_close(torch.tensor(first["rana"][0]), torch.tensor(expected), rtol=2e-2, atol=2e-2)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    memory = {name: peak(step, device) for name, step in steps.items()}
    for _ in range(settings.rounds):
        for name, step in steps.items():
            times[name].append(timed(step)[1])
    show(times, first, memory, ids, settings)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of a training step, adapted against dense.")
    parser.add_argument("--model", help="directory, hub name or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--plan", type=Path, help="a plan of this model (default: calibrated here)")
    parser.add_argument("--flops-budget", type=float, default=0.6)
    parser.add_argument("--windows", type=int, default=8, help="of calibration")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def expected_loss(model: nn.Module, plan: Plan, ids: Tensor) -> float:
    """What the adapted model's loss must be: the plain formulas, run eagerly."""
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        return run(input_ids=ids, labels=ids, use_cache=False).loss.item()


def step_of(model: nn.Module, plan: Plan | None, ids: Tensor) -> Callable[[], float]:
    """Forward, backward and AdamW; returns the loss before the step."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    if plan is None:
        model.compile()
    else:
        model.compile(backend="rana", options={"plan": plan})

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(loss, seconds) of a step, which ends when its loss is known here."""
    begin = time.perf_counter()
    return step(), time.perf_counter() - begin


def peak(step: Callable[[], float], device: torch.device) -> float:
    """Most bytes held during a step: of the device, or on CPU of the whole process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return float(torch.cuda.max_memory_allocated(device))
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def show(
    times: dict[str, list[float]],
    first: dict[str, tuple[float, float]],
    memory: dict[str, float],
    ids: Tensor,
    settings: argparse.Namespace,
) -> None:
    title = f"training step, {settings.dtype}, {settings.device}, {ids.shape[0]} × {ids.shape[1]} tokens"
    table = Table("", "s/step, median", "min to max", "tokens/s", "first step, s", "peak, GB", title=title)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, each in times.items():
        spread = f"{min(each):.3f} to {max(each):.3f}"
        speed = f"{ids.numel() / medians[name]:.0f}"
        row = f"{medians[name]:.3f}", spread, speed, f"{first[name][1]:.0f}", f"{memory[name] / 1e9:.2f}"
        table.add_row(name, *row)
    console.print(table)
    console.print(f"rana takes {medians['rana'] / medians['dense']:.2f} times as long as dense")
    if settings.device == "cpu":
        console.print("peak: of the process, which holds both models; the second row is what rana adds to the first")


if __name__ == "__main__":
    main()
