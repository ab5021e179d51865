"""What `styleforge bench` measures: each case is a plain PyTorch module, its fused form, and a shape.

A case is written as text, which is its name in every table:

| operator | text | meaning |
|---|---|---|
| attention | 2x256x128/4 | batch x length x embed / heads |
| ffn | 8x1024x512->2048 | batch x length x embed -> hidden |
| instance-norm | 4x64x256x256 | N x C x H x W, with affine parameters and ReLU |
| conv | 1x64->128@128x128k3s2 | N x Ci -> Co @ H x W, kernel, stride, + norm + ReLU |
| conv, residual | 1x128@64x64 | a residual block of two 3x3 convolutions: N x C @ H x W |
| transformer-net | 1x512x512 | N x H x W of Johnson's style network |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import styleforge
from styleforge.models import TransformerNet

OPERATORS = ("attention", "ffn", "instance-norm", "conv", "transformer-net")
MODES = ("standard", "real-world", "residual")

# The first of each list is what is measured without --suite: the tables of the seed; --suite adds the second.
SUITES: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("attention", "standard"): (
        ("1x128x128/4", "1x256x128/4", "1x512x128/4", "2x256x128/4", "1x256x256/4"),
        ("4x256x512/8", "8x512x256/8", "1x2048x512/8", "1x2048x4096/32"),
    ),
    # ViT-B/16 at 224 pixels, BERT-base, a language model's block
    ("attention", "real-world"): (("8x197x768/12", "8x512x768/12"), ("1x2048x4096/32", "1x4096x4096/32")),
    ("ffn", "standard"): (
        ("1x256x128->512", "8x1024x512->2048"),
        ("4x2048x768->3072", "2x4096x1024->4096", "1x2048x4096->11008"),
    ),
    ("ffn", "real-world"): (("8x197x768->3072", "8x512x768->3072"), ("1x2048x4096->11008",)),
    ("ffn", "residual"): (("1x256x128->512", "8x1024x512->2048"), ("4x2048x768->3072",)),
    ("instance-norm", "standard"): (
        ("4x64x256x256", "1x3x512x512"),
        ("1x64x1024x1024", "16x128x128x128", "1x128x32x32"),
    ),
    # the norms of the style network at 512x512
    ("instance-norm", "real-world"): (
        ("1x32x512x512", "1x64x256x256", "1x128x128x128"),
        ("4x32x512x512", "4x128x128x128"),
    ),
    ("instance-norm", "residual"): (("1x128x128x128", "4x64x256x256"), ("16x128x128x128",)),
    ("conv", "standard"): (
        (
            "1x64->64@64x64k3s1",
            "1x128->128@128x128k3s1",
            "1x64->64@256x256k3s1",
            "1x128->128@32x32k3s1",
            "1x256->256@64x64k1s1",
            "1x64->128@128x128k3s2",
        ),
        ("8x128->128@64x64k3s1", "1x64->64@128x128k5s1", "1x64->64@128x128k4s2", "1x3->32@512x512k9s1"),
    ),
    # the layers of the style network at 512x512, one of each kind
    ("conv", "real-world"): (
        ("1x3->32@512x512k9s1", "1x32->64@512x512k3s2", "1x64->128@256x256k3s2", "1x128->128@128x128k3s1"),
        ("4x3->32@512x512k9s1", "4x32->64@512x512k3s2", "4x64->128@256x256k3s2", "4x128->128@128x128k3s1"),
    ),
    ("conv", "residual"): (
        ("1x64@64x64", "1x128@64x64", "1x128@128x128"),
        ("1x256@64x64", "4x128@128x128", "8x128@64x64"),
    ),
    ("transformer-net", "standard"): (("1x256x256", "1x512x512"), ("1x1024x1024", "4x512x512", "8x512x512")),
    # webcam, 720p and 1080p video frames
    ("transformer-net", "real-world"): (("1x480x640",), ("1x720x1280", "1x1080x1920")),
}

_PATTERNS = {
    "attention": r"(\d+)x(\d+)x(\d+)/(\d+)",
    "ffn": r"(\d+)x(\d+)x(\d+)->(\d+)",
    "instance-norm": r"(\d+)x(\d+)x(\d+)x(\d+)",
    "conv": r"(\d+)x(\d+)->(\d+)@(\d+)x(\d+)k(\d+)s(\d+)",
    "block": r"(\d+)x(\d+)@(\d+)x(\d+)",
    "transformer-net": r"(\d+)x(\d+)x(\d+)",
}
_EXAMPLES = {
    "attention": "2x256x128/4",
    "ffn": "8x1024x512->2048",
    "instance-norm": "4x64x256x256",
    "conv": "1x64->128@128x128k3s2",
    "block": "1x128@64x64",
    "transformer-net": "1x512x512",
}


class _SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of one tensor, without the weights."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embed, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class _Shortcut(nn.Module):
    """``activation(layers(x) + x)`` in plain layers."""

    def __init__(self, layers: nn.Module, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) + x
        return y if self.activation is None else self.activation(y)


class _FusedShortcut(nn.Module):
    """A fused module that takes its own input as the residual."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x)
        return y


