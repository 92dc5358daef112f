"""Calibrate a real model, compile it with the plan, and compare it with the same model under dense Inductor.

    python examples/demo.py --flops-budget 0.6 --out out/

Both models run in this process, in turns; quality is measured with the masks on for every scored token.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from inputs import load_smollm2, mean_nll, pydoc_topics
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import rana_compile
from rana_compile.cli.bench import generated
from rana_compile.report import totals

WINDOW = 512  # tokens of a calibration or evaluation window
MB = 1e6
console = Console()


@dataclass(frozen=True)
class Results:
    """What the demo measured; rates are medians over interleaved rounds."""

    flops_asked: float
    flops_kept: float  # on calibration tokens held back from the fit
    flops_kept_model: float
    flops_kept_held_out: float  # on the text that perplexity is measured on
    sites_adapted: int
    sites: int
    dense_perplexity: float
    adapted_perplexity: float
    scored_tokens: int
    dense_tokens_per_s: float
    adapted_tokens_per_s: float
    dense_rounds: list[float]
    adapted_rounds: list[float]
    weight_mb: float
    added_mb: float
    plan_mb: float
    peak_rss_mb: float
    settings: dict[str, Any]
    versions: dict[str, str]


def main() -> None:
    settings = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # a spinner turns already
    torch.manual_seed(0)
    begin = time.perf_counter()

    with stage("loading SmolLM2-135M (about 20 s)"):
        model, tokenizer = load_smollm2(getattr(torch, settings.dtype))
        windows = math.ceil(settings.calibration_tokens / WINDOW)
        calibration, held_out = pydoc_topics(tokenizer, WINDOW, windows, settings.windows)
    plan = calibrated(model, calibration, settings)
    quality = measured_quality(model, plan, held_out)
    speed = measured_speed(model, plan, tokenizer, settings)

    results = Results(
        flops_asked=plan.flops_asked,
        flops_kept=plan.flops_kept,
        flops_kept_model=plan.flops_kept_model,
        sites_adapted=len(plan.adapted),
        sites=len(plan.sites),
        plan_mb=(settings.out / "plan.safetensors").stat().st_size / MB,
        peak_rss_mb=peak_rss() / MB,
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()},
        versions=versions(),
        **quality,
        **speed,
    )
    report(results, settings.out)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops-budget", type=float, default=0.6, help="share of the dense FLOPs to keep")
    parser.add_argument("--recipe", choices=("auto", "neuron", "rana"), default="auto")
    parser.add_argument("--exclude", nargs="*", default=[], help="parameter name patterns, e.g. lm_head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--calibration-tokens", type=int, default=8 * WINDOW)
    parser.add_argument("--windows", type=int, default=6, help=f"held-out windows of {WINDOW} tokens to score")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a round generates")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds of each model")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the plan and the table go")
    return parser.parse_args()


def calibrated(model: nn.Module, windows: Tensor, settings: argparse.Namespace) -> rana_compile.Plan:
    console.print(f"calibrating on {windows.numel()} tokens (about a minute and a half)")
    plan = rana_compile.calibrate(
        model,
        windows.split(1),
        flops_budget=settings.flops_budget,
        recipe=settings.recipe,
        exclude=settings.exclude or None,
    )
    path = settings.out / "plan.safetensors"
    plan.save(path)
    write_atomically(settings.out / "plan.txt", f"{plan}\n")
    console.print(f"{totals(plan)}\nplan saved: {path}; site by site: {settings.out / 'plan.txt'}", highlight=False)
    return plan


def measured_quality(model: nn.Module, plan: rana_compile.Plan, windows: Tensor) -> dict[str, Any]:
    """Perplexity of both on the same windows, without kernels: the adapted model's plain formulas."""
    dense = scored("dense", model, windows)
    with rana_compile.adapted(model, plan) as adapted_model:
        adapted = scored("adapted", adapted_model, windows)
        cost = adapted_model.flops_kept
    return {
        "dense_perplexity": math.exp(dense),
        "adapted_perplexity": math.exp(adapted),
        "scored_tokens": len(windows) * (windows.shape[1] - 1),
        "flops_kept_held_out": cost,
    }


def scored(name: str, model: Callable[..., Any], windows: Tensor) -> float:
    with Progress(console=console) as bar:
        task = bar.add_task(f"scoring the {name} model", total=len(windows))
        return mean_nll(model, windows, lambda: bar.advance(task))


