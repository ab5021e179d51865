"""What rewritten networks call for attention and for whole transformer layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.fuse import _calls
from styleforge.ops import matmul_precision


def self_attention(
    input: Tensor,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    sequence_first: bool = False,
) -> Tensor:
    """Multi-head self-attention with its projections.

    Args:
        input: [N, L, E]; [L, N, E] where ``sequence_first``.
        num_heads: H.
        qkv_weight: [3E, E], as ``nn.MultiheadAttention.in_proj_weight``.
        qkv_bias: [3E] or None.
        out_weight: [E, E].
        out_bias: [E] or None.
        key_padding_mask: bool [N, L], True where a key is padding, or None.
        is_causal: a position sees itself and what is before it.
        sequence_first: the order of the input's first two dimensions.

    Returns:
        As the input.
    """
    x = input.transpose(0, 1) if sequence_first else input
    output: Tensor = torch.ops.styleforge.fused_attention(
        x,
        qkv_weight,
        qkv_bias,
        out_weight,
        out_bias,
        num_heads,
        None,
        is_causal,
        key_padding_mask,
        matmul_precision(),
    )
    return output.transpose(0, 1) if sequence_first else output


def encoder_layer(
    input: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    key_padding_mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``, argument for argument: a transformer layer in inference."""

    def attention(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, out_weight, out_bias)
        return self_attention(x, num_heads, *weights, key_padding_mask)

    def feed_forward(x: Tensor, residual: Tensor) -> Tensor:
        activation = "gelu" if use_gelu else "relu"
        weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return _calls.ffn(x, *weights, residual, activation, 0.0, False, 0.0, False, matmul_precision())

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    if norm_first:
        x = input + attention(norm1(input))
        return feed_forward(norm2(x), x)
    x = norm1(input + attention(input))
    return norm2(feed_forward(x, x))
