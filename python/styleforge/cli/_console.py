"""The terminal: progress, notes and tables on the standard error stream; results go to standard output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def stderr_console() -> Console:
    """A console on the standard error stream as it is now (tests replace the stream)."""
    return Console(stderr=True)


def note(console: Console, message: str) -> None:
    """Prints one line that is neither wrapped nor searched for markup, since it may hold a path."""
    console.print(Text.assemble(("note: ", "yellow"), message), soft_wrap=True)


class RateColumn(ProgressColumn):
    """Finished steps per second, such as ``12.3 pictures/s``."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate over the last steps, or a dash before the first one."""
        speed = task.finished_speed or task.speed
        return Text(f"{format_rate(speed)} {self._unit}s/s" if speed else f"- {self._unit}s/s", style="cyan")


def format_rate(rate: float) -> str:
    """A rate with three significant digits, as in 0.84, 12.3 and 240."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def status(console: Console, message: str) -> AbstractContextManager[object]:
    """A spinner with a message, in a terminal only."""
    return console.status(message) if console.is_terminal else nullcontext()


def progress_bar(console: Console, unit: str) -> Progress:
    """A progress bar that counts pictures or frames and vanishes when it is done; none outside a terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def print_failures(console: Console, failures: Sequence[tuple[Path, str]]) -> None:
    """Prints which files failed and why."""
    table = Table(title=f"{len(failures)} failed", title_justify="left", title_style="bold red")
    table.add_column("file", overflow="fold")
    table.add_column("problem", overflow="fold")
    for path, problem in failures:
        table.add_row(Text(str(path)), Text(problem))
    console.print(table)