@dataclass(frozen=True)
class Case:
    """One shape of one operator.

    Attributes:
        operator: one of ``OPERATORS``; mode: one of ``MODES``; name: the shape as text.
        input_shape: of the one input tensor.
        output_elements: of the result.
        operations: floating-point operations of the plain layers' products (0: only memory counts).
        items: tokens or pictures of a call; unit: which of the two.
        modules: makes the plain module and the fused one, with the same parameters, on the CPU in float32.
    """

    operator: str
    mode: str
    name: str
    input_shape: tuple[int, ...]
    output_elements: int
    operations: float
    items: int
    unit: str
    modules: Callable[[], tuple[nn.Module, nn.Module]]

    @property
    def picture(self) -> bool:
        """Whether the input is [N, C, H, W], so that memory formats matter."""
        return len(self.input_shape) == 4

    def input(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Random values: 0..255 for the style network, else normally distributed."""
        if self.operator == "transformer-net":
            return (torch.rand(self.input_shape, device=device) * 255).to(dtype)
        return torch.randn(self.input_shape, device=device).to(dtype)


def cases(operator: str, mode: str, suite: bool) -> list[Case]:
    """The cases of an operator; none where it has no such mode."""
    few, more = SUITES.get((operator, mode), ((), ()))
    return [parse(operator, mode, text) for text in (few + more if suite else few)]


def parse(operator: str, mode: str, text: str) -> Case:
    """The case that a text stands for.

    Raises:
        ValueError: the text is not of the operator's form, or a size in it is impossible.
    """
    kind = "block" if operator == "conv" and mode == "residual" else operator
    match = re.fullmatch(_PATTERNS[kind], text)
    if match is None or 0 in (sizes := [int(group) for group in match.groups()]):
        raise ValueError(f"a case of {operator} is written like {_EXAMPLES[kind]}, got '{text}'")
    if operator == "attention" and sizes[2] % sizes[3]:
        raise ValueError(f"heads must divide embed, got '{text}'")
    make: Any = {
        "attention": _attention,
        "ffn": _ffn,
        "instance-norm": _norm,
        "conv": _conv,
        "block": _block,
        "transformer-net": _net,
    }[kind]
    case: Case = make(mode, text, *sizes)
    return case


def _attention(mode: str, name: str, n: int, length: int, embed: int, heads: int) -> Case:
    def modules() -> tuple[nn.Module, nn.Module]:
        plain = _SelfAttention(embed, heads)
        return plain, styleforge.FusedAttention.from_torch(plain.attention)

    tokens = n * length
    operations = 8 * tokens * embed**2 + 4 * tokens * length * embed
    shape = (n, length, embed)
    return Case("attention", mode, name, shape, tokens * embed, operations, tokens, "tokens", modules)


def _ffn(mode: str, name: str, n: int, length: int, embed: int, hidden: int) -> Case:
    def modules() -> tuple[nn.Module, nn.Module]:
        plain = nn.Sequential(nn.Linear(embed, hidden), nn.GELU(), nn.Linear(hidden, embed))
        ours = styleforge.FusedFFN.from_torch(plain)
        return (_Shortcut(plain), _FusedShortcut(ours)) if mode == "residual" else (plain, ours)

    tokens = n * length
    shape = (n, length, embed)
    return Case(
        "ffn", mode, name, shape, tokens * embed, 4 * tokens * embed * hidden, tokens, "tokens", modules
    )


def _norm(mode: str, name: str, n: int, c: int, h: int, w: int) -> Case:
    def modules() -> tuple[nn.Module, nn.Module]:
        norm = _random_affine(nn.InstanceNorm2d(c, affine=True))
        ours = styleforge.FusedInstanceNorm2d.from_torch(norm, activation="relu")
        if mode == "residual":
            return _Shortcut(norm, F.relu), _FusedShortcut(ours)
        return nn.Sequential(norm, nn.ReLU()), ours

    return Case("instance-norm", mode, name, (n, c, h, w), n * c * h * w, 0, n, "pictures", modules)


def _conv(mode: str, name: str, n: int, ci: int, co: int, h: int, w: int, kernel: int, stride: int) -> Case:
    padding = (kernel - 1) // 2

    def modules() -> tuple[nn.Module, nn.Module]:
        conv = nn.Conv2d(ci, co, kernel, stride, padding)
        norm = _random_affine(nn.InstanceNorm2d(co, affine=True))
        ours = styleforge.FusedConvInstanceNormReLU(ci, co, kernel, stride, padding)
        ours.load_from_pytorch(conv, norm)
        return nn.Sequential(conv, norm, nn.ReLU()), ours

    outputs = n * co * ((h + 2 * padding - kernel) // stride + 1) * ((w + 2 * padding - kernel) // stride + 1)
    operations = 2 * outputs * ci * kernel**2
    return Case("conv", mode, name, (n, ci, h, w), outputs, operations, n, "pictures", modules)


def _block(mode: str, name: str, n: int, c: int, h: int, w: int) -> Case:
    def modules() -> tuple[nn.Module, nn.Module]:
        convs = [nn.Conv2d(c, c, 3, 1, 1) for _ in range(2)]
        norms = [_random_affine(nn.InstanceNorm2d(c, affine=True)) for _ in range(2)]
        ours = styleforge.ResidualBlock(c)
        ours.load_from_pytorch_block(convs[0], norms[0], None, convs[1], norms[1])
        return _Shortcut(nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1]), F.relu), ours

    pixels = n * c * h * w
    return Case("conv", mode, name, (n, c, h, w), pixels, 2 * 2 * pixels * c * 9, n, "pictures", modules)


def _net(mode: str, name: str, n: int, h: int, w: int) -> Case:
    if min(h, w) < 16:
        raise ValueError(f"height and width must be at least 16, got '{name}'")

    def modules() -> tuple[nn.Module, nn.Module]:
        ours = TransformerNet()
        return ours.to_torch(), ours

    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        TransformerNet().to_torch()(torch.empty(n, 3, h, w))
    operations = counter.get_total_flops()
    return Case(
        "transformer-net", mode, name, (n, 3, h, w), n * 3 * h * w, operations, n, "pictures", modules
    )


def _random_affine(norm: nn.InstanceNorm2d) -> nn.InstanceNorm2d:
    """With ones and zeros, a scale or a shift that is left out would go unnoticed."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    return norm
