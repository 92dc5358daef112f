"""Faults and bad input, many times, and whether anything was lost: the table of docs/reliability.md.

    python benchmarks/reliability.py                      # all cases; writes the table into the page
    python benchmarks/reliability.py --only kill_while_saving --tries 100     # and this row of it
    python benchmarks/reliability.py --quick              # each case twice; the page stays as it is

A case is a function of ``outcome.Case`` in a tuple ``CASES``. Exit status 1 if anything was lost in any of them.
"""

import argparse
import datetime
import json
import logging
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import bad_inputs
import endurance
import faults
import interrupts
import torch
from outcome import Case, Outcome
from rich.console import Console
from rich.table import Table

from rana_compile.files import replacing

CASES: tuple[Case, ...] = (*faults.CASES, *interrupts.CASES, *bad_inputs.CASES, *endurance.CASES)
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->\n"
console = Console(width=120, highlight=False)


def main() -> int:
    settings = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background job would ignore it
    logging.getLogger("rana_compile").setLevel(logging.ERROR)  # warnings are what many cases are made to cause
    chosen = [case for case in CASES if not settings.only or name_of(case) in settings.only]
    outcomes = []
    for case in chosen:
        begin = time.perf_counter()
        outcomes.append(outcome := run(case, 2 if settings.quick else settings.tries))
        console.print(f"{outcome.lost} of {outcome.tries} lost, {time.perf_counter() - begin:.0f} s: {outcome.name}")
    console.print(shown(outcomes))
    document = {"when": str(datetime.date.today()), "machine": machine(), "cases": [asdict(o) for o in outcomes]}
    with replacing(settings.json) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if not settings.quick:
        write_page(outcomes, rows_of_page() if settings.only else {})
    return int(any(outcome.lost for outcome in outcomes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make faults happen and count what is lost.")
    parser.add_argument("--tries", type=int, default=20, help="of each fault (20)")
    parser.add_argument("--only", nargs="+", choices=[name_of(case) for case in CASES], metavar="NAME", help="of cases")
    parser.add_argument("--quick", action="store_true", help="two tries each; the page stays as it is")
    parser.add_argument("--json", type=Path, default=Path("out/reliability.json"), help="the rows, for machines")
    return parser.parse_args()


def name_of(case: Case) -> str:
    return str(getattr(case, "__name__", case))


def run(case: Case, tries: int) -> Outcome:
    """A case that fails itself has lost every try: nothing is known of them."""
    with tempfile.TemporaryDirectory(prefix="reliability_") as directory:
        try:
            return case(tries, Path(directory))
        except Exception as error:
            traceback.print_exc()
            return Outcome(name_of(case), tries, tries, f"{type(error).__name__} in the case itself")


def shown(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="faults and bad input")
    for column in ("fault or input", "tries", "outcome", "lost"):
        table.add_column(column, justify="right" if column in ("tries", "lost") else "left")
    for o in outcomes:
        table.add_row(o.name, str(o.tries), o.seen, f"[red]{o.lost}[/]" if o.lost else "0")
    return table


def rows_of_page() -> dict[str, str]:
    """The rows that the page has, by their names."""
    table = PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def write_page(outcomes: Sequence[Outcome], rows: dict[str, str]) -> None:
    """Put the table between the page's marks: the rows, those of the outcomes anew."""
    rows = rows | {o.name: f"| {o.name} | {o.tries:,} | {o.seen} | {o.lost} |" for o in outcomes}
    head = [f"Up to {datetime.date.today()}, {machine()}:", "", "| fault or input | tries | outcome | lost |"]
    table = "\n".join([*head, "|---|---:|---|---:|", *rows.values()]) + "\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    with replacing(PAGE) as temporary:
        temporary.write_text(before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


def machine() -> str:
    cores = {1: "one core", 2: "two cores"}.get(torch.get_num_threads(), f"{torch.get_num_threads()} cores")
    return f"{platform.system()}, {cores}, torch {torch.__version__.partition('+')[0]}"


if __name__ == "__main__":
    sys.exit(main())
