"""Lets an allocation fail that the machine has no memory for.

Linux grants more memory than there is and later kills the process that uses it, without a word to the
user. With the address space limited to what is there, PyTorch's allocation fails instead, and the command
can say what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def meminfo(path: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """Bytes by name, such as ``MemAvailable``; empty where the system has no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    # "MemTotal:       24588888 kB"; a few lines count pages and have no unit.
    fields = (line.split() for line in lines)
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[2:] == ["kB"]}


def available_memory() -> int | None:
    """Bytes that this process may still use, or None where that is unknown.

    Free memory and swap, within the container's limit.
    """
    memory = meminfo()
    if "MemAvailable" not in memory:
        return None
    available = memory["MemAvailable"] + memory.get("SwapFree", 0)
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max", no number, where there is no limit
        available = min(available, max(0, limit - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return available


@contextmanager
def limited_to_available_memory(available: int | None = None) -> Iterator[None]:
    """Inside the block, memory beyond what the machine has cannot be allocated. Does nothing but on Linux.

    Not for work on a GPU: CUDA reserves far more address space than it uses.

    Args:
        available: bytes that may be allocated; None asks the system.
    """
    available = available_memory() if available is None else available
    if sys.platform != "linux" or available is None:
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [used + available] + [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
