"""The per-user cache of built libraries, and the lock under which one process builds for all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from styleforge.build.errors import CompilerError, StyleforgeBuildError

_logger = logging.getLogger("styleforge")


@dataclass(frozen=True)
class Entry:
    """One library of the cache.

    Attributes:
        name: The folder's name: what it is and the key of everything that it was built from.
        file: The library's file name.
    """

    name: str
    file: str

    def find(self) -> Path | None:
        """The library, where it was built before; also in a cache that cannot be written."""
        for root in roots():
            path = root / self.name / self.file
            if os.path.isfile(path):  # Path.is_file raises where the folder cannot be read
                return path
        return None


def key(*parts: object) -> str:
    """A short hash of everything that a library is made of."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def forbidden() -> bool:
    """Whether ``STYLEFORGE_BUILD=0`` forbids building."""
    return os.environ.get("STYLEFORGE_BUILD", "1") == "0"


def build_once(
    entry: Entry,
    build: Callable[[Path, Path], Path],
    *,
    what: str,
    say: Callable[[str], None],
    retry: bool = True,
) -> Path:
    """The library of an entry, built now if no process has built it before.

    Args:
        entry: What to build.
        build: Called with an empty folder to build in and a log to write; returns the library that it made.
        what: The thing that is built, for the messages.
        say: Receives a line when another process is waited for.
        retry: Whether to try again what a compiler refused before.

    Returns:
        The library's path in the cache.

    Raises:
        CompilerError: A compiler failed; its log is kept in the cache.
        StyleforgeBuildError: Building is forbidden, or there is nowhere to build.
    """
    found = entry.find()
    if found is not None:
        return found
    if forbidden():
        raise StyleforgeBuildError(
            f"{what} was not built: STYLEFORGE_BUILD=0 forbids it; unset it and try again"
        )
    root = _writable_root(what)
    folder = root / entry.name
    folder.mkdir(exist_ok=True)
    library, failure, log = folder / entry.file, folder / "failed", folder / "build.log"
    try:
        with _locked(folder / "lock", lambda: say(f"another process builds {what}: waiting for it")):
            if library.is_file():  # built while this process waited
                return library
            if failure.is_file() and not retry:
                raise CompilerError(f"{failure.read_text().strip()} (not tried again: remove {failure})")
            failure.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                built = build(work, log)
            except CompilerError as error:
                failure.write_text(f"{error}\n")
                raise
            os.replace(built, library)  # whoever looks without the lock sees all of it or nothing
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StyleforgeBuildError(
            f"{what} was not built: {error}; set XDG_CACHE_HOME to a folder with room"
        ) from error
    return library


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock that the kernel takes back when the process ends, however it ends."""
    with path.open("a") as file:
        if not _try_lock(file):
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def roots() -> list[Path]:
    """The cache folders that may be read."""
    return [root for root in _roots() if _trusted(root)]


def _roots() -> list[Path]:
    """The user's cache, and the folder that stands in for it where it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification wants it
        base = os.path.expanduser("~/.cache")
    found = [Path(base) / "styleforge"] if os.path.isabs(base) else []  # a user without a home keeps the "~"
    stand_in = _stand_in()
    return [*found, stand_in] if stand_in is not None else found


def _stand_in() -> Path | None:
    try:
        return Path(tempfile.gettempdir()) / f"styleforge-{os.getuid()}"
    except OSError:  # no temporary folder can be written
        return None


def _writable_root(what: str) -> Path:
    reasons: list[str] = []
    for root in _roots():
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
            continue
        if not _trusted(root):
            reasons.append(f"{root} belongs to, or can be written by, somebody else")
            continue
        if reasons:
            _logger.warning("styleforge: %s cannot be used; building %s in %s", reasons[0], what, root)
        return root
    why = "; ".join(reasons) or "there is no home and no temporary folder"
    raise StyleforgeBuildError(
        f"{what} was not built: no folder to build in ({why}); set XDG_CACHE_HOME to one that can be written"
    )


def _trusted(root: Path) -> bool:
    """Whether what lies in a folder can only be this user's: in /tmp anybody can put one of that name."""
    if root != _stand_in():
        return True
    try:
        status = root.lstat()
    except OSError:
        return False
    private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and private
