"""CUDA tensors without the CUDA library: every operator as its composite in plain PyTorch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge import _library
from styleforge.ops import _common as common
from styleforge.ops import _composite as composite
from styleforge.ops._cast import composite as widen
from styleforge.ops._column_gradient import composite as column_gradient
from styleforge.ops._convolution import composite as convolution
from styleforge.ops._convolution import composite_backward as convolution_backward
from styleforge.ops._pad_upsample import composite_backward
from styleforge.ops._reflect_conv2d import reflect_conv2d
from styleforge.ops._unfold_columns import composite as unfold_columns

_logger = logging.getLogger("styleforge")


def register() -> None:
    """Registers the composites for CUDA, if PyTorch has CUDA and ``libstyleforge_cuda.so`` was not loaded."""
    if torch.version.cuda is None or _library.cuda_available:
        return
    _logger.debug("CUDA tensors take the composite path: %s", _library.cuda_error)
    common.register_kernel("fused_instance_norm", "CUDA", _instance_norm)
    common.register_kernel("_fused_instance_norm_forward", "CUDA", _instance_norm_forward)
    common.register_kernel("_fused_instance_norm_backward", "CUDA", _instance_norm_backward)
    common.register_kernel("fused_conv_instance_norm_relu", "CUDA", _conv_instance_norm_relu)
    common.register_kernel("fused_ffn", "CUDA", _ffn)
    common.register_kernel("_fused_ffn_forward", "CUDA", _ffn_forward)
    common.register_kernel("_fused_ffn_backward", "CUDA", _ffn_backward)
    for name in ("fused_attention", "fused_attention_v1", "fused_attention_v2"):
        common.register_kernel(name, "CUDA", _attention)
    common.register_kernel("_fused_attention_forward", "CUDA", _attention_forward)
    common.register_kernel("_fused_attention_backward", "CUDA", _attention_backward)
    common.register_kernel("_pad_upsample", "CUDA", _pad_upsample)
    common.register_kernel("_pad_upsample_backward", "CUDA", composite_backward)
    common.register_kernel("_unfold_columns", "CUDA", unfold_columns)
    common.register_kernel("_column_gradient", "CUDA", column_gradient)
    common.register_kernel("_convolution", "CUDA", convolution)
    common.register_kernel("_convolution_backward", "CUDA", convolution_backward)
    common.register_kernel("_widen", "CUDA", widen)
    common.register_kernel("_reflect_conv2d", "CUDA", reflect_conv2d)


def _match(output: Tensor, input: Tensor) -> Tensor:
    return common.in_format(output, common.prefers_channels_last(input))


def _instance_norm(input: Tensor, *args: Any) -> Tensor:
    return _match(composite.instance_norm(input, *args), input)


def _instance_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.double() if input.dtype == torch.float64 else input.float()
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    output = composite.instance_norm(input, weight, bias, eps, activation, negative_slope, residual)
    return _match(output, input), mean, torch.rsqrt(variance + eps)


def _instance_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = mean.dtype
    xhat = (input.to(dtype) - composite.per_channel(mean)) * composite.per_channel(rstd)
    pre = xhat
    if weight is not None:
        pre = pre * composite.per_channel(weight).to(dtype)
    if bias is not None:
        pre = pre + composite.per_channel(bias).to(dtype)
    if residual is not None:
        pre = pre + residual.to(dtype)
    g = grad_output.to(dtype)
    if activation == "none":
        pass
    elif output is not None:
        y = output.to(dtype)
        if activation == "sigmoid":
            g = g * (y * (1 - y))
        elif activation == "tanh":
            g = g * (1 - y * y)
        else:
            slope = negative_slope if activation == "leaky_relu" else 0.0
            g = torch.where(y > 0, g, g * slope)
    else:
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            (g,) = torch.autograd.grad(composite.activate(leaf, activation, negative_slope), leaf, g)
    grad_bias = g.sum((2, 3))
    grad_weight = (g * xhat).sum((2, 3))
    pixels = max(input.shape[2] * input.shape[3], 1)
    centred = (
        g - composite.per_channel(grad_bias) / pixels - xhat * (composite.per_channel(grad_weight) / pixels)
    )
    grad_input = centred * composite.per_channel(rstd)
    if weight is not None:
        grad_input = grad_input * composite.per_channel(weight).to(dtype)
    param = weight if weight is not None else bias
    param_dtype = param.dtype if param is not None else torch.float32

    def finish(grad: Tensor, given: Tensor | None) -> Tensor:
        if given is None:
            return torch.empty(0, dtype=param_dtype, device=input.device)
        return (grad.sum(0) if given.dim() == 1 else grad).to(param_dtype)

    has_residual = (residual is not None or output is not None) and activation != "none"
    grad_residual = _match(g.to(input.dtype), input) if has_residual else input.new_empty(0)
    return (
        _match(grad_input.to(input.dtype), input),
        finish(grad_weight, weight),
        finish(grad_bias, bias),
        grad_residual,
    )


def _conv_instance_norm_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    *args: Any,
) -> Tensor:
    output = composite.conv_instance_norm_relu(
        input, weight, bias, norm_weight, norm_bias, common.pair(stride), common.pair(padding), *args
    )
    return _match(output, input)


def _ffn(input: Tensor, *args: Any) -> Tensor:
    return composite.ffn(input, *args).contiguous()


def _ffn_forward(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    hidden = F.linear(input, fc1_weight)
    activated = composite.ffn_activate(hidden if fc1_bias is None else hidden + fc1_bias, activation)
    output = F.linear(activated, fc2_weight, fc2_bias)
    return (output if residual is None else output + residual).contiguous(), hidden.contiguous()


def _ffn_backward(
    grad_output: Tensor,
    input: Tensor,
    hidden: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    activation: str,
    precision: str,
    needs_input: bool,
    needs_fc1_weight: bool,
    needs_fc1_bias: bool,
    needs_fc2_weight: bool,
    needs_fc2_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = math.prod(input.shape[:-1])
    rows = grad_output.reshape(count, fc2_weight.shape[0])
    with torch.enable_grad():
        pre = hidden.detach().reshape(count, fc1_weight.shape[0])
        leaf = (pre if fc1_bias is None else pre + fc1_bias.detach()).requires_grad_()
        activated = composite.ffn_activate(leaf, activation)
    (grad_hidden,) = torch.autograd.grad(activated, leaf, rows @ fc2_weight)
    activated = activated.detach()

    def gradient(needed: bool, value: Callable[[], Tensor]) -> Tensor:
        return value().contiguous() if needed else input.new_empty(0)

    return (
        gradient(needs_input, lambda: (grad_hidden @ fc1_weight).reshape(input.shape)),
        gradient(needs_fc1_weight, lambda: grad_hidden.t() @ input.reshape(count, input.shape[-1])),
        gradient(needs_fc1_bias, lambda: grad_hidden.sum(0)),
        gradient(needs_fc2_weight, lambda: rows.t() @ activated),
        gradient(needs_fc2_bias, lambda: rows.sum(0)),
    )


def _attention(input: Tensor, *args: Any) -> Tensor:
    return composite.attention(input, *args).contiguous()


def _attention_forward(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    precision: str,
    version: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = F.linear(input, qkv_weight, qkv_bias).contiguous()
    heads = composite.attention_heads(qkv, num_heads, scale, is_causal, key_padding_mask).contiguous()
    # The backward below computes the softmax again, and looks at no logsumexp.
    dtype = common.statistics_dtype(input)
    logsumexp = input.new_zeros((input.shape[0], num_heads, input.shape[1]), dtype=dtype)
    return F.linear(heads, out_weight, out_bias).contiguous(), qkv, heads, logsumexp


def _attention_backward(
    grad_output: Tensor,
    input: Tensor,
    qkv: Tensor,
    attention: Tensor,
    logsumexp: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    num_heads: int,
    scale: float | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    precision: str,
    needs_input: bool,
    needs_qkv_weight: bool,
    needs_qkv_bias: bool,
    needs_out_weight: bool,
    needs_out_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, embed = math.prod(input.shape[:2]), input.shape[2]
    rows = grad_output.reshape(count, embed)
    grad_qkv = qkv.new_empty(count, 3 * embed)
    if needs_input or needs_qkv_weight or needs_qkv_bias:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            heads = composite.attention_heads(leaf, num_heads, scale, is_causal, key_padding_mask)
        (grad_qkv,) = torch.autograd.grad(heads, leaf, (rows @ out_weight).reshape(input.shape))
        grad_qkv = grad_qkv.reshape(count, 3 * embed)

    def gradient(needed: bool, value: Callable[[], Tensor]) -> Tensor:
        return value().contiguous() if needed else input.new_empty(0)

    return (
        gradient(needs_input, lambda: (grad_qkv @ qkv_weight).reshape(input.shape)),
        gradient(needs_qkv_weight, lambda: grad_qkv.t() @ input.reshape(count, embed)),
        gradient(needs_qkv_bias, lambda: grad_qkv.sum(0)),
        gradient(needs_out_weight, lambda: rows.t() @ attention.reshape(count, embed)),
        gradient(needs_out_bias, lambda: rows.sum(0)),
    )


def _pad_upsample(
    input: Tensor, padding: Sequence[int], padding_mode: str = "zeros", upsample: int = 1
) -> Tensor:
    padded = composite.pad_upsample(input, common.pair(padding), padding_mode, upsample)
    return _match(padded.clone() if padded is input else padded, input)
