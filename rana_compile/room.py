"""Room on the interpreter's stack for what a compiled graph calls.

CPython keeps frames in chunks of 16 KiB. A frame that does not fit is put into a new chunk, which is mapped for it and
unmapped when it returns: 7 us and more. A graph that launches kernels through Python, and whose own frame ends right
before a border, pays that at every launch: 9.9 ms instead of 5.9 on an H100, for a prompt of a small model, of 183
kernels, with 366 chunks mapped. Whether it does follows from how many values the graph has and how deep its caller is,
so that any change may bring it about (python/cpython#142183; releases of CPython 3.13 and 3.14 since March 2026 keep
the last chunk, 3.11 and 3.12 do not).
"""

from collections.abc import Callable
from typing import Any

# A chunk's size is the least power of two that leaves 1000 slots beside the frame it is mapped for. A frame of just
# over 512 KiB gets 1 MiB, of which almost half is left: as much as 65,000 local variables take, and too little for
# another such frame, should one function with room call another. What is not used is never touched, so costs nothing.
_SLOTS = 2**19 // 8


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called so that frames of up to 500 KiB below it cross no border of the interpreter's stack.

    It costs one new chunk a call, 5 to 10 us: only for what calls very much. Frame objects of it count as 512 KiB.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=_SLOTS)
    return call
