"""``rana-compile``: the same functions from a shell.

Results go to standard output (``--json``: one JSON document), progress and remarks to standard error.
Exit status: 0 done; 1 done, but a check that was asked for failed; 2 the input is not acceptable; 3 it could not be
done; 130 interrupted. A command is a module of this package with ``run(settings, screen) -> int``, imported when asked.
"""

import os
from collections.abc import Sequence
from importlib import import_module

from rana_compile.cli.arguments import parser
from rana_compile.types import ConfigError, PlanError, RanaError

DONE, CHECK_FAILED, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    settings = parser().parse_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported: one bar is enough, and it is ours
    from rana_compile.cli.screen import Screen

    screen = Screen(settings.json, settings.quiet)
    try:
        command = import_module(f"rana_compile.cli.{settings.command}")
        return int(command.run(settings, screen))
    except KeyboardInterrupt:
        return screen.failed("interrupted", INTERRUPTED)
    except Exception as error:
        if settings.debug:
            raise
        return screen.failed(_told(error), BAD_INPUT if isinstance(error, ConfigError | PlanError) else FAILED)


def _told(error: Exception) -> str:
    """What to say of an error; ours say what to do, of others the kind helps."""
    if isinstance(error, RanaError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if "out of memory" in text or isinstance(error, MemoryError):
        text += " (fewer --tokens, a shorter --length, --dtype bfloat16 or a smaller model need less)"
    return f"{text} (--debug shows where)"
