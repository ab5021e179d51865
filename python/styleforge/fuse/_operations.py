"""What a step of a network computes, said the same way for layers, function calls and TorchScript operators.

A description holds the constants that a fused operator needs and references to parameters and inputs. What a
reference is depends on where the step comes from: an ``fx.Node`` for a value of a graph, an ``Attribute`` for
what a module holds, a ``torch._C.Value`` in TorchScript. ``problem`` says in one line why the fused operators
cannot stand in for this step; None where they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from styleforge.ops._common import ACTIVATIONS, FFN_ACTIVATIONS, PADDING_MODES

Ref = Any


@dataclass(frozen=True)
class Attribute:
    """Something that a module of the graph holds, by its dotted path."""

    path: str


@dataclass(frozen=True)
class Operation:
    """A step that takes one tensor, ``input``."""

    input: Ref


@dataclass(frozen=True)
class Conv(Operation):
    """A two-dimensional convolution; ``sizes``: output channels, kernel height and width where known."""

    weight: Ref
    bias: Ref
    stride: tuple[int, int]
    padding: tuple[int, int]
    padding_mode: str = "zeros"
    problem: str | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Norm(Operation):
    """Instance norm by the input's own statistics.

    ``unbatched``: [C, H, W] is one picture (``nn.InstanceNorm2d``), not [N, C, L] (``F.instance_norm``).
    """

    weight: Ref
    bias: Ref
    eps: float
    unbatched: bool
    problem: str | None = None


@dataclass(frozen=True)
class Activation(Operation):
    """An elementwise function; ``name`` as in the operators' schemas."""

    name: str
    negative_slope: float = 0.01

    @property
    def after_norm(self) -> bool:
        """Whether the norm operators have it."""
        return self.name in ACTIVATIONS

    @property
    def in_ffn(self) -> bool:
        """Whether the feed-forward operator has it."""
        return self.name in FFN_ACTIVATIONS


@dataclass(frozen=True)
class Pad(Operation):
    """Padding by (rows, columns) on both sides."""

    padding: tuple[int, int]
    padding_mode: str
    problem: str | None = None


@dataclass(frozen=True)
class Upsample(Operation):
    """Nearest-neighbour upsampling by two."""


@dataclass(frozen=True)
class Add(Operation):
    """``input + other``; ``in_place`` where the result is written over ``input``."""

    other: Ref
    in_place: bool = False


@dataclass(frozen=True)
class Linear(Operation):
    """A linear layer."""

    weight: Ref
    bias: Ref
    problem: str | None = None


@dataclass(frozen=True)
class Dropout(Operation):
    """Dropout of single elements; probability and mode may be what the layer says at each call."""

    probability: Ref
    training: Ref


@dataclass(frozen=True)
class Identity(Operation):
    """Gives back its input."""


@dataclass(frozen=True)
class Attention(Operation):
    """Self-attention as PyTorch's functions have it; ``sequence_first``: the input is [L, N, E].

    ``pair``: the result is (output, weights), of which the weights may only be ignored.
    """

    num_heads: int
    qkv_weight: Ref
    qkv_bias: Ref
    out_weight: Ref
    out_bias: Ref
    key_padding_mask: Ref
    is_causal: bool
    sequence_first: bool
    pair: bool
    problem: str | None = None


@dataclass(frozen=True)
class EncoderLayer(Operation):
    """``torch._transformer_encoder_layer_fwd``: a whole transformer layer in inference; its arguments."""

    arguments: tuple[Ref, ...]
    problem: str | None = None


@dataclass(frozen=True)
class Other(Operation):
    """A layer worth a line in the report although nothing here takes its place."""

    kind: str


def two(value: Any) -> tuple[int, int] | None:
    """One or two integers as two; None for anything else."""
    values = (value, value) if isinstance(value, int) else value
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    if len(values) == 1:
        values = (values[0], values[0])
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        return None
    return int(values[0]), int(values[1])


def conv(
    input: Ref,
    weight: Ref,
    bias: Ref,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: str = "zeros",
    kernel_size: tuple[int, int] | None = None,
) -> Conv:
    """A convolution, with the reason why it cannot be fused where there is one."""
    problem: str | None = None
    strides, paddings = two(stride), None
    if groups != 1:
        problem = f"groups={groups}"
    elif two(dilation) != (1, 1):
        problem = f"dilation={dilation}"
    elif padding_mode not in PADDING_MODES:
        problem = f'padding_mode="{padding_mode}"'
    elif strides is None:
        problem = f"stride={stride}"
    elif padding == "valid":
        paddings = (0, 0)
    elif padding == "same":
        if kernel_size is None or kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
            problem = 'padding="same" of an even kernel, which is not the same on both sides'
        else:
            paddings = (kernel_size[0] // 2, kernel_size[1] // 2)
    else:
        paddings = two(padding)
        if paddings is None:
            problem = f"padding={padding}"
    return Conv(input, weight, bias, strides or (1, 1), paddings or (0, 0), padding_mode, problem)


def pad(input: Ref, sides: Any, mode: str, value: Any = None) -> Pad | Identity:
    """Padding given as PyTorch does: (left, right, top, bottom)."""
    mode = "zeros" if mode == "constant" else mode
    problem = None
    if isinstance(sides, int):
        sides = (sides,) * 4
    if not isinstance(sides, Sequence) or not all(isinstance(s, int) for s in sides):
        problem, padding = "its padding is not constant", (0, 0)
    elif not any(sides):
        return Identity(input)
    elif len(sides) != 4:
        problem, padding = f"it pads {len(sides) // 2} dimensions", (0, 0)
    else:
        left, right, top, bottom = (int(s) for s in sides)
        padding = (top, left)
        if left != right or top != bottom or min(padding) < 0:
            problem = f"its padding {tuple(sides)} is not the same on both sides"
    if mode not in PADDING_MODES:
        problem = f'its mode is "{mode}"'
    elif mode == "zeros" and value not in (None, 0):
        problem = f"it pads with {value}"
    return Pad(input, padding, mode, problem)


def upsample(
    input: Ref, size: Any, scale_factor: Any, mode: str, align_corners: Any, recompute: Any, antialias: Any
) -> Upsample | None:
    """Nearest upsampling by exactly two in both directions, or None."""
    factors = (scale_factor, scale_factor) if isinstance(scale_factor, (int, float)) else scale_factor
    by_two = (
        isinstance(factors, Sequence)
        and len(factors) in (1, 2)
        and all(isinstance(f, (int, float)) and f == 2 for f in factors)
    )
    # With a factor of exactly two, "nearest-exact" picks the same pixels as "nearest".
    if size is not None or not by_two or mode not in ("nearest", "nearest-exact"):
        return None
    return Upsample(input) if not align_corners and not antialias else None


def gelu(input: Ref, approximate: str) -> Activation:
    """GELU by its ``approximate`` argument."""
    return Activation(input, "gelu_tanh" if approximate == "tanh" else "gelu")
