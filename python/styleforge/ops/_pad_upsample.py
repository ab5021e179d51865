"""``styleforge::_pad_upsample``: padding and nearest upsampling in one pass that keeps the memory format.

PyTorch's own padding makes contiguous copies of channels_last, and its gradient of reflected and replicated
pixels adds in no fixed order on CUDA; here every sum has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from styleforge.ops import _common as common

NAME = "_pad_upsample"
_op = torch.ops.styleforge._pad_upsample.default
_backward_op = torch.ops.styleforge._pad_upsample_backward.default


def pad_upsample(
    input: Tensor, padding: int | Sequence[int], *, padding_mode: str = "zeros", upsample: int = 1
) -> Tensor:
    """pad(upsample(input)), differentiable once.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 or float64.
        padding: on each side, one or two integers (rows, columns), in pixels.
        padding_mode: zeros, reflect or replicate.
        upsample: 1 or 2 (nearest neighbour), before the padding.

    Returns:
        [N, C, H * upsample + 2 * rows, W * upsample + 2 * columns], channels_last where the input is.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what was given.
    """
    sides = common.pair(padding)
    if forward_ad._current_level >= 0:
        common.refuse_tangents("pad_upsample", (input,))
    if torch.is_grad_enabled() and input.requires_grad:
        result: Tensor = PadUpsample.apply(input, sides, padding_mode, upsample)  # type: ignore[no-untyped-call]
    else:
        result = _op(input, sides, padding_mode, upsample)
    return result


class PadUpsample(torch.autograd.Function):
    """The operator with its gradient: what was padded folds back, then each two by two pixels are added."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, padding: tuple[int, ...], padding_mode: str, upsample: int) -> Tensor:
        result: Tensor = _op(input, padding, padding_mode, upsample)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.padding, ctx.padding_mode, ctx.upsample = inputs

    @staticmethod
    @common.first_order("pad_upsample")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward_op(grad, ctx.padding, ctx.padding_mode, ctx.upsample), None, None, None


def composite_backward(
    grad_output: Tensor, padding: Sequence[int], padding_mode: str = "zeros", upsample: int = 1
) -> Tensor:
    """The operator's gradient in plain PyTorch: for the CPU, and for CUDA without the CUDA library."""
    rows, columns = common.pair(padding)
    sizes = _sizes_before(grad_output, padding, upsample)
    grad = grad_output
    for dim, side in ((3, columns), (2, rows)):
        grad = _fold(grad, dim, sizes[dim] * upsample, side, padding_mode)
    if upsample != 1:
        grad = torch.ops.aten.upsample_nearest2d_backward(
            grad, grad.shape[2:], sizes, float(upsample), float(upsample)
        )
    channels_last = common.prefers_channels_last(grad_output)
    return grad.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _sizes_before(grad_output: Tensor, padding: Sequence[int], upsample: int) -> list[Any]:
    """[N, C, H, W] of the input that was padded."""
    n, channels, height, width = grad_output.shape
    rows, columns = common.pair(padding)
    return [n, channels, (height - 2 * rows) // upsample, (width - 2 * columns) // upsample]


def _fold(grad: Tensor, dim: int, size: int, side: int, padding_mode: str) -> Tensor:
    """The gradient of ``size`` rows or columns from one with ``side`` more before and behind."""
    if side == 0:
        return grad
    inner = grad.narrow(dim, side, size)
    if padding_mode == "zeros":
        return inner
    inner = inner.clone()
    before, behind = grad.narrow(dim, 0, side), grad.narrow(dim, side + size, side)
    if padding_mode == "reflect":
        inner.narrow(dim, 1, side).add_(before.flip(dim))
        inner.narrow(dim, size - 1 - side, side).add_(behind.flip(dim))
    else:
        inner.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
        inner.narrow(dim, size - 1, 1).add_(behind.sum(dim, keepdim=True))
    return inner


@torch.library.register_fake("styleforge::_pad_upsample_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    grad_output: Tensor, padding: Sequence[int], padding_mode: str = "zeros", upsample: int = 1
) -> Tensor:
    sizes = _sizes_before(grad_output, padding, upsample)
    return common.empty_like_format(grad_output, sizes, common.prefers_channels_last(grad_output))


@torch.library.register_fake("styleforge::_pad_upsample")  # type: ignore[untyped-decorator]
def _fake(input: Tensor, padding: Sequence[int], padding_mode: str = "zeros", upsample: int = 1) -> Tensor:
    common.check_input(NAME, input)
    common.check_choice(NAME, "padding_mode", padding_mode, common.PADDING_MODES)
    rows, columns = common.pair(padding)
    sizes: list[Any] = [
        input.shape[0],
        input.shape[1],
        input.shape[2] * upsample + 2 * rows,
        input.shape[3] * upsample + 2 * columns,
    ]
    return common.empty_like_format(input, sizes, common.prefers_channels_last(input))


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    padding: Sequence[int],
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> tuple[Tensor, int]:
    """Folds the vmapped dimension into the batch."""
    batch = input.movedim(in_dims[0] or 0, 0).shape[1]
    result: Tensor = _op(
        common.fold(input, in_dims[0], info.batch_size, batch), padding, padding_mode, upsample
    )
    return result.unflatten(0, (info.batch_size, batch)), 0


def _vmap_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    padding: Sequence[int],
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> tuple[Tensor, int]:
    """Folds the vmapped dimension into the batch."""
    batch = grad_output.movedim(in_dims[0] or 0, 0).shape[1]
    folded = common.fold(grad_output, in_dims[0], info.batch_size, batch)
    result: Tensor = _backward_op(folded, padding, padding_mode, upsample)
    return result.unflatten(0, (info.batch_size, batch)), 0


common.register_kernel("_pad_upsample_backward", "CPU", composite_backward)
torch.library.register_vmap("styleforge::_pad_upsample", _vmap)
torch.library.register_vmap("styleforge::_pad_upsample_backward", _vmap_backward)
