"""What ``fuse`` did, for people and for tests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fused:
    """One place where an operator took over.

    Attributes:
        operator: its name, "fused_conv_instance_norm_relu", say.
        module: path of the module whose forward calls it now.
        parts: the layers and functions that it stands for, in order, by path or name.
    """

    operator: str
    module: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' > '.join(self.parts)}: {self.operator}"


@dataclass(frozen=True)
class NotFused:
    """One layer, function or module that was looked at and left.

    Attributes:
        name: path or name.
        kind: its type.
        reason: in a few words.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason}"


@dataclass
class FusionReport:
    """What was fused, what was not and why; ``print(report)`` shows both as lists.

    Attributes:
        fused: in the order of the network.
        not_fused: convolutions, norms, attentions and feed-forward networks without an operator, and modules
            whose forward could not be followed (their submodules are treated one by one).
    """

    fused: list[Fused] = field(default_factory=list)
    not_fused: list[NotFused] = field(default_factory=list)

    def count(self, operator: str | None = None) -> int:
        """How many places were fused, with one operator or with any."""
        return sum(operator is None or entry.operator == operator for entry in self.fused)

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}", *(f"  {entry}" for entry in self.fused)]
        lines += [f"not fused: {len(self.not_fused)}", *(f"  {entry}" for entry in self.not_fused)]
        return "\n".join(lines)
