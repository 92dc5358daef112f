"""``rana-compile``: the same functions from a shell.

Results go to standard output (``--json``: one JSON document), progress and remarks to standard error.
Exit status: 0 done; 1 done, but a check that was asked for failed; 2 the input is not acceptable; 3 it could not be
done; 130 interrupted. A command is a module of this package with ``run(settings, screen) -> int``, imported when asked.
"""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module

from rana_compile.cli.arguments import parser
from rana_compile.interrupts import interrupts_remembered, raise_swallowed
from rana_compile.memory import is_out_of_memory
from rana_compile.types import ConfigError, PlanError, RanaError

DONE, CHECK_FAILED, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    settings = parser().parse_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported: one bar is enough, and it is ours
    try:
        return _run(settings)
    except BaseException as error:
        if _is_interrupt(error):
            return _failed(settings, "interrupted", INTERRUPTED)
        if settings.debug or not isinstance(error, Exception):
            raise
        return _failed(settings, _told(error), BAD_INPUT if isinstance(error, ConfigError | PlanError) else FAILED)


def _run(settings: argparse.Namespace) -> int:
    from rana_compile.cli.screen import Screen

    with interrupts_remembered():
        command = import_module(f"rana_compile.cli.{settings.command}")
        raise_swallowed()
        return int(command.run(settings, Screen(settings.json, settings.quiet)))


def _failed(settings: argparse.Namespace, text: str, status: int) -> int:
    from rana_compile.cli.screen import Screen

    return Screen(settings.json, settings.quiet).failed(text, status)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: an import that it interrupts may end in another error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _told(error: Exception) -> str:
    """What to say of an error; ours say what to do, of others the kind helps."""
    text = str(error) if isinstance(error, RanaError) else f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        text += " (fewer --tokens, a shorter --length, --dtype bfloat16 or a smaller model need less)"
    return text if isinstance(error, RanaError) else f"{text} (--debug shows where)"
