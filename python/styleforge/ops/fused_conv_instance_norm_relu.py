"""``styleforge::fused_conv_instance_norm_relu``: fake, autograd, autocast, vmap, typed functional form.

    output = activation(instance_norm(conv2d(pad(upsample(input)), weight)) + residual)

The pattern of style-transfer networks (Johnson, Alahi, Fei-Fei: Perceptual Losses, 2016, arXiv:1603.08155).
The convolution's bias shifts every pixel of a channel alike, so the norm takes it out again: it is accepted
and unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from styleforge.ops import _common as common
from styleforge.ops import _few_channels as few_channels
from styleforge.ops._cast import cast
from styleforge.ops._convolution import Convolution, takes
from styleforge.ops._pad_upsample import PadUpsample
from styleforge.ops._precision import conv_precision, convolutions_are_in, convolutions_in

NAME = "fused_conv_instance_norm_relu"
_op = torch.ops.styleforge.fused_conv_instance_norm_relu.default
_norm_op = torch.ops.styleforge.fused_instance_norm.default
_redispatch = _op._handle.redispatch_boxed
_below_autograd = common.below_autograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled


def fused_conv_instance_norm_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Convolution, instance norm, residual and activation as one operator.

        output = activation(instance_norm(conv2d(pad(upsample(input)), weight)) + residual)

    with the norm of ``fused_instance_norm``; the bias cancels under it. By schema
    ``torch.ops.styleforge.fused_conv_instance_norm_relu``. Differentiable once; autocast, vmap and CUDA
    graphs work.

    Args:
        input: [N, Ci, H, W], float32, float16, bfloat16 or float64, any strides.
        weight: [Co, Ci, kh, kw], the input's dtype.
        bias: [Co]; accepted and unused, the norm cancels it (its gradient is zero).
        norm_weight: scale after the norm, [Co] or [N, Co], of the input's dtype or float32.
        norm_bias: shift after the norm, shaped and typed as ``norm_weight``.
        stride: of the convolution, one or two integers, in pixels.
        padding: on each side of the (upsampled) input, one or two integers (rows, columns), in pixels.
        padding_mode: zeros, reflect or replicate.
        upsample: 1, or 2 for nearest-neighbour upsampling before the padding.
        eps: added to the variance.
        activation: none, relu, leaky_relu, silu, sigmoid or tanh.
        negative_slope: of leaky_relu.
        residual: added before the activation; shape of the result, dtype of ``input``.
        precision: of float32 convolutions on the GPU: "ieee", "tf32", or None for what
            ``torch.backends.cudnn`` says.

    Returns:
        [N, Co, Ho, Wo] in the input's dtype, ``Ho = (H * upsample + 2 * padding - kh) // stride + 1``;
        channels_last where the input is, else contiguous.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what was given.

    Source:
        Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", 2016,
        arXiv:1603.08155.
    """
    result: Tensor = _op(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        common.pair(stride),
        common.pair(padding),
        padding_mode,
        upsample,
        eps,
        activation,
        negative_slope,
        residual,
        conv_precision(precision),
    )
    return result


