"""What a case of the table in docs/reliability.md gives, and how it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """One row.

    Attributes:
        name: the fault, or the input.
        tries: how often it was made to happen; a case may make fewer than it was asked for, where one takes minutes.
        lost: tries after which something was broken, lost or wrong, or an error unclear.
        seen: what happened instead of a loss, in a few words.
    """

    name: str
    tries: int
    lost: int
    seen: str


Case = Callable[[int, Path], Outcome]  # (tries asked for, an empty directory of its own)
