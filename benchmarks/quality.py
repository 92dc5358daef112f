"""Quality of our recipes and of rival methods at equal realised cost, in one run, masks on for every scored token.

    python benchmarks/quality.py --other novel.txt --out out/quality
    python benchmarks/quality.py --model path/to/gemma --other novel.txt --budgets 0.6

Calibrated on one domain (Python's own documentation), measured on held-out windows of it and on a second one.
Nothing is fine-tuned. Prints one table for each budget, writes quality.csv and quality.png.
"""

import argparse
import csv
import html
import math
import re
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from inputs import load_smollm2, pydoc_topics, sample_windows
from rich.console import Console
from rich.table import Table
from rivals import Teal, cats, global_without_correction, rank, svd, uniform_loss, uniform_token, wina
from torch import Tensor, nn

import rana_compile
from rana_compile import ConfigError, Plan
from rana_compile.adapters import FAMILIES
from rana_compile.calibration import Session, calibration
from rana_compile.correction import Target
from rana_compile.flops import total_dense_flops
from rana_compile.learning import LEARNING_STEPS
from rana_compile.loading import load_causal
from rana_compile.passes.interpret import Handler
from rana_compile.passes.record import Adapted, dense_handler
from rana_compile.text import mean_nll, with_bos

NOT_REFITTED = "the same, thresholds not refitted"
LEARNT = "and thresholds learnt together"
SLOPE = 0.4  # about what the share of FLOPs falls by where thresholds grow by a factor e
console = Console(width=150)


@dataclass(frozen=True)
class Row:
    """One method at one budget. Increases are nats per token over the dense model on the same tokens.

    With --equal-cost every method realises what was asked, on each domain: all of its thresholds times one factor.
    """

    method: str
    asked: float
    kept: float  # of the included linears' FLOPs, realised on the calibrated domain's held-out text as scored
    kept_other: float
    increase: float
    increase_other: float
    divergence: float  # KL(dense ‖ adapted)
    divergence_other: float
    greedy: float  # share of the dense model's greedy continuation that is the adapted model's choice too
    predicted_increase: float  # plan.loss_increase
    seconds: float
    dense: float  # loss of the dense model
    dense_other: float


