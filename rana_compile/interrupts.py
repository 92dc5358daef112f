"""Ctrl-C where something must be put back as it was."""

from collections.abc import Callable


def to_the_end(restore: Callable[[], None]) -> None:
    """Restore what may be restored twice. A Ctrl-C in the middle of it is raised when it is done."""
    try:
        restore()
    except KeyboardInterrupt:
        restore()
        raise
