"""Every operator as a module that takes a picture [N, 4, H, W], for the tests of the ways in.

``reference`` is the same by the formulas of ``_reference``, in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from test_entry_paths import MODULES as _MODULES


class _Attention(nn.Module):
    """Causal, two heads, over the pixels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_weight = nn.Parameter(torch.randn(12, 4) / 2)
        self.qkv_bias = nn.Parameter(torch.randn(12))
        self.out_weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.out_bias = nn.Parameter(torch.randn(4))

    def reference(self, x: Tensor) -> Tensor:
        tokens = x.double().flatten(2).transpose(1, 2)
        qkv = tokens @ self.qkv_weight.double().T + self.qkv_bias.double()
        q, k, v = (part.unflatten(2, (2, 2)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = q @ k.transpose(2, 3) / math.sqrt(2)
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        heads = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        y = heads.transpose(1, 2).flatten(2) @ self.out_weight.double().T + self.out_bias.double()
        return y.transpose(1, 2).reshape(x.shape)


class AttentionV1(_Attention):
    """The design for short sequences."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = torch.ops.styleforge.fused_attention_v1(
            tokens, self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias, 2, None, True
        )
        return y.transpose(1, 2).reshape(x.shape)


class AttentionV2(_Attention):
    """The design for any length."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = torch.ops.styleforge.fused_attention_v2(
            tokens, self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias, 2, None, True
        )
        return y.transpose(1, 2).reshape(x.shape)


_NAMES = {
    "norm": "fused_instance_norm",
    "conv": "fused_conv_instance_norm_relu",
    "ffn": "fused_ffn",
    "attention": "fused_attention",
}
MODULES: dict[str, type[nn.Module]] = {_NAMES[name]: module for name, module in _MODULES.items()}
for _name, _module in (("fused_attention_v1", AttentionV1), ("fused_attention_v2", AttentionV2)):
    if hasattr(torch.ops.styleforge, _name):
        MODULES[_name] = _module


# --- the same sites in plain PyTorch, for what finds them -------------------------------------------


class PlainNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


class PlainConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PlainFfn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 10), nn.GELU(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


PLAIN: dict[str, type[nn.Module]] = {
    "fused_instance_norm": PlainNorm,
    "fused_conv_instance_norm_relu": PlainConv,
    "fused_ffn": PlainFfn,
    "fused_attention": PlainAttention,
}
