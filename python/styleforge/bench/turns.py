"""Several benchmarks at once: all prepare at the same time, then one after the other has the machine alone.

Nearly all the time of a benchmark against torch.compile is compiling, on one core of the host. Processes that
name the same file share its lock while they prepare, and each takes it for itself to measure: it gets it
when none prepares and none measures. The system gives a lock back when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


class Turns:
    """From its making to ``alone`` others may work as well; from ``alone`` to ``done`` nobody else does."""

    def __init__(self, file: Path | None) -> None:
        """With no file there are no others.

        Args:
            file: made where it is missing; holds the numbers of the processes that have prepared.
        """
        self.with_others = file is not None
        self._lock: IO[str] | None = None
        if file is not None:
            self._lock = file.open("a")
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def alone(self) -> None:
        """Waits for this process's turn."""
        if self._lock is not None:
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def done(self) -> None:
        """Lets the next one measure."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def prepared(file: Path) -> set[int]:
    """The processes that have come to ``alone``."""
    return set(map(int, file.read_text().split())) if file.exists() else set()
