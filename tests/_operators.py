"""Every operator as a module that takes a picture [N, 4, H, W], for the tests of the ways in.

``reference`` is the same by the formulas of ``_reference``, in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from _reference import conv_instance_norm, ffn, instance_norm


class Norm(nn.Module):
    """fused_instance_norm with everything it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.styleforge.fused_instance_norm(x, self.weight, self.bias, 1e-5, "silu", 0.01, x)

    def reference(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.weight, self.bias, 1e-5, "silu", 0.01, x)


class Conv(nn.Module):
    """fused_conv_instance_norm_relu with everything it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        self.bias = nn.Parameter(torch.randn(4))
        self.norm_weight = nn.Parameter(torch.rand(4) + 0.5)
        self.norm_bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.styleforge.fused_conv_instance_norm_relu(
            x,
            self.weight,
            self.bias,
            self.norm_weight,
            self.norm_bias,
            [1, 1],
            [1, 1],
            "reflect",
            1,
            1e-5,
            "leaky_relu",
            0.2,
            x,
            "ieee",
        )

    def reference(self, x: Tensor) -> Tensor:
        given = (self.weight, self.bias, self.norm_weight, self.norm_bias)
        return conv_instance_norm(x, *given, (1, 1), (1, 1), "reflect", 1, 1e-5, "leaky_relu", 0.2, x)


class Ffn(nn.Module):
    """fused_ffn with everything it takes, over the channels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.randn(10, 4) / 2)
        self.fc1_bias = nn.Parameter(torch.randn(10))
        self.fc2_weight = nn.Parameter(torch.randn(4, 10) / 3)
        self.fc2_bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        y = torch.ops.styleforge.fused_ffn(
            rows, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, "gelu", rows, "ieee"
        ).permute(0, 3, 1, 2)
        if x.is_contiguous(memory_format=torch.channels_last):
            return y
        return y.contiguous()

    def reference(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        given = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return ffn(rows, *given, "gelu", rows).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """fused_attention, causal, two heads, over the pixels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_weight = nn.Parameter(torch.randn(12, 4) / 2)
        self.qkv_bias = nn.Parameter(torch.randn(12))
        self.out_weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.out_bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = torch.ops.styleforge.fused_attention(
            tokens, self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias, 2, None, True
        )
        return y.transpose(1, 2).reshape(x.shape)

    def reference(self, x: Tensor) -> Tensor:
        tokens = x.double().flatten(2).transpose(1, 2)
        qkv = tokens @ self.qkv_weight.double().T + self.qkv_bias.double()
        q, k, v = (part.unflatten(2, (2, 2)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = q @ k.transpose(2, 3) / math.sqrt(2)
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        heads = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        y = heads.transpose(1, 2).flatten(2) @ self.out_weight.double().T + self.out_bias.double()
        return y.transpose(1, 2).reshape(x.shape)


class AttentionV1(Attention):
    """The design for short sequences."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = torch.ops.styleforge.fused_attention_v1(
            tokens, self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias, 2, None, True
        )
        return y.transpose(1, 2).reshape(x.shape)


class AttentionV2(Attention):
    """The design for any length."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = torch.ops.styleforge.fused_attention_v2(
            tokens, self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias, 2, None, True
        )
        return y.transpose(1, 2).reshape(x.shape)


MODULES: dict[str, type[nn.Module]] = {
    "fused_instance_norm": Norm,
    "fused_conv_instance_norm_relu": Conv,
    "fused_ffn": Ffn,
    "fused_attention": Attention,
    "fused_attention_v1": AttentionV1,
    "fused_attention_v2": AttentionV2,
}
MODULES = {name: module for name, module in MODULES.items() if hasattr(torch.ops.styleforge, name)}


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
