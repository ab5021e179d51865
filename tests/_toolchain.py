"""Stand-ins for compilers and machines, as small shell scripts and sources."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def nvcc(path: Path, version: str) -> Path:
    """An nvcc that knows its version and nothing else."""
    return script(
        path,
        f'[ "$1" = --version ] && {{ echo "Cuda compilation tools, release x, V{version}"; exit 0; }}\n'
        'echo "nvcc fatal : this one only knows its version"; exit 1',
    )


def _call(function: Callable[[], Any], results: Any) -> None:
    try:
        results.put(str(function()))
    except BaseException as error:
        results.put(f"{type(error).__name__}: {error}")


def at_once(function: Callable[[], Any], processes: int) -> list[str]:
    """What a function returns, or raises, in that many processes at the same time."""
    context = multiprocessing.get_context("fork")  # the function need not be importable
    results = context.Queue()
    started = [context.Process(target=_call, args=(function, results)) for _ in range(processes)]
    for process in started:
        process.start()
    texts = [results.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    return texts


def path_with(folder: Path) -> str:
    """``PATH`` with a folder in front."""
    return f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
