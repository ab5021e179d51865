"""What the modules' constructors check alike."""

from collections.abc import Sequence
from operator import index
from typing import Any


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f'{argument} must be one of {", ".join(choices)}, got "{value}"')


def check_pair(argument: str, value: Any, least: int) -> tuple[int, int]:
    """One or two integers as two; raises ValueError for anything else, and for one below ``least``."""
    try:
        values = [index(v) for v in value] if isinstance(value, Sequence) else [index(value)]
    except TypeError:
        values = []
    if len(values) not in (1, 2) or min(values) < least:
        raise ValueError(f"{argument} must be one or two integers >= {least}, got {value!r}")
    return values[0], values[-1]


def check_positive(argument: str, value: int) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is at least 1."""
    if value < 1:
        raise ValueError(f"{argument} must be positive, got {value}")


def check_type(argument: str, value: Any, wanted: type) -> None:
    """Raises TypeError, naming the argument, unless ``value`` is a layer of PyTorch's class ``wanted``."""
    if not isinstance(value, wanted):
        raise TypeError(f"{argument} must be an nn.{wanted.__name__}, got {type(value).__name__}")
