"""Out of memory, as torch, its allocator or Python say it → one error that says what needs less."""

from collections.abc import Iterator
from contextlib import contextmanager

from rana_compile.types import OutOfMemoryError

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "memoryerror",  # as Dynamo tells of one that it met
    "bad_alloc",
)


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
