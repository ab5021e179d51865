"""What the modules' constructors check alike."""

from collections.abc import Sequence


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f'{argument} must be one of {", ".join(choices)}, got "{value}"')
