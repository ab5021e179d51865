"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from styleforge.io.errors import MediaError


@contextmanager
def atomic_path(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` that becomes ``path`` when the block ends without an exception.

    Missing parent folders are created. The temporary name is hidden, short (so that a long file name stays
    within the file system's limit) and keeps the suffix, from which Pillow and FFmpeg take the format.

    Args:
        path: where the finished file shall lie.
        overwrite: whether a file that is there already may be replaced.

    Yields:
        The path to write to.

    Raises:
        MediaError: the folder cannot be made, or ``path`` exists and ``overwrite`` is false.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    temporary = path.with_name(f".styleforge-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        if not overwrite and path.exists():
            raise MediaError("the output file appeared while the work was going on; it was left as it is")
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise MediaError(f"cannot write: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
