"""Whether a kernel pays: measured once per shape and machine, kept in a file beside the CPU kernels."""

import json
import logging
import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple

from rana_compile.files import replacing
from rana_compile.types import WriteError

log = logging.getLogger(__name__)
_LOCK = threading.Lock()


class Measured(NamedTuple):
    """Microseconds with half of the coordinates live, with all, and of the library's product."""

    cut: tuple[int, ...]  # how the kernel cuts its work; empty where there is no choice
    half: float
    full: float
    dense: float

    def masked(self, density: float) -> float:
        """Microseconds with this share of the coordinates live."""
        return self.full - (self.full - self.half) * 2 * (1 - density)


def kept(file: Path, measure: Callable[[], Measured], cut: int = 0, among: Container[int] | None = None) -> Measured:
    """What an earlier process kept in ``file``, else what ``measure`` says, kept there.

    ``cut``: of so many numbers, ``among`` which they are, if not any.
    """
    with _LOCK:  # what is measured beside another thread's is not what it takes
        found = _read(file, cut, among)
        if found is None:
            found = measure()
            try:
                with replacing(file) as temporary:  # processes may race
                    temporary.write_text(json.dumps(found), encoding="utf-8")
            except WriteError as error:
                log.warning("%s: measured again by the next process", error)
        return found


def _read(file: Path, length: int, among: Container[int] | None) -> Measured | None:
    """None, too, if it is not what a process writes."""
    try:
        cut, *times = json.loads(file.read_text(encoding="utf-8"))
        half, full, dense = map(float, times)
        known = among is None or all(n in among for n in cut)
        if len(cut) != length or not known or not half + full + dense > 0:
            raise ValueError(f"a cut of {len(cut)} numbers, {length} expected, or no times")
        return Measured(tuple(map(int, cut)), half, full, dense)
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        log.warning("%s cannot be read (%s): measuring again", file, error)
        return None
