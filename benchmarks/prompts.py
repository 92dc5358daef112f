"""Time of a prompt through an adapted model against the dense one under Inductor, in turns in one process.

    python benchmarks/prompts.py --dtype bfloat16 --lengths 17 64 200 512
    python benchmarks/prompts.py --model llama-2-7b --layers 4 --device cuda --dtype bfloat16 --tolerance 0.6

One forward pass over the whole prompt without a cache, logits of every token; a speed-up is the median of the rounds'
ratios. Correctness is checked before a speed is printed: the compiled model must give the logits of the plain formulas.
Where a call returns before the device is done, the time until it returned comes first: if it is close to the whole, the
model waits for its launches.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from decode import add_model_arguments, check_logits, compiled, console, load, now, planned, title
from rich.table import Table
from torch import Tensor, nn

import rana_compile
from rana_compile.report import totals

WARM = 3  # calls before any is timed
PARTS = 5  # of the rounds, whose medians show how steady they are


def main() -> None:
    settings = parse_arguments()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model, calibration = load(settings, 512)
    plan = planned(model, calibration, settings)
    console.print(totals(plan), highlight=False)
    kind = (", symbolic length" if settings.dynamic else "") + (", attention mask" if settings.mask else "")
    table = Table(title=title(settings) + kind)
    for column in ("prompts", "tokens", "dense Inductor, ms", "rana, ms", "speed-up", f"of {PARTS} parts"):
        table.add_column(column, justify="right")
    forwards = compiled(model, plan, settings, settings.dynamic)
    for batch in settings.batch:
        for length in settings.lengths:
            add_row(table, model, plan, forwards, batch, length, settings)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens of a prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at once")
    parser.add_argument("--rounds", type=int, default=31, help="calls of each model")
    parser.add_argument("--mask", action="store_true", help="pass an attention mask of ones")
    parser.add_argument("--dynamic", action="store_true", help="one graph for any length")
    settings = parser.parse_args()
    if settings.rounds < PARTS:
        parser.error(f"--rounds must be at least {PARTS}")
    return settings


def add_row(
    table: Table,
    model: nn.Module,
    plan: rana_compile.Plan,
    forwards: dict[str, Callable[..., Any]],
    batch: int,
    length: int,
    settings: argparse.Namespace,
) -> None:
    device = torch.device(settings.device)
    calls = [call_of(model, batch, length, seed, settings) for seed in range(4)]
    for forward in forwards.values():
        for _ in range(WARM):
            forward(**calls[0])
    with rana_compile.adapted(model, plan) as run:
        plain = run(**calls[0]).logits.float()
    fast = forwards["rana"](**calls[0]).logits.float().clone()
    check_logits(fast, plain, f"{batch} of {length} tokens", run.flops_kept, settings)
    times: dict[str, list[float]] = {name: [] for name in forwards}
    returned: dict[str, list[float]] = {name: [] for name in forwards}
    for i in range(settings.rounds):
        for name, forward in list(forwards.items())[:: 1 - 2 * (i % 2)]:
            torch.compiler.cudagraph_mark_step_begin()
            begin = now(device)
            forward(**calls[i % len(calls)])
            returned[name].append((time.perf_counter() - begin) * 1e3)
            times[name].append((now(device) - begin) * 1e3)
    dense, ours = times.values()
    ratios = [a / b for a, b in zip(dense, ours, strict=True)]
    parts = [statistics.median(ratios[i::PARTS]) for i in range(PARTS)]
    cells = [f"{statistics.median(each):.2f}" for each in times.values()]
    if device.type != "cpu":
        cells = [f"{statistics.median(returned[name]):.2f}, {cell}" for name, cell in zip(times, cells, strict=True)]
    row = (
        str(batch),
        str(length),
        *cells,
        f"{statistics.median(ratios):.3f}×",
        f"{min(parts):.3f}× – {max(parts):.3f}×",
    )
    table.add_row(*row)
    console.print(" · ".join(row), highlight=False)  # should the next one not end


def call_of(model: Any, batch: int, length: int, seed: int, settings: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids: Tensor = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(settings.device)
    masked = {"attention_mask": torch.ones_like(ids)} if settings.mask else {}
    return {"input_ids": ids, "use_cache": False} | masked


if __name__ == "__main__":
    main()
