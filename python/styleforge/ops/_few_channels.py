"""Differentiable convolutions of pictures: few input channels, or few output channels.

The first and the last layer of a style-transfer network are 9x9 convolutions of three channels, for which
tensor cores have no use: on an H200 they take cuDNN half of a training step. Here the columns of the kernel
become channels (csrc/cuda/pad/unfold.cu), which leaves a convolution of one column and 27 channels:

    few inputs:   conv2d(pad(x), w) = conv2d(unfold(x), w by columns)
    few outputs:  conv2d(x, w)[.., x] = sum over j of conv2d(x, column j of w)[.., x + j], whose gradient by
                  each column's result is the result's gradient j pixels further left: unfold again
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.ops import _common as common
from styleforge.ops._column_gradient import CHANNELS, MOST_ROWS, MOST_SAMPLES
from styleforge.ops._unfold_columns import MOST_CHANNELS

_unfold = torch.ops.styleforge._unfold_columns.default
_pad = torch.ops.styleforge._pad_upsample.default
_pad_backward = torch.ops.styleforge._pad_upsample_backward.default
_column_gradient = torch.ops.styleforge._column_gradient.default
_reflect_conv2d = torch.ops.styleforge._reflect_conv2d.default

# Of a kernel: with fewer columns there are few channels still, with more than a few there are many.
_LEAST_WIDTH = 5
_MOST_WIDTH = 15


def takes(input: Tensor, weight: Tensor, channels: int) -> bool:
    """Whether the functions below are the faster way for a convolution of stride 1 with so few channels."""
    return (
        input.is_cuda
        and input.dtype in (torch.float16, torch.bfloat16)
        and weight.dtype == input.dtype
        and channels <= MOST_CHANNELS
        and _LEAST_WIDTH <= weight.shape[3] <= _MOST_WIDTH
    )


def _backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of a convolution of stride 1 without padding; the weight's as [kh, Co, Ci], for one column."""
    by_rows = None
    if needs_weight and _takes_column_gradient(grad_output, input, weight):
        by_rows = _column_gradient(grad_output, input)
        if not needs_input:
            return None, by_rows
    needs = (needs_input, needs_weight and by_rows is None, False)
    found = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, needs
    )
    if needs[1]:
        by_rows = found[1].squeeze(3).permute(2, 0, 1)
    return found[0], by_rows


def _takes_column_gradient(grad_output: Tensor, input: Tensor, weight: Tensor) -> bool:
    return (
        input.is_cuda
        and input.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[0] == weight.shape[1] == CHANNELS
        and weight.shape[2] <= MOST_ROWS
        and grad_output.dtype == input.dtype
        and 0 < input.shape[0] <= MOST_SAMPLES
        and torch.cuda.get_device_properties(input.device).major >= 8
    )


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    """A gradient in dtype and memory format of its weight, as PyTorch's own convolution gives it."""
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return grad.to(weight.dtype).contiguous(memory_format=memory_format)


class FewInputChannels(torch.autograd.Function):
    """``conv2d(pad(input), weight)`` of stride 1. Saves its arguments: the columns are made again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, padding: tuple[int, int], padding_mode: str) -> Tensor:
        columns = _unfold(input, weight.shape[3], padding, padding_mode)
        return F.conv2d(columns, _by_input_columns(weight, columns.shape[1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.padding, ctx.padding_mode = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @common.first_order("fused_conv_instance_norm_relu")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        channels, width = weight.shape[1], weight.shape[3]
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = _grad_of_picture(grad_output, input, weight, ctx.padding, ctx.padding_mode)
        if ctx.needs_input_grad[1]:
            columns = _unfold(input, width, ctx.padding, ctx.padding_mode)
            by_columns = _by_input_columns(weight, columns.shape[1])
            _, found = _backward(grad_output, columns, by_columns, False, True)
            assert found is not None
            found = found.narrow(2, 0, width * channels).unflatten(2, (width, channels))
            grad_weight = _like(found.permute(1, 3, 0, 2), weight)
        return grad_input, grad_weight, None, None


def _by_input_columns(weight: Tensor, count: int) -> Tensor:
    """[Co, C, kh, kw] as [Co, count, kh, 1] in channels_last, channel ``j * C + c``, zeros behind."""
    rows = weight.permute(0, 2, 3, 1).flatten(2)
    return F.pad(rows, (0, count - rows.shape[2])).unsqueeze(2).permute(0, 3, 1, 2)


def _grad_of_picture(
    grad_output: Tensor, input: Tensor, weight: Tensor, padding: tuple[int, int], padding_mode: str
) -> Tensor:
    height, width = weight.shape[2:]
    if height % 2 == 1 and width % 2 == 1:
        # A convolution with few output channels: what the reflection at the border gives is cut off.
        padded = _pad(grad_output, (height - 1, width - 1))
        wide: Tensor = _reflect_conv2d(padded, weight.flip(2, 3).transpose(0, 1))
        grad = wide[:, :, height // 2 : wide.shape[2] - height // 2, width // 2 : wide.shape[3] - width // 2]
    else:
        found, _ = _backward(grad_output, _pad(input, padding, padding_mode), weight, True, False)
        assert found is not None
        grad = found
    result: Tensor = _pad_backward(grad, padding, padding_mode)
    return result


class ReflectConv2d(torch.autograd.Function):
    """``conv2d(reflection_pad(input), weight, bias)`` with half of the (odd) kernel as padding.

    Saves its arguments: the padded input is made again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = _reflect_conv2d(input, weight, bias)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _ = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @common.first_order("reflect_conv2d")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        channels, _, height, width = weight.shape
        grad_bias = grad_output.sum((0, 2, 3)) if needs_bias else None
        if not needs_input and not needs_weight:
            return None, None, grad_bias
        padding = (height // 2, width // 2)
        padded = _pad(input, padding, "reflect")
        columns = _unfold(grad_output, width, (0, width - 1))
        by_columns = _by_output_columns(weight, columns.shape[1])
        grad_padded, found = _backward(columns, padded, by_columns, needs_input, needs_weight)
        grad_input = grad_weight = None
        if grad_padded is not None:
            grad_input = _pad_backward(grad_padded, padding, "reflect")
        if found is not None:
            found = found.narrow(1, 0, width * channels).unflatten(1, (width, channels))
            grad_weight = _like(found.flip(1).permute(2, 3, 0, 1), weight)
        return grad_input, grad_weight, grad_bias


def _by_output_columns(weight: Tensor, count: int) -> Tensor:
    """[C, Ci, kh, kw] as [count, Ci, kh, 1] in channels_last, ``j * C + c`` of the last column first."""
    channels, in_channels, height, width = weight.shape
    rows = weight.flip(3).permute(3, 0, 2, 1).reshape(width * channels, height, 1, in_channels)
    return F.pad(rows, (0, 0, 0, 0, 0, 0, 0, count - width * channels)).permute(0, 3, 1, 2)
