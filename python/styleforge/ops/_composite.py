"""The operators in plain PyTorch: their definition, and what CUDA tensors take without the CUDA library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation by its name in the operators' schemas."""
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "silu":
        return F.silu(x)
    if activation == "sigmoid":
        return torch.sigmoid(x)
    if activation == "tanh":
        return torch.tanh(x)
    return x


def per_channel(param: Tensor) -> Tensor:
    """[C] or [N, C] as something that broadcasts over [N, C, H, W]."""
    return param[..., None, None]


def instance_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """``fused_instance_norm`` by PyTorch operators; statistics in float32 or better."""
    x = input if input.dtype in (torch.float32, torch.float64) else input.float()
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        y = y * per_channel(weight).to(x.dtype)
    if bias is not None:
        y = y + per_channel(bias).to(x.dtype)
    if residual is not None:
        y = y + residual.to(x.dtype)
    return activate(y, activation, negative_slope).to(input.dtype)


def pad_upsample(input: Tensor, padding: Sequence[int], padding_mode: str, upsample: int) -> Tensor:
    """Nearest upsampling, then padding by (rows, columns) on both sides."""
    x = input
    if upsample != 1:
        x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
    if padding[0] or padding[1]:
        mode = "constant" if padding_mode == "zeros" else padding_mode
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=mode)
    return x


def reflect_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Reflection padding by half of the kernel, then the convolution."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(pad_upsample(input, padding, "reflect", 1), weight, bias)


def before_convolution(
    input: Tensor, padding: Sequence[int], padding_mode: str, upsample: int
) -> tuple[Tensor, tuple[int, ...]]:
    """pad(upsample(input)) and the padding that is left to the convolution: zeros, which it does itself."""
    if padding_mode == "zeros":
        return pad_upsample(input, (0, 0), "zeros", upsample), tuple(padding)
    return pad_upsample(input, padding, padding_mode, upsample), (0, 0)


def conv_instance_norm_relu(
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
    """``fused_conv_instance_norm_relu`` by PyTorch operators.

    TF32 follows PyTorch's own flags here, not ``precision``.
    """
    x, conv_padding = before_convolution(input, padding, padding_mode, upsample)
    z = F.conv2d(x, weight, None, tuple(stride), conv_padding)
    return instance_norm(z, norm_weight, norm_bias, eps, activation, negative_slope, residual)


def ffn_activate(x: Tensor, activation: str) -> Tensor:
    """The activation of a feed-forward network by its name in the operator's schema."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    return F.silu(x)


def ffn(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """``fused_ffn`` by PyTorch operators. TF32 follows PyTorch's own flags here, not ``precision``."""
    output = F.linear(ffn_activate(F.linear(input, fc1_weight, fc1_bias), activation), fc2_weight, fc2_bias)
    return output if residual is None else output + residual


def attention_heads(
    qkv: Tensor, num_heads: int, scale: float | None, is_causal: bool, key_padding_mask: Tensor | None
) -> Tensor:
    """The stage between the projections: [N, S, 3 E] to [N, S, E]."""
    length = qkv.shape[1]
    q, k, v = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads))).permute(2, 0, 3, 1, 4)
    seen = None
    if key_padding_mask is not None:
        seen = ~key_padding_mask[:, None, None, :]
        if is_causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=qkv.device).tril()
    heads = F.scaled_dot_product_attention(q, k, v, seen, 0.0, is_causal and seen is None, scale=scale)
    return heads.transpose(1, 2).flatten(2)


def attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """``fused_attention`` by PyTorch operators. TF32 follows PyTorch's own flags here, not ``precision``."""
    qkv = F.linear(input, qkv_weight, qkv_bias)
    heads = attention_heads(qkv, num_heads, scale, is_causal, key_padding_mask)
    return F.linear(heads, out_weight, out_bias)
