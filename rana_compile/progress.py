"""One progress bar with one overall estimate, on standard error; silent when asked."""

from types import TracebackType

from rana_compile.interrupts import raise_swallowed


class Progress:
    """``step`` moves the bar and raises a Ctrl-C that was swallowed, ``say`` names the stage. A context manager."""

    def __init__(self, shown: bool, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> "Progress":
        if not self._bar.disable:  # in older versions of rich a hidden bar leaves an empty line
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def say(self, stage: str) -> None:
        self._bar.update(self._task, description=stage)

    def expect(self, steps: int) -> None:
        """More steps than was known at first."""
        self._bar.update(self._task, total=(self._bar.tasks[self._task].total or 0) + steps)

    def step(self, steps: int = 1) -> None:
        raise_swallowed()
        self._bar.advance(self._task, steps)