def main() -> None:
    settings = parse_arguments()
    if settings.tables:
        return show(read(settings.tables), settings.out)
    torch.manual_seed(0)
    model, tokenizer = load(settings.model)
    model.to(settings.device)
    windows = -(-settings.calibration_tokens // settings.length)
    fit_on = pydoc_topics(tokenizer, settings.length, windows, 1, settings.seed)[0]
    held_out = pydoc_topics(tokenizer, settings.length, 1, settings.windows)[1]
    other = sample_windows(tokenizer, [text_of(settings.other)], settings.length, settings.windows)
    fit_on, held_out, other = (with_bos(tokenizer, w).to(settings.device) for w in (fit_on, held_out, other))
    if settings.own_tokens:
        own = rana_compile.own_text(model, settings.own_tokens, settings.length, settings.seed)
        order = torch.randperm(len(fit_on) + len(own), generator=torch.Generator().manual_seed(settings.seed))
        fit_on = torch.cat([fit_on, *own])[order.to(fit_on.device)]
    reference = Reference(model, tokenizer, held_out, other, settings.generated, settings.equal_cost)
    rows = []
    for name, recipe, asked, session in methods(model, fit_on, settings):
        begin = time.perf_counter()
        try:
            steps = settings.learning_steps if name.startswith("ours") or name == LEARNT else 0
            plan = session.fit(Target("flops", asked), recipe, name != NOT_REFITTED, steps)
        except ConfigError as error:
            console.print(f"{name} at {asked:.0%}: {error}", highlight=False)
            continue
        seconds = time.perf_counter() - begin
        rows.append(reference.measured(name, asked, plan, seconds, session))
        increases = f"+{rows[-1].increase:.4f} / +{rows[-1].increase_other:.4f} nats"
        console.print(f"{name} at {asked:.0%}: {increases}, KL {rows[-1].divergence:.4f}", highlight=False)
        write(rows, settings.out)
    show(rows, settings.out)
    console.print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def show(rows: list[Row], out: Path) -> None:
    for asked in sorted({r.asked for r in rows}, reverse=True):
        print_table([r for r in rows if r.asked == asked], asked)
    plot(rows, out)


def read(files: list[Path]) -> list[Row]:
    """Rows of earlier runs, each with its file's settings."""
    rows = []
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            read_rows = list(csv.DictReader(file))
        try:
            rows += [Row(r.pop("method"), **{k: float(v) for k, v in r.items()}) for r in read_rows]
        except (TypeError, KeyError) as error:
            raise SystemExit(f"{path} is no quality.csv of this version ({error}); measure it again") from None
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, or a directory (config or one GGUF file, tokenizer)"
    )
    parser.add_argument("--other", type=Path, help="text file, or directory of HTML files: second domain")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.6, 0.56, 0.5])
    parser.add_argument("--methods", nargs="+", help="only these rows")
    parser.add_argument("--ablation", action="store_true", help="what each ingredient brings, instead of the rivals")
    parser.add_argument("--include", nargs="*", help="adapt only these (glob patterns over parameter names)")
    parser.add_argument("--exclude", nargs="*", default=["lm_head"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--own-tokens", type=int, default=0, help="calibrate on as many of the model's own text too")
    parser.add_argument(
        "--learning-steps", type=int, default=LEARNING_STEPS, help="in which thresholds of our plans move together"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the text to fit on and of the fits; not of the held-out"
    )
    parser.add_argument("--equal-cost", action="store_true", help="scale thresholds to the asked cost on each domain")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of each domain")
    parser.add_argument("--generated", type=int, default=256, help="tokens of the greedy continuation")
    parser.add_argument("--tables", type=Path, nargs="+", help="measure nothing: tables and plot of these quality.csv")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    settings = parser.parse_args()
    if not (settings.other or settings.tables):
        parser.error("--other is needed: the text of a second domain")
    return settings


def load(name: str) -> tuple[Any, Any]:
    if name == "smollm2":
        return load_smollm2()
    return load_causal(name)


def text_of(path: Path) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="ignore")
    pages = [p.read_text(encoding="utf-8", errors="ignore") for p in sorted(path.glob("*.html"))]
    bodies = [re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", page) for page in pages]
    return "\n\n".join(re.sub(r"\s+", " ", html.unescape(body)) for body in bodies)


def methods(
    model: nn.Module, fit_on: Tensor, settings: argparse.Namespace
) -> Iterator[tuple[str, Any, float, Session]]:
    """(name, recipe, budget, session to fit in) for every row; what all share is recorded once."""
    rivals: dict[str, Any] = {"WINA": wina, "TEAL": Teal(model, fit_on[:1, :256]), "CATS": cats, "SVD": svd}
    own = "ours, own text too" if settings.own_tokens else "ours"
    ours: dict[str, Any] = {own: "auto", f"{own}, neuron adapters alone": "neuron"}
    if settings.include:
        rivals = {"WINA": wina, "RaNA's rank adapter": rank}
    if settings.ablation:
        rivals = {
            "uniform, |x|·‖W col‖": wina,
            "loss-aware": uniform_loss,
            "and by token": uniform_token,
            "and global": global_without_correction,
        }
        ours = {"and corrected": "neuron", "and all families": "auto", LEARNT: "auto", NOT_REFITTED: "auto"}
    papers: dict[str, Any] = {} if settings.ablation or settings.include else {"RaNA": "rana"}
    for recipes, separate in ((rivals | ours, False), (papers, True)):
        wanted = {name: recipe for name, recipe in recipes.items() if not settings.methods or name in settings.methods}
        if not wanted:
            continue
        batches = fit_on.split(1)
        patterns = settings.include, settings.exclude
        fits = len(wanted) * len(settings.budgets)
        with calibration(
            model, batches, *patterns, settings.seed, progress=False, separate_gates=separate, fits=fits
        ) as session:
            for asked in settings.budgets:
                for name, recipe in wanted.items():
                    yield name, recipe, asked, session


class Reference:
    """The dense model on both domains, and its greedy continuation of held-out text."""

    def __init__(
        self, model: Any, tokenizer: Any, held_out: Tensor, other: Tensor, generated: int, equal_cost: bool
    ) -> None:
        self.model, self.domains, self.equal_cost = model, (held_out, other), equal_cost
        self.prompt = held_out[0, :32]
        self.continued = model.generate(
            self.prompt[None], max_new_tokens=generated, min_new_tokens=generated, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        self.loss = [mean_nll(model, windows) for windows in self.domains]

    def measured(self, name: str, asked: float, plan: Plan, seconds: float, session: Session) -> Row:
        kept, increases, divergences = [], [], []
        for windows in self.domains:
            increase = divergence = 0.0
            factor = self._factor(asked, plan, windows, session) if self.equal_cost else 1.0
            handler = handler_of(plan, factor)
            for window in windows:
                p, q = (self._logits(session, each, window).log_softmax(-1) for each in (dense_handler, handler))
                increase += float((p - q)[:-1].gather(1, window[1:, None]).mean())
                divergence += float((p.exp() * (p - q)).sum(-1).mean())
            kept.append(kept_of(plan, handler))
            increases.append(increase / len(windows))
            divergences.append(divergence / len(windows))
        greedy = self._agreement(session, handler_of(plan))
        predicted = math.nan if plan.loss_increase is None else plan.loss_increase
        return Row(name, asked, *kept, *increases, *divergences, greedy, predicted, seconds, *self.loss)  # type: ignore[call-arg]

    def _factor(self, asked: float, plan: Plan, windows: Tensor, session: Session) -> float:
        """Of the thresholds, so that these windows cost what was asked."""
        logarithm = 0.0
        for _ in range(3):
            handler = handler_of(plan, math.exp(logarithm))
            for window in windows[::2]:
                self._logits(session, handler, window)
            logarithm += (kept_of(plan, handler) - asked) / SLOPE
        return math.exp(logarithm)

    def _logits(self, session: Session, handler: Handler, ids: Tensor) -> Tensor:
        """[length, vocabulary]: one forward pass without a cache, masks on for every token."""
        return session.run_with(handler, {"input_ids": ids[None], "use_cache": False}).logits[0].detach()

    def _agreement(self, session: Session, handler: Adapted) -> float:
        """Of the dense model's own greedy continuation, given as context, the share that is chosen again."""
        choices = self._logits(session, handler, self.continued[0, :-1]).argmax(-1)
        start = len(self.prompt) - 1
        return float((choices[start:] == self.continued[0, start + 1 :]).float().mean())


def handler_of(plan: Plan, factor: float = 1.0) -> Adapted:
    """The plan's adapters, all thresholds times a factor."""
    adapters = {}
    for s in plan.adapted:
        family, tensors = FAMILIES[s.family], s.tensors
        for i in range(len(s.live)):
            tensors = family.scaled(tensors, i, factor)
        adapters[s.site] = (s.family, tensors)
    return Adapted(adapters)


def kept_of(plan: Plan, handler: Adapted) -> float:
    """Share of the sites' FLOPs that a handler computed so far."""
    sites = [s.site for s in plan.sites]
    return sum(map(handler.flops, sites)) / total_dense_flops(sites)


def print_table(rows: list[Row], asked: float) -> None:
    table = Table(
        title=f"asked {asked:.0%} of the included linears' FLOPs; dense loss {rows[0].dense:.3f} / "
        f"{rows[0].dense_other:.3f} nats"
    )
    header = ("method", "kept", "kept, other", "loss +", "other +", "KL", "KL, other", "greedy", "predicted", "fit, s")
    for column in header:
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in sorted(rows, key=lambda r: r.increase + r.increase_other):
        table.add_row(
            r.method, f"{r.kept:.1%}", f"{r.kept_other:.1%}", f"{r.increase:.4f}", f"{r.increase_other:.4f}",
            f"{r.divergence:.4f}", f"{r.divergence_other:.4f}", f"{r.greedy:.1%}", f"{r.predicted_increase:.4f}",
            f"{r.seconds:.0f}",
        )  # fmt: skip
    console.print(table)


def write(rows: list[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "quality.csv.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    temporary.replace(out / "quality.csv")


def plot(rows: list[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, kept, increase, title in (
        (axes[0], "kept", "increase", "held-out, calibrated domain"),
        (axes[1], "kept_other", "increase_other", "other domain"),
    ):
        for method in dict.fromkeys(r.method for r in rows):
            mine = sorted((r for r in rows if r.method == method), key=lambda r: r.asked)
            axis.plot([getattr(r, kept) for r in mine], [getattr(r, increase) for r in mine], "o-", label=method)
        axis.set(title=title, xlabel="FLOPs kept, realised", yscale="log", ylim=(1e-3, 6))
    axes[0].set_ylabel("loss increase, nats per token")
    axes[1].legend(bbox_to_anchor=(1, 1))
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "quality.png", dpi=120)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
