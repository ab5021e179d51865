"""Finds, in a list of steps, what one fused operator computes.

A ``Step`` is a node of any graph (fx, TorchScript) with its description. A site is taken only where the fused
operator provably gives the same: every value inside has no other reader, and nothing between the first and
the last step can write to what the operator reads, since it reads all of it at the place of the last.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from styleforge.fuse import _operations as ops
from styleforge.fuse._operations import Operation, Ref

Key = Hashable
_OUTSIDE = "<outside>"
FEW_CHANNELS = 4  # for more, the kernel of the last layer gains nothing


@dataclass
class Step:
    """One node of a graph.

    Attributes:
        key: the value it gives.
        name: for the report.
        operation: what it computes; None where that is not known.
        users: keys of the steps that read the value, once for each time; a graph's output counts.
        writes: values that it may write to.
        aliases: values whose memory the result may share; empty for a new tensor.
        outside: the value comes from outside of the graph.
        barrier: it changes how what follows runs (autocast, gradient mode).
    """

    key: Key
    name: str
    operation: Operation | None = None
    users: list[Key] = field(default_factory=list)
    writes: tuple[Key, ...] = ()
    aliases: tuple[Key, ...] = ()
    outside: bool = False
    barrier: bool = False


@dataclass
class NormSite:
    """``activation(norm(conv(pad(upsample(input)))) + residual)``; ``conv`` is None for a lone norm."""

    steps: list[Step]
    input: Ref
    norm: ops.Norm
    conv: ops.Conv | None = None
    pad: ops.Pad | None = None
    upsample: int = 1
    residual: Ref = None
    activation: ops.Activation | None = None

    operator = property(
        lambda self: "fused_instance_norm" if self.conv is None else "fused_conv_instance_norm_relu"
    )


@dataclass
class FFNSite:
    """``dropout(fc2(dropout(activation(fc1(input))))) + residual``."""

    steps: list[Step]
    input: Ref
    fc1: ops.Linear
    activation: ops.Activation
    fc2: ops.Linear
    dropouts: tuple[ops.Dropout | None, ops.Dropout | None] = (None, None)
    residual: Ref = None

    operator = "fused_ffn"


@dataclass
class AttentionSite:
    """A function call that is an attention, or a whole transformer layer."""

    steps: list[Step]
    input: Ref
    operation: ops.Attention | ops.EncoderLayer

    operator = property(
        lambda self: "fused_attention" if isinstance(self.operation, ops.Attention) else "fused_ffn"
    )


@dataclass
class LastConvSite:
    """Reflection padding by half of the kernel, then a convolution to a few channels, and no norm."""

    steps: list[Step]
    input: Ref
    conv: ops.Conv

    operator = "reflect_conv2d"


Site = NormSite | FFNSite | AttentionSite | LastConvSite


@dataclass
class Left:
    """A step that could have been fused but is not, and why."""

    step: Step
    kind: str
    reason: str


class Finder:
    """Finds the sites among ``steps``, which are in the order in which they run.

    Args:
        steps: every node of the graph.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)
        self.position = {step.key: index for index, step in enumerate(self.steps)}
        self.sites: list[Site] = []
        self.left: list[Left] = []
        self._taken: set[Key] = set()
        self._roots: dict[Key, frozenset[Key]] = {}
        self._reasons: dict[Key, str] = {}
        for step in self.steps:  # in order, so that no chain of aliases is followed twice
            self.roots(step.key)

    def find(self) -> tuple[list[Site], list[Left]]:
        """The sites, and the steps that were looked at and left, with the reasons."""
        for step in self.steps:
            if isinstance(step.operation, ops.Norm):
                self._norm(step, step.operation)
        for step in self.steps:
            if isinstance(step.operation, ops.Linear) and step.key not in self._taken:
                self._ffn(step, step.operation)
            elif isinstance(step.operation, (ops.Attention, ops.EncoderLayer)):
                self._attention(step, step.operation)
        for step in self.steps:
            if step.key in self._taken:
                continue
            if isinstance(step.operation, ops.Conv) and not self._last_conv(step, step.operation):
                self._leave(step, "Conv2d", self._reasons.get(step.key, "no InstanceNorm2d after it"))
            elif isinstance(step.operation, ops.Other):
                self._leave(step, step.operation.kind, "no operator for it")
        order = self.position
        self.sites.sort(key=lambda site: order[site.steps[-1].key])
        self.left.sort(key=lambda left: order[left.step.key])
        return self.sites, self.left

    def _leave(self, step: Step, kind: str, reason: str) -> None:
        self.left.append(Left(step, kind, reason))

    def _step(self, key: Ref) -> Step | None:
        index = self.position.get(key) if isinstance(key, Hashable) else None
        return None if index is None else self.steps[index]

    # --- chains ---------------------------------------------------------------------------------

    def _before(self, operation: Operation) -> tuple[list[Step], Step | None]:
        """The step that gives ``operation``'s input, if nobody else reads that; and identities between."""
        between: list[Step] = []
        step = self._step(operation.input)
        while step is not None and len(step.users) == 1 and step.key not in self._taken:
            if not isinstance(step.operation, ops.Identity):
                return between, step
            between.append(step)
            step = self._step(step.operation.input)
        return between, None

    def _after(self, step: Step) -> tuple[list[Step], Step | None]:
        """The only step that reads this one's value, and identities between."""
        between: list[Step] = []
        while len(step.users) == 1:
            following = self._step(step.users[0])
            if following is None or following.key in self._taken or following.operation is None:
                return between, None
            if not isinstance(following.operation, ops.Identity):
                return between, following
            between.append(following)
            step = following
        return between, None

    # --- patterns -------------------------------------------------------------------------------

    def _norm(self, step: Step, norm: ops.Norm) -> None:
        if norm.problem is not None:
            self._leave(step, "InstanceNorm2d", norm.problem)
            return
        site = NormSite([step], norm.input, norm)
        self._take_input_side(site)
        before = site.steps
        self._take_output_side(site, step)
        if self._movable(site):
            self._take(site)
            return
        # Without the addition, then without the convolution: less lies between the first and the last step.
        alone = NormSite([step], norm.input, norm)
        plain = NormSite(before, site.input, norm, site.conv, site.pad, site.upsample)
        for smaller in (plain, alone):
            self._take_activation(smaller, step)
            if self._movable(smaller):
                if smaller is alone:
                    for left in before:
                        self._reasons[left.key] = "its input is written to before the norm"
                self._take(smaller)
                return
        self._leave(step, "InstanceNorm2d", "a tensor that it reads is written to before its result is used")

    def _take_input_side(self, site: NormSite) -> None:
        between, source = self._before(site.norm)
        if source is None:
            shared = self._step(site.norm.input)
            if shared is not None and isinstance(shared.operation, ops.Conv) and len(shared.users) > 1:
                self._reasons[shared.key] = "its output is used more than once"
            return
        if isinstance(source.operation, ops.Dropout):
            _, further = self._before(source.operation)
            if further is not None and isinstance(further.operation, ops.Conv):
                self._reasons[further.key] = "dropout between it and the norm"
        if not isinstance(source.operation, ops.Conv):
            return
        conv = source.operation
        if conv.problem is not None:
            self._reasons[source.key] = conv.problem
            return
        site.conv, site.input = conv, conv.input
        site.steps = [source, *reversed(between), *site.steps]
        self._take_pad_and_upsample(site, conv)

    def _take_pad_and_upsample(self, site: NormSite, conv: ops.Conv) -> None:
        between, source = self._before(conv)
        if source is not None and isinstance(source.operation, ops.Pad):
            if source.operation.problem is not None or conv.padding != (0, 0):
                return
            site.pad, site.input = source.operation, source.operation.input
            site.steps = [source, *reversed(between), *site.steps]
            between, source = self._before(source.operation)
        if source is not None and isinstance(source.operation, ops.Upsample):
            site.upsample, site.input = 2, source.operation.input
            site.steps = [source, *reversed(between), *site.steps]

    def _take_activation(self, site: NormSite, last: Step) -> Step:
        between, following = self._after(last)
        if following is None or not isinstance(following.operation, ops.Activation):
            return last
        if not following.operation.after_norm:
            return last
        site.activation = following.operation
        site.steps = [*site.steps, *between, following]
        return following

    def _take_output_side(self, site: NormSite, last: Step) -> None:
        between, following = self._after(last)
        residual = self._residual(following, last, between)
        if residual is not None and following is not None:
            site.residual = residual
            site.steps = [*site.steps, *between, following]
            last = following
        self._take_activation(site, last)

    def _residual(self, addition: Step | None, last: Step, between: Iterable[Step]) -> Ref:
        """What ``addition`` adds to the value of ``last``; None where that is not a plain addition."""
        if addition is None or not isinstance(addition.operation, ops.Add):
            return None
        add = addition.operation
        ours = {last.key, *(s.key for s in between)}
        sides = [side for side in (add.input, add.other) if not _among(side, ours)]
        if len(sides) != 1 or self._step(sides[0]) is None:
            return None
        # x += norm(..) writes over x, which somebody else may still hold.
        return None if add.in_place and sides[0] is add.input else sides[0]

    def _ffn(self, step: Step, fc1: ops.Linear) -> None:
        steps = [step]
        between, following = self._after(step)
        if following is None or not isinstance(following.operation, ops.Activation):
            return
        activation = following.operation
        steps += [*between, following]
        between, following = self._after(following)
        hidden_dropout = None
        if following is not None and isinstance(following.operation, ops.Dropout):
            hidden_dropout = following.operation
            steps += [*between, following]
            between, following = self._after(following)
        if following is None or not isinstance(following.operation, ops.Linear):
            return
        fc2 = following.operation
        if not activation.in_ffn:
            self._leave(step, "Linear", f"{activation.name} between it and the next one has no operator")
            return
        steps += [*between, following]
        site = FFNSite(steps, fc1.input, fc1, activation, fc2, (hidden_dropout, None))
        bigger = self._with_residual(site)
        for candidate in (bigger, site):
            if candidate is not None and self._movable(candidate):
                self._take(candidate)
                return
        self._leave(step, "Linear", "a tensor that it reads is written to before its result is used")

    def _with_residual(self, site: FFNSite) -> FFNSite | None:
        steps, last = list(site.steps), site.steps[-1]
        between, following = self._after(last)
        dropout = None
        if following is not None and isinstance(following.operation, ops.Dropout):
            dropout = following.operation
            steps += [*between, following]
            last = following
            between, following = self._after(last)
        residual = self._residual(following, last, between)
        if residual is None or following is None:
            return None
        steps += [*between, following]
        drops = (site.dropouts[0], dropout)
        return FFNSite(steps, site.input, site.fc1, site.activation, site.fc2, drops, residual)

    def _last_conv(self, step: Step, conv: ops.Conv) -> bool:
        """Takes the last layer of a picture network, which has a kernel of its own."""
        between, source = self._before(conv)
        pad = source.operation if source is not None else None
        if source is None or not isinstance(pad, ops.Pad) or pad.problem or pad.padding_mode != "reflect":
            return False
        half = (2 * pad.padding[0] + 1, 2 * pad.padding[1] + 1)
        plain = conv.problem is None and conv.padding == (0, 0) and conv.stride == (1, 1)
        if not plain or conv.sizes is None or conv.sizes[0] > FEW_CHANNELS or conv.sizes[1:] != half:
            return False
        site = LastConvSite([source, *reversed(between), step], pad.input, conv)
        if self._movable(site):
            self._take(site)
            return True
        return False

    def _attention(self, step: Step, operation: ops.Attention | ops.EncoderLayer) -> None:
        kind = "attention" if isinstance(operation, ops.Attention) else "TransformerEncoderLayer"
        if operation.problem is not None:
            self._leave(step, kind, operation.problem)
        else:
            self._take(AttentionSite([step], operation.input, operation))

    # --- what may be moved ------------------------------------------------------------------------

    def _take(self, site: Site) -> None:
        self._taken.update(step.key for step in site.steps)
        self.sites.append(site)

    def roots(self, key: Key) -> frozenset[Key]:
        """The tensors whose memory a value may share; everything from outside counts as one."""
        if key not in self._roots:
            step = self._step(key)
            if step is None or step.outside:
                found: frozenset[Key] = frozenset([_OUTSIDE])
            else:
                found = frozenset([key]).union(*(self.roots(alias) for alias in step.aliases))
            self._roots[key] = found
        return self._roots[key]

    def _movable(self, site: NormSite | FFNSite | LastConvSite) -> bool:
        """Whether the operator may read its tensors at the last step instead of where they are read now."""
        own = {step.key for step in site.steps}
        positions = sorted(self.position[key] for key in own)
        reads = self.roots(site.input)
        if not isinstance(site, LastConvSite) and site.residual is not None:
            reads |= self.roots(site.residual)
        for step in self.steps[positions[0] : positions[-1]]:
            if step.key in own:
                continue
            if step.barrier or any(self.roots(written) & reads for written in step.writes):
                return False
        return True


def _among(value: Ref, keys: set[Key]) -> bool:
    return isinstance(value, Hashable) and value in keys