def measured_speed(model: Any, plan: rana_compile.Plan, tokenizer: Any, settings: argparse.Namespace) -> dict[str, Any]:
    """Decode rates of both models, compiled, in turns: dense, adapted, dense, adapted, ..."""
    torch.compiler.reset()
    adapted_model = copy.deepcopy(model)
    model.compile()
    adapted_model.compile(backend="rana", options={"plan": plan})
    prompt = tokenizer(settings.prompt, return_tensors="pt")

    def run(which: Any) -> tuple[float, str]:
        rate, ids = generated(which, prompt, tokenizer, settings.tokens)
        return rate, tokenizer.decode(ids, skip_special_tokens=True)

    with stage("compiling the dense model with Inductor (about a minute)"):
        run(model)
        dense_text = run(model)[1]
    before = live_tensor_bytes()
    with stage("compiling the adapted model with backend='rana' (about a minute)"):
        run(adapted_model)
        adapted_text = run(adapted_model)[1]
    added = live_tensor_bytes() - before
    console.print(f"[bold]dense[/]   {dense_text!r}\n[bold]adapted[/] {adapted_text!r}", highlight=False)

    rounds = track(range(settings.rounds), "timing in turns", console=console)
    pairs = [(run(model)[0], run(adapted_model)[0]) for _ in rounds]
    dense_rates, adapted_rates = map(list, zip(*pairs, strict=True))
    return {
        "dense_tokens_per_s": statistics.median(dense_rates),
        "adapted_tokens_per_s": statistics.median(adapted_rates),
        "dense_rounds": dense_rates,
        "adapted_rounds": adapted_rates,
        "weight_mb": tensor_bytes(model.parameters()) / MB,
        "added_mb": added / MB,
    }


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the storages behind tensors, each counted once (tied weights share one)."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def live_tensor_bytes() -> int:
    gc.collect()
    return tensor_bytes(o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.device.type != "meta")


def peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }


def report(results: Results, out: Path) -> None:
    """Print the table; write it as Markdown and everything measured as JSON."""
    header = ("", "dense", "adapted")
    rows = table_rows(results)
    table = Table(*header, title="SmolLM2-135M, dense Inductor against rana")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [header, ("---", "---:", "---:"), *rows]
    write_atomically(out / "results.md", "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    write_atomically(out / "results.json", json.dumps(asdict(results), indent=2) + "\n")
    console.print(f"written: {out / 'results.md'}, {out / 'results.json'}, {out / 'plan.safetensors'}")


def table_rows(r: Results) -> list[tuple[str, str, str]]:
    ratio = r.adapted_tokens_per_s / r.dense_tokens_per_s
    return [
        ("FLOPs per token, asked", "100.0%", f"{r.flops_asked:.1%}"),
        ("FLOPs per token, held-back calibration text", "100.0%", f"{r.flops_kept:.1%}"),
        ("the same, share of every linear of the model", "100.0%", f"{r.flops_kept_model:.1%}"),
        ("FLOPs per token, held-out text", "100.0%", f"{r.flops_kept_held_out:.1%}"),
        ("sites adapted", "0", f"{r.sites_adapted} of {r.sites}"),
        (f"perplexity, {r.scored_tokens} held-out tokens", f"{r.dense_perplexity:.2f}", f"{r.adapted_perplexity:.2f}"),
        (
            f"decode, tokens/s, median of {len(r.dense_rounds)}",
            f"{r.dense_tokens_per_s:.1f}",
            f"{r.adapted_tokens_per_s:.1f} ({ratio:.2f}×)",
        ),
        ("tensors in memory, MB", f"{r.weight_mb:.0f}", f"{r.weight_mb + r.added_mb:.0f}"),
        ("plan on disk, MB", "", f"{r.plan_mb:.1f}"),
        ("peak memory of this process (both models), MB", f"{r.peak_rss_mb:.0f}", f"{r.peak_rss_mb:.0f}"),
    ]


def write_atomically(path: Path, text: str) -> None:
    """An existing file stays intact until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Say what begins and how long it took; a spinner in between, in a terminal."""
    begin = time.perf_counter()
    console.print(text)
    with console.status(text):
        yield
    console.print(f"  done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