@torch.library.register_fake("styleforge::fused_conv_instance_norm_relu")  # type: ignore[untyped-decorator]
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    common.check_input(NAME, input)
    common.check(
        NAME,
        weight.dim() == 4 and weight.shape[1] == input.shape[1],
        lambda: (
            f"weight must have shape [out_channels, {input.shape[1]}, kernel_height, kernel_width], "
            f"got {list(weight.shape)}"
        ),
    )
    common.check_like(NAME, "weight", weight, input, weight.shape)
    if 0 in weight.shape:
        raise RuntimeError(f"{NAME}: weight must have no empty dimension, got {list(weight.shape)}")
    common.check_like(NAME, "bias", bias, input, weight.shape[:1])
    common.check_choice(NAME, "activation", activation, common.ACTIVATIONS)
    common.check_choice(NAME, "padding_mode", padding_mode, common.PADDING_MODES)
    common.check_choice(NAME, "precision", precision, common.PRECISIONS)
    common.check(NAME, upsample in (1, 2), lambda: f"upsample must be 1 or 2, got {upsample}")
    strides = common.check_pair(NAME, "stride", stride, 1)
    paddings = common.check_pair(NAME, "padding", padding, 0)

    def too_much_padding(d: int) -> str:
        return (
            "padding must be smaller than the (upsampled) input for padding_mode reflect, "
            f"got padding {paddings[d]} for input {list(input.shape)}"
        )

    sizes: list[Any] = [input.shape[0], weight.shape[0]]
    for d in range(2):
        size = input.shape[2 + d] * upsample
        if padding_mode == "reflect":
            common.check(
                NAME,
                paddings[d] < size,
                partial(too_much_padding, d),
            )
        room = size + 2 * paddings[d] - weight.shape[2 + d]
        common.check(
            NAME,
            room >= 0,
            lambda: (
                f"weight's kernel {list(weight.shape[2:])} must not be larger than the padded input, "
                f"got input {list(input.shape)} with padding {list(paddings)}"
            ),
        )
        sizes.append(room // strides[d] + 1)
    common.check_norm_params(
        NAME, ("norm_weight", norm_weight), ("norm_bias", norm_bias), input, weight.shape[0]
    )
    common.check_like(NAME, "residual", residual, input, sizes)
    return common.empty_like_format(input, sizes, common.prefers_channels_last(input))


class _Convolution(torch.autograd.Function):
    """ATen's convolution in a precision other than the one that PyTorch's flags say, in both directions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], precision: str
    ) -> Tensor:
        with convolutions_in(precision):
            return F.conv2d(input, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.stride, ctx.padding, ctx.precision = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    @common.first_order(NAME)
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        mask = [*ctx.needs_input_grad[:2], False]
        with convolutions_in(ctx.precision):
            grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad_output, input, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, mask
            )
        return grad_input, grad_weight, None, None, None


class _UnusedBias(torch.autograd.Function):
    """The bias does not change the result; its gradient is zeros, not None, as optimisers and DDP expect.

    It joins a tensor on the way to the result, never the result itself: that would be a view, which autograd
    lets nobody write to, and callers add to results in place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, bias: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, torch.zeros_like(ctx.saved_tensors[0])


def _autograd(keyset: Any, *args: Any) -> Tensor:
    # As in fused_instance_norm, the first lines are what a call under no_grad costs on top of the operator.
    # Here the arguments stay a tuple: the dispatcher has left out trailing defaults, of which there are many.
    if forward_ad._current_level >= 0:
        common.refuse_tangents(NAME, args)
    if not _is_grad_enabled() or not _any_requires_grad(*args):
        result: Tensor = _redispatch(_below_autograd[keyset.raw_repr()], *args)
        return result
    return _differentiable(*args)


def _differentiable(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    # With a gradient: ATen's convolution (and its backward) under the differentiable norm, which saves the
    # convolution's result, mean and rstd. The fake checks the arguments before anything runs.
    channels_last = common.prefers_channels_last(input)
    _fake(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        stride,
        padding,
        padding_mode,
        upsample,
        eps,
        activation,
        negative_slope,
        residual,
        precision,
    )
    strides, sides = common.pair(stride), common.pair(padding)
    if strides == (1, 1) and upsample == 1 and few_channels.takes(input, weight, weight.shape[1]):
        z = common.apply_function(few_channels.FewInputChannels, input, weight, sides, padding_mode)
    else:
        z = _convolution(input, weight, strides, sides, padding_mode, upsample, precision)
    z = z.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if bias is not None and bias.requires_grad:
        z = common.apply_function(_UnusedBias, z, bias)
    output: Tensor = _norm_op(z, norm_weight, norm_bias, eps, activation, negative_slope, residual)
    return output


def _convolution(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    upsample: int,
    precision: str,
) -> Tensor:
    """conv2d(pad(upsample(input)), weight) with ATen's convolution; zeros are left to it."""
    own = takes(input, weight)
    if upsample != 1 or (padding_mode != "zeros" and not own):
        sides, padding = (padding, (0, 0)) if padding_mode != "zeros" else ((0, 0), padding)
        input = common.apply_function(PadUpsample, input, sides, padding_mode, upsample)
        padding_mode = "zeros"
    if own:
        result: Tensor = common.apply_function(Convolution, input, weight, stride, padding, padding_mode)
        return result
    if input.is_cuda and input.dtype == torch.float32 and not convolutions_are_in(precision):
        result = common.apply_function(_Convolution, input, weight, stride, padding, precision)
        return result
    return F.conv2d(input, weight, None, stride, padding)


def _autocast(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """As PyTorch's own convolution: everything that enters it is cast; norm parameters stay in float32."""
    with common.no_autocast(input):
        dtype = common.autocast_dtype(input)
        norm_weight, norm_bias = common.norm_params_for(dtype, norm_weight, norm_bias)
        if bias is not None:
            # Checked, and not cast: it is not read, and its gradient is zeros in its own dtype.
            common.check_device(NAME, "bias", bias, input)
            common.check_like(NAME, "bias", bias, bias, weight.shape[:1])
        weight = cast(weight, dtype)
        if bias is not None and _is_grad_enabled() and bias.requires_grad:
            weight = common.apply_function(_UnusedBias, weight, bias)
        result: Tensor = _op(
            cast(input, dtype),
            weight,
            None,
            norm_weight,
            norm_bias,
            stride,
            padding,
            padding_mode,
            upsample,
            eps,
            activation,
            negative_slope,
            None if residual is None else cast(residual, dtype),
            precision,
        )
        return result


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, int]:
    """Folds the vmapped dimension into the batch; a vmapped convolution weight is one call for each slice."""
    size = info.batch_size
    dims = tuple(in_dims) + (None,) * (14 - len(in_dims))
    tail = (stride, padding, padding_mode, upsample, eps, activation, negative_slope)

    if dims[1] is not None:

        def pick(tensor: Tensor | None, dim: int | None, index: int) -> Tensor | None:
            return tensor if tensor is None or dim is None else tensor.select(dim, index)

        slices = [
            _op(
                pick(input, dims[0], i),
                pick(weight, dims[1], i),
                pick(bias, dims[2], i),
                pick(norm_weight, dims[3], i),
                pick(norm_bias, dims[4], i),
                *tail,
                pick(residual, dims[12], i),
                precision,
            )
            for i in range(size)
        ]
        return torch.stack(slices), 0

    batch = input.shape[0] if dims[0] is None else input.movedim(dims[0], 0).shape[1]
    if (
        dims[3] is None
        and dims[4] is None
        and all(p is None or p.dim() == 1 for p in (norm_weight, norm_bias))
    ):
        folded_weight, folded_bias = norm_weight, norm_bias
    else:
        folded_weight = common.fold_param(norm_weight, dims[3], size, batch)
        folded_bias = common.fold_param(norm_bias, dims[4], size, batch)
    output = _op(
        common.fold(input, dims[0], size, batch),
        weight,
        None if dims[2] is not None else bias,  # unused: a vmapped one needs no folding
        folded_weight,
        folded_bias,
        *tail,
        common.fold(residual, dims[12], size, batch),
        precision,
    )
    return output.reshape(size, batch, *output.shape[1:]), 0


common.register_kernel(NAME, "Autograd", _autograd, with_keyset=True)
common.register_autocast(NAME, _autocast)
torch.library.register_vmap("styleforge::fused_conv_instance_norm_relu", _vmap)
