"""What a reader sees of a plan: one table in the terminal, printed by ``str(plan)``."""

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rana_compile.plan import Plan, SitePlan
    from rana_compile.types import Skipped

WIDTH = 120


def plan_text(plan: "Plan") -> str:
    """The plan as a table per site, the totals, and what was skipped and why."""
    columns = ("site", "family", "rank", "mean live", "FLOPs kept", "error")
    title = f"rana_compile plan ({plan.info.get('recipe', '?')})"
    quality = (("predicted loss increase", plan.loss_increase), ("divergence", plan.info.get("divergence")))
    told = ", ".join(f"{name} {nats:.4f}" for name, nats in quality if nats is not None)
    lines = [totals(plan), *([f"on held-back batches, nats per token: {told}"] if told else [])]
    lines += [f"never on: {s.site.name}, whose mask let nothing through" for s in plan.dead]
    return table_text(title, columns, ("site", "family"), map(site_cells, plan.sites), "\n".join(lines), plan.skipped)


def table_text(
    title: str,
    columns: Sequence[str],
    left: Sequence[str],
    rows: Iterable[tuple[str, ...]],
    summary: str,
    skipped: Sequence["Skipped"],
) -> str:
    """A table, a summary below it, and what was left alone and why."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=WIDTH)
    console.print(table)
    console.print(summary, soft_wrap=True)
    for entry in skipped:
        console.print(f"skipped {entry.name}: {entry.reason}", soft_wrap=True, markup=False)
    text = console.file
    assert isinstance(text, StringIO)
    return text.getvalue().rstrip()


def totals(plan: "Plan") -> str:
    """One line: sites, and FLOPs asked and realised."""
    return (
        f"{len(plan.adapted)} of {len(plan.sites)} sites adapted; FLOPs kept {plan.flops_kept:.1%} "
        f"(asked {plan.flops_asked:.1%}) of the included sites, {plan.flops_kept_model:.1%} of all linears"
    )


def site_cells(entry: "SitePlan") -> tuple[str, ...]:
    """A site's line in a table: name, family, rank, mean live, FLOPs kept, predicted divergence."""
    basis = entry.tensors.get("output_basis")
    rank = "" if basis is None else str(basis.shape[1])
    live = "" if entry.family == "dense" else " + ".join(f"{n:.0f}" for n in entry.live)
    return entry.site.name, entry.family, rank, live, f"{entry.flops_kept:.1%}", f"{entry.error:.2e}"
