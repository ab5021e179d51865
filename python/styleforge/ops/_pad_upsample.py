"""``styleforge::_pad_upsample``: padding and nearest upsampling in one pass that keeps the memory format.

PyTorch's own padding makes contiguous copies of channels_last, and its gradient of reflected and replicated
pixels adds in no fixed order on CUDA; here every sum has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from styleforge.ops import _common as common

NAME = "_pad_upsample"
_op = torch.ops.styleforge._pad_upsample.default


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
        input, ctx.padding, ctx.padding_mode, ctx.upsample = inputs
        ctx.sizes = input.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, upsample = ctx.sizes, ctx.upsample
        for dim, side in ((3, ctx.padding[1]), (2, ctx.padding[0])):
            grad = _fold(grad, dim, sizes[dim] * upsample, side, ctx.padding_mode)
        if upsample != 1:
            grad = torch.ops.aten.upsample_nearest2d_backward(
                grad, grad.shape[2:], sizes, float(upsample), float(upsample)
            )
        return grad, None, None, None


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


torch.library.register_vmap("styleforge::_pad_upsample", _vmap)
