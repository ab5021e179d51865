"""Layers that are fused as they stand: transformer layers, attention, instance norms in unreadable networks.

Each is a subclass of PyTorch's layer without state of its own; a layer becomes one by a change of its class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from styleforge.fuse import _attention, _calls, _layers
from styleforge.nn.fused_ffn import _activation_of
from styleforge.ops import matmul_precision
from styleforge.ops.fused_attention import MAX_HEAD_DIM


class FusedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that takes ``fused_attention`` for self-attention without weights.

    That is: query, key and value are one tensor [N, L, E] (``batch_first``) or [L, N, E],
    ``need_weights=False``, no attention mask but a causal one that is said to be (``is_causal=True``), a
    boolean key padding mask or none, no dropout. Any other call runs as in PyTorch.
    """

    _styleforge_original = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        masked = attn_mask is not None and not is_causal
        mask_fits = key_padding_mask is None or key_padding_mask.dtype == torch.bool
        own = query is key and key is value and query.dim() == 3 and not query.is_nested
        drops = self.training and self.dropout > 0
        if need_weights or masked or not mask_fits or not own or drops:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        output = _attention.self_attention(
            query,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.out_proj.weight,
            self.out_proj.bias,
            key_padding_mask,
            is_causal,
            not self.batch_first,
        )
        return output, None


class FusedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` whose feed-forward part, with its addition, is one operator.

    Nested tensors take PyTorch's own inference path.
    """

    _styleforge_original = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``nn.TransformerEncoderLayer``."""
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return _feed_forward(self, self.norm2(x), x, self.dropout2)
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        normed: Tensor = self.norm2(_feed_forward(self, x, x, self.dropout2))
        return normed


class FusedTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer`` whose feed-forward part is one operator."""

    _styleforge_original = nn.TransformerDecoderLayer

    def _ff_block(self, x: Tensor) -> Tensor:
        return _feed_forward(self, x, None, self.dropout3)


class FusedLoneInstanceNorm2d(nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` through ``fused_instance_norm``."""

    _styleforge_original = nn.InstanceNorm2d

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.InstanceNorm2d``."""
        self._check_input_dim(input)
        return _calls.instance_norm(input, self.weight, self.bias, None, self.eps, "none", 0.01, True)


def _feed_forward(layer: Any, x: Tensor, residual: Tensor | None, dropout: nn.Dropout) -> Tensor:
    activation = _activation_of(layer.activation)
    assert activation is not None  # checked before the layer was taken
    return _calls.ffn(
        x,
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        residual,
        activation,
        layer.dropout.p,
        layer.dropout.training,
        dropout.p,
        dropout.training,
        matmul_precision(),
    )


def swap(module: nn.Module) -> tuple[str | None, str | None]:
    """Changes the class of a layer where that is possible.

    Returns:
        The operator that it takes now, or why it was left; (None, None) for a module that is no such layer.
    """
    kind = _layers.layer_type(module)
    if kind not in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        return None, None
    if kind is not type(module):
        return None, "it is parametrized"
    reason = _attention_problem(module) if kind is nn.MultiheadAttention else _layer_problem(module)
    if reason is not None:
        return None, reason
    if kind is nn.MultiheadAttention:
        module.__class__ = FusedMultiheadAttention
        return "fused_attention", None
    encoder = kind is nn.TransformerEncoderLayer
    module.__class__ = FusedTransformerEncoderLayer if encoder else FusedTransformerDecoderLayer
    return "fused_ffn", None


def _attention_problem(m: Any) -> str | None:
    if m.head_dim > MAX_HEAD_DIM:
        return f"its heads are wider than {MAX_HEAD_DIM}"
    if not m._qkv_same_embed_dim:
        return "query, key and value have widths of their own"
    if m.bias_k is not None or m.bias_v is not None or m.add_zero_attn:
        return "it has keys or values besides the input's"
    if _layers.has_hooks(m.out_proj):
        return "out_proj has hooks"
    return None


def _layer_problem(m: Any) -> str | None:
    if _activation_of(m.activation) is None:
        return f"its activation {m.activation!r} has no operator"
    for name in ("linear1", "linear2", "dropout", "dropout2", "dropout3", "activation"):
        inner = getattr(m, name, None)
        if isinstance(inner, nn.Module) and _layers.has_hooks(inner):
            return f"{name} has hooks"
    expected = {"linear1": nn.Linear, "linear2": nn.Linear, "dropout": nn.Dropout}
    for name, kind in expected.items():
        inner = getattr(m, name)
        if _layers.layer_type(inner) is not kind:
            return f"{name} is a {type(inner).__name__}"
    return None
