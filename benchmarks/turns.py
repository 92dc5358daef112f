"""Benchmarks that run at once prepare (load, calibrate, compile) side by side and are timed one after another.

every process: shared lock ──prepare──▶ exclusive lock, once nobody prepares ──time──▶ shared lock
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """The lock of one process, in a file that all of them name; without a file nobody waits."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a") if path else None
        self._take(fcntl.LOCK_SH)

    @contextmanager
    def timing(self) -> Iterator[None]:
        self._take(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> None:
        if self._file:
            fcntl.flock(self._file, kind)
