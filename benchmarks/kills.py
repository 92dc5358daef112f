"""Children that are killed for good at seeded moments of what they do.

Children are forked from a server that has imported torch, so that a try costs no import.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers in the server
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


def kill(child: BaseProcess) -> bool:
    """SIGKILL to the child and its children. Whether it was still at work."""
    running = child.is_alive()
    assert child.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()
    return running


def killed_after(seconds: float, work: Callable[..., Any], *arguments: Any) -> bool:
    """Whether SIGKILL came before the work was done."""
    child = started(work, *arguments)
    child.join(seconds)
    return kill(child)


def finished(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that the work takes in a child. Raises RuntimeError if it fails."""
    begin = time.perf_counter()
    child = started(work, *arguments)
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{work.__name__} ended with {child.exitcode}")
    return time.perf_counter() - begin


def succeeds(work: Callable[..., Any], *arguments: Any) -> bool:
    """Whether the work ends well in a child."""
    child = started(work, *arguments)
    child.join()
    return child.exitcode == 0


def moments(tries: int, seconds: float, seed: int = 0) -> Iterator[float]:
    """Seeded moments, one in each of as many equal parts of the time."""
    draw = random.Random(seed)
    yield from ((i + draw.random()) / tries * seconds for i in range(tries))


def silenced(log: Path) -> None:
    """What this process prints from now on goes to the end of a file."""
    stream = log.open("a", encoding="utf-8")
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(stream.fileno(), descriptor)


def temporaries(directory: Path) -> list[str]:
    """What writes in progress, or killed ones, left in a directory."""
    return [path.name for path in directory.iterdir() if path.name.endswith(".tmp")]
