"""Whether a masked product pays: measured once per shape and machine, kept in a file beside the CPU kernels."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rana_compile.files import replacing
from rana_compile.types import WriteError

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """Microseconds with half of the coordinates live, with all, and of the library's product."""

    cut: tuple[int, ...]  # how the kernel cuts its work; empty where there is no choice
    half: float
    full: float
    dense: float

    def masked(self, density: float) -> float:
        """Microseconds with this share of the coordinates live."""
        return self.full - (self.full - self.half) * 2 * (1 - density)


def kept(file: Path, measure: Callable[[], Measured]) -> Measured:
    """What an earlier process kept in ``file``, else what ``measure`` says, which is kept there."""
    found = _read(file)
    if found is None:
        found = measure()
        try:
            with replacing(file) as temporary:  # processes may race
                temporary.write_text(json.dumps(found), encoding="utf-8")
        except WriteError as error:
            log.warning("%s: measured again by the next process", error)
    return found


def _read(file: Path) -> Measured | None:
    """None, too, if it is not what a process writes."""
    try:
        cut, half, full, dense = json.loads(file.read_text(encoding="utf-8"))
        return Measured(tuple(map(int, cut)), float(half), float(full), float(dense))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        log.warning("%s cannot be read (%s): measuring again", file, error)
        return None
