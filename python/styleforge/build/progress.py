"""What a build tells the user, on the standard error stream."""

from __future__ import annotations

import re
import sys

_STEP = re.compile(r"^\[(\d+)/(\d+)\]")


class Progress:
    """One line for a build: rewritten with ninja's count on a terminal, at start and end elsewhere."""

    def __init__(self, what: str, verbose: bool) -> None:
        self._what = what
        self._verbose = verbose
        self._live = verbose and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._verbose:
            print(f"styleforge: {text}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """A line of a build tool's output."""
        step = _STEP.match(text)
        if step and self._live:
            print(f"\rstyleforge: {self._what}: {step[1]} of {step[2]} ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the rewritten line."""
        if self._live:
            print(file=sys.stderr, flush=True)
