"""Ctrl-C where something must be put back as it was, and where code in C would swallow it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


def to_the_end(restore: Callable[[], None]) -> None:
    """Restore what may be restored twice. A Ctrl-C in the middle of it is raised when it is done."""
    try:
        restore()
    except KeyboardInterrupt:
        restore()
        raise


class Remembering:
    """A handler of Ctrl-C: raises it as Python does, and knows that it came."""

    seen = False

    def __call__(self, number: int, frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


@contextmanager
def interrupts_remembered() -> Iterator[None]:
    """A Ctrl-C that is swallowed is raised at the next ``raise_swallowed``, or for another error that ends the block.

    Code in C swallows one, as torch does while it imports numpy, and so do destructors. Only in the main thread and in
    place of Python's own handler; else nothing is changed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return
    handler = Remembering()
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except BaseException as error:
        if handler.seen and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_swallowed() -> None:
    """Raise a Ctrl-C that came within ``interrupts_remembered``: who still runs did not hear of it.

    Raises:
        KeyboardInterrupt: one came.
    """
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Remembering) and handler.seen and current_thread() is main_thread():
        raise KeyboardInterrupt
