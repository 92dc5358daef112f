"""Where a command's words go: the result to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

from rana_compile.progress import Progress

WIDTH = 120  # where standard output is no terminal


class Screen:
    """``json``: the result is one document for machines. ``quiet``: results and errors only."""

    def __init__(self, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet
        width = None if sys.stdout.isatty() else WIDTH
        self.out = Console(width=width, highlight=False)
        self.remarks = Console(stderr=True, quiet=quiet, highlight=False)

    def result(self, document: Mapping[str, Any], shown: RenderableType) -> None:
        if self.json:
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        elif isinstance(shown, str):
            sys.stdout.write(shown + "\n")
        else:
            self.out.print(shown)

    def say(self, text: str) -> None:
        self.remarks.print(text, markup=False, soft_wrap=True)

    def failed(self, text: str, status: int) -> int:
        """One line on standard error, and as a document where one is expected. Returns the status."""
        Console(stderr=True, highlight=False).print(f"rana-compile: {text}", markup=False, soft_wrap=True, style="red")
        if self.json:
            sys.stdout.write(json.dumps({"error": text, "status": status}) + "\n")
        return status

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A spinner, in a terminal."""
        with self.remarks.status(text):
            yield

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Any]:
        """Yields a function to call after each step of one bar."""
        with Progress(not self.quiet, total) as bar:
            bar.say(text)
            yield bar.step
