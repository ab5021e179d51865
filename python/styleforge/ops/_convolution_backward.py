"""``styleforge::_convolution_backward``: both gradients of a convolution, and the convolution that has them.

ATen's in 16 bits on a GPU are cuDNN's. The operator takes its own kernels where they are faster
(ops/cuda/convolution_backward.cpp), for each of the two gradients, and ATen's elsewhere;
``styleforge.last_path()`` says which ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.ops import _common as common

NAME = "_convolution_backward"
_op = torch.ops.styleforge._convolution_backward.default


def takes(input: Tensor, weight: Tensor) -> bool:
    """Whether :class:`Convolution` may have faster gradients than ``conv2d``."""
    return (
        input.is_cuda and input.dtype in (torch.float16, torch.bfloat16) and tuple(weight.shape[2:]) == (3, 3)
    )


class Convolution(torch.autograd.Function):
    """``conv2d(input, weight, None, stride, padding)``. Saves its arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv2d(input, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @common.first_order("fused_conv_instance_norm_relu")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        grad_input, grad_weight = _op(
            grad_output, input, weight, ctx.stride, ctx.padding, needs_input, needs_weight
        )
        return grad_input if needs_input else None, grad_weight if needs_weight else None, None, None


def composite(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch: for the CPU, and for CUDA without the CUDA library."""
    needs = (needs_input, needs_weight, False)
    found = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, (1, 1), False, (0, 0), 1, needs
    )

    def result(needed: bool, grad: Tensor | None, like: Tensor) -> Tensor:
        if not needed:
            return input.new_empty(0)
        assert grad is not None
        return common.in_format(grad, common.prefers_channels_last(like))

    return result(needs_input, found[0], input), result(needs_weight, found[1], weight)


@torch.library.register_fake("styleforge::_convolution_backward")  # type: ignore[untyped-decorator]
def _fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    def result(needed: bool, like: Tensor) -> Tensor:
        if not needed:
            return input.new_empty(0)
        return common.empty_like_format(like, like.shape, common.prefers_channels_last(like))

    return result(needs_input, input), result(needs_weight, weight)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """A call for each slice: the weights' gradients go over the batch."""

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _op(*tensors, *args[3:])
        return result

    return common.loop_over_slices(call, info.batch_size, in_dims[:3], args[:3]), (0, 0)


common.register_kernel(NAME, "CPU", composite)
torch.library.register_vmap("styleforge::_convolution_backward", _vmap)
