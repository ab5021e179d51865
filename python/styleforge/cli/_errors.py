"""How commands end: one clear line and an exit code instead of a traceback.

Exit codes: 0 all done; 1 some or all of the work failed; 2 the command was used wrongly, nothing was done;
130 interrupted from the keyboard.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

FAILURE = 1
USAGE = 2
INTERRUPTED = 130


class UsageError(Exception):
    """The command cannot do what it was asked; found out before any work (exit code 2)."""


class WorkError(Exception):
    """The work itself failed (exit code 1)."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def fail(message: str, code: int) -> NoReturn:
    """Prints ``error: message`` to the standard error stream and ends the command with ``code``."""
    typer.secho("error: ", err=True, fg=typer.colors.RED, bold=True, nl=False)
    typer.echo(message, err=True)
    raise typer.Exit(code)


def with_clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Wraps a command so that every exception ends it as the module says.

    The traceback is shown as well when the command's ``debug`` argument is true or ``STYLEFORGE_DEBUG`` is
    set to anything but 0.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.get("debug")) or os.environ.get("STYLEFORGE_DEBUG", "0") not in ("", "0")
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except Exception as error:
            if debug:
                import traceback

                traceback.print_exc()
            from styleforge.io.errors import MissingPackageError

            if isinstance(error, UsageError | MissingPackageError):
                fail(one_line(error), USAGE)
            if isinstance(error, WorkError):
                fail(one_line(error), FAILURE)
            hint = "" if debug else " (--debug shows where; `styleforge info` prints what a bug report needs)"
            fail(f"{type(error).__name__}: {one_line(error)}{hint}", FAILURE)

    return wrapper
