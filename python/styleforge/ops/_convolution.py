"""``styleforge::_convolution`` and ``styleforge::_convolution_backward``: a convolution that trains.

ATen's in 16 bits on a GPU are cuDNN's. The operators take kernels of ours where they are faster
(ops/cuda/plain_convolution.cpp, ops/cuda/convolution_backward.cpp), for the result and for each of the two
gradients, and ATen's elsewhere; ``styleforge.last_path()`` says which ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.ops import _common as common
from styleforge.ops._composite import pad_upsample
from styleforge.ops._pad_upsample import composite_backward as fold

_forward = torch.ops.styleforge._convolution.default
_backward = torch.ops.styleforge._convolution_backward.default


def takes(input: Tensor, weight: Tensor) -> bool:
    """Whether :class:`Convolution` may be faster than ``conv2d``."""
    return (
        input.is_cuda
        and input.dtype in (torch.float16, torch.bfloat16)
        and tuple(weight.shape[2:]) == (3, 3)
        and _is_sm90(input.device.index)
    )


@cache
def _is_sm90(device: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


class Convolution(torch.autograd.Function):
    """``conv2d(pad(input), weight, None, stride)``. Saves its arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], padding_mode: str
    ) -> Tensor:
        output: Tensor = _forward(input, weight, stride, padding, padding_mode)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.stride, ctx.padding, ctx.padding_mode = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @common.first_order("fused_conv_instance_norm_relu")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        grad_input, grad_weight = _backward(
            grad_output, input, weight, ctx.stride, ctx.padding, ctx.padding_mode, needs_input, needs_weight
        )
        return (
            grad_input if needs_input else None,
            grad_weight if needs_weight else None,
            None,
            None,
            None,
        )


def composite(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], padding_mode: str = "zeros"
) -> Tensor:
    """``_convolution`` in plain PyTorch: for the CPU, and for CUDA without the CUDA library."""
    wide, sides = _padded(input, padding, padding_mode)
    output = F.conv2d(wide, weight, None, common.pair(stride), sides)
    return common.in_format(output, common.prefers_channels_last(input))


def _padded(input: Tensor, padding: Sequence[int], padding_mode: str) -> tuple[Tensor, tuple[int, int]]:
    """The input with what is not zeros around it, and the padding that is left."""
    sides = common.pair(padding)
    if padding_mode == "zeros":
        return input, sides
    return pad_upsample(input, sides, padding_mode, 1), (0, 0)


def composite_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """``_convolution_backward``, likewise."""
    wide, sides = _padded(input, padding, padding_mode)
    needs = (needs_input, needs_weight, False)
    found = torch.ops.aten.convolution_backward(
        grad_output, wide, weight, None, stride, sides, (1, 1), False, (0, 0), 1, needs
    )
    of_input = found[0]
    if needs_input and padding_mode != "zeros":
        of_input = fold(of_input, padding, padding_mode)

    def result(needed: bool, grad: Tensor | None, like: Tensor) -> Tensor:
        if not needed:
            return input.new_empty(0)
        assert grad is not None
        return common.in_format(grad, common.prefers_channels_last(like))

    return result(needs_input, of_input, input), result(needs_weight, found[1], weight)


@torch.library.register_fake("styleforge::_convolution")  # type: ignore[untyped-decorator]
def _fake(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], padding_mode: str = "zeros"
) -> Tensor:
    sizes = [input.shape[0], weight.shape[0]]
    for d in range(2):
        sizes.append((input.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // stride[d] + 1)
    return common.empty_like_format(input, sizes, common.prefers_channels_last(input))


@torch.library.register_fake("styleforge::_convolution_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    def result(needed: bool, like: Tensor) -> Tensor:
        if not needed:
            return input.new_empty(0)
        return common.empty_like_format(like, like.shape, common.prefers_channels_last(like))

    return result(needs_input, input), result(needs_weight, weight)


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    padding_mode: str = "zeros",
) -> tuple[Tensor, int]:
    """Folds the vmapped dimension into the batch; vmapped weights are one call for each slice."""
    if in_dims[1] is not None:

        def call(input: Tensor, weight: Tensor) -> tuple[Tensor]:
            return (_forward(input, weight, stride, padding, padding_mode),)

        return common.loop_over_slices(call, info.batch_size, in_dims[:2], (input, weight))[0], 0
    slices = input.movedim(in_dims[0], 0)
    output: Tensor = _forward(slices.flatten(0, 1), weight, stride, padding, padding_mode)
    return output.unflatten(0, slices.shape[:2]), 0


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """A call for each slice: the weights' gradients go over the batch."""

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _backward(*tensors, *args[3:])
        return result

    return common.loop_over_slices(call, info.batch_size, in_dims[:3], args[:3]), (0, 0)


common.register_kernel("_convolution", "CPU", composite)
common.register_kernel("_convolution_backward", "CPU", composite_backward)
torch.library.register_vmap("styleforge::_convolution", _vmap)
torch.library.register_vmap("styleforge::_convolution_backward", _vmap_backward)
