"""Progress of a measurement on standard error: what is being measured, how much is done, and the time left."""

import sys
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from cascadeinfer.profiling.profiler import Progress as Measured


class MeasuringBar:
    """A progress bar on a terminal. Without a terminal nothing is shown, since regular lines would only fill a log."""

    def __init__(self) -> None:
        """Not shown yet."""
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show a step of unknown duration."""
        self._bar.update(self._task, description=text, total=None, left="")

    def show(self, progress: "Measured") -> None:
        """Show the progress of the measurement."""
        minutes, seconds = divmod(round(progress.left_s), 60)
        self._bar.update(
            self._task,
            description=progress.text,
            completed=progress.done_s,
            total=progress.done_s + progress.left_s,
            left=f"{minutes}:{seconds:02d} left",
        )
