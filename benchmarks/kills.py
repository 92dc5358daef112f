"""Children that are killed for good at seeded moments of what they do.

Children are forked from a server that has imported torch, so that a try costs no import.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rana_compile.calibration", "transformers.models.llama", "torch._dynamo"])


def started(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A child in a process group of its own that does the work and exits."""
    child = _CONTEXT.Process(target=_alone, args=(work, arguments))
    child.start()
    return child


def _alone(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    work(*arguments)


def killed_after(seconds: float, work: Callable[..., Any], *arguments: Any) -> bool:
    """Whether SIGKILL, to the child and its children, came before it was done."""
    child = started(work, *arguments)
    child.join(seconds)
    running = child.is_alive()
    if running:
        kill(child)
    return running


def kill(child: BaseProcess) -> None:
    assert child.pid is not None
    os.killpg(os.getpgid(child.pid), signal.SIGKILL) if os.getpgid(child.pid) == child.pid else child.kill()
    child.join()


def finished(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds the work takes in a child. Raises RuntimeError if it fails."""
    begin = time.perf_counter()
    child = started(work, *arguments)
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{work.__name__} ended with {child.exitcode}")
    return time.perf_counter() - begin


def moments(tries: int, seconds: float, seed: int = 0) -> Iterator[float]:
    """Seeded moments, one in each of as many equal parts of the time."""
    draw = random.Random(seed)
    yield from ((i + draw.random()) / tries * seconds for i in range(tries))
