"""Memory: what C's allocator holds free goes back to the system; where there is too little, one error with a remedy."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rana_compile.types import OutOfMemoryError

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "memoryerror",  # as Dynamo tells of one that it met
    "bad_alloc",
)


Item = TypeVar("Item")


def one_by_one(items: Iterable[Item]) -> Iterator[Item]:
    """The items; after each, what C's allocator holds free goes back to the system, where it can (glibc).

    Small results that stay, among large tensors that go, leave holes too small for the next: without this a fit of
    SmolLM2-135M held half a gigabyte more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    for item in items:
        yield item
        if trim is not None:
            trim(0)


@contextmanager
def naming_remedy(remedy: str) -> Iterator[None]:
    """Raises OutOfMemoryError with the remedy, from the error that the block met, if memory is what it lacked."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemoryError(f"out of memory ({said}); {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was lacking: ``torch.OutOfMemoryError``, a MemoryError, or torch's CPU allocator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in SIGNS)
