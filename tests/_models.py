"""Networks as their users write them, in plain PyTorch: what fusing has to work on unchanged.

``MODELS`` has a case for each: how to build it small, its inputs at a size, and how many places of each
operator a complete fusion finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from styleforge.models.torch_transformer_net import TorchTransformerNet


class CycleGANBlock(nn.Module):
    """Padding, convolution, norm, ReLU, padding, convolution, norm; the input is added."""

    def __init__(self, channels: int, padding_type: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for last in (False, True):
            padding = 0
            if padding_type == "reflect":
                layers.append(nn.ReflectionPad2d(1))
            elif padding_type == "replicate":
                layers.append(nn.ReplicationPad2d(1))
            else:
                padding = 1
            layers.append(nn.Conv2d(channels, channels, 3, padding=padding))
            layers.append(nn.InstanceNorm2d(channels))
            if not last:
                layers.append(nn.ReLU(True))
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class CycleGANGenerator(nn.Module):
    """The ResNet generator of CycleGAN and pix2pix (Zhu et al., 2017)."""

    def __init__(self, width: int = 64, blocks: int = 9, padding_type: str = "reflect") -> None:
        super().__init__()
        w = width
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, w, 7),
            nn.InstanceNorm2d(w),
            nn.ReLU(True),
        ]
        for i in range(2):
            layers += [
                nn.Conv2d(w << i, w << (i + 1), 3, stride=2, padding=1),
                nn.InstanceNorm2d(w << (i + 1)),
                nn.ReLU(True),
            ]
        layers += [CycleGANBlock(4 * w, padding_type) for _ in range(blocks)]
        for i in (2, 1):
            layers += [
                nn.ConvTranspose2d(w << i, w << (i - 1), 3, stride=2, padding=1, output_padding=1),
                nn.InstanceNorm2d(w << (i - 1)),
                nn.ReLU(True),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class FlowBlock(nn.Module):
    """Residual block of optical-flow encoders: one ReLU for all, a shortcut that may have a norm too."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.norm1 = nn.InstanceNorm2d(channels)
        self.norm2 = nn.InstanceNorm2d(channels)
        self.downsample = None
        if stride != 1:
            self.norm3 = nn.InstanceNorm2d(channels)
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride), self.norm3
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        y = self.relu(self.norm1(self.conv1(y)))
        y = self.relu(self.norm2(self.conv2(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(x + y)


class FlowEncoder(nn.Module):
    """The feature encoder of an optical-flow network: two pictures as a list go through as one batch."""

    def __init__(self, width: int = 64, out_channels: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        w = width
        self.norm1 = nn.InstanceNorm2d(w)
        self.conv1 = nn.Conv2d(3, w, kernel_size=7, stride=2, padding=3)
        self.relu1 = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(FlowBlock(w, w, 1), FlowBlock(w, w, 1))
        self.layer2 = nn.Sequential(FlowBlock(w, w + w // 2, 2), FlowBlock(w + w // 2, w + w // 2, 1))
        self.layer3 = nn.Sequential(FlowBlock(w + w // 2, 2 * w, 2), FlowBlock(2 * w, 2 * w, 1))
        self.dropout = nn.Dropout2d(p=dropout) if dropout > 0 else None
        self.conv2 = nn.Conv2d(2 * w, out_channels, kernel_size=1)

    def forward(self, x):  # type: ignore[no-untyped-def]
        is_list = isinstance(x, tuple) or isinstance(x, list)  # noqa: SIM101
        if is_list:
            batch_dim = x[0].shape[0]
            x = torch.cat(x, dim=0)
        x = self.conv1(x)
        x = self.norm1(x)
        x = self.relu1(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.conv2(x)
        if self.training and self.dropout is not None:
            x = self.dropout(x)
        if is_list:
            x = torch.split(x, [batch_dim, batch_dim], dim=0)
        return x


class TwoStreams(nn.Module):
    """Both frames through one encoder, and their correlation."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fnet = FlowEncoder(width, 2 * width)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.fnet([first, second])
        return (a * b).sum(1, keepdim=True)


class ConvDropoutNormNonlin(nn.Module):
    """nnU-Net's smallest part."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, dilation=1, bias=True)
        self.dropout: nn.Module | None = None
        self.instnorm = nn.InstanceNorm2d(channels, eps=1e-5, affine=True, momentum=0.1)
        self.lrelu = nn.LeakyReLU(negative_slope=1e-2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.lrelu(self.instnorm(x))


class UNetStage(nn.Module):
    """Two levels of an nnU-Net in two dimensions, down and up again."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.down1 = nn.Sequential(ConvDropoutNormNonlin(1, w), ConvDropoutNormNonlin(w, w))
        self.down2 = nn.Sequential(ConvDropoutNormNonlin(w, 2 * w, 2), ConvDropoutNormNonlin(2 * w, 2 * w))
        self.tu = nn.ConvTranspose2d(2 * w, w, 2, stride=2, bias=False)
        self.up1 = nn.Sequential(ConvDropoutNormNonlin(2 * w, w), ConvDropoutNormNonlin(w, w))
        self.seg = nn.Conv2d(w, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        x = self.tu(self.down2(skip))
        return self.seg(self.up1(torch.cat((x, skip), dim=1)))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with six layers."""

    def __init__(self, width: int = 64, layers: int = 6, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens)


class Mlp(nn.Module):
    """As in timm."""

    def __init__(self, width: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class ViTBlock(nn.Module):
    """A vision transformer's block with PyTorch's attention."""

    def __init__(self, width: int = 64, heads: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attn(y, y, y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, two blocks, pooling."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.ModuleList([ViTBlock(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).mean(1)


class Functional(nn.Module):
    """Functions instead of layers, parameters of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 3, 3, 3) / 5)
        self.weight2 = nn.Parameter(torch.randn(width, width, 3, 3) / 9)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(torch.randn(width))
        self.fc1 = nn.Parameter(torch.randn(2 * width, width) / 3)
        self.fc2 = nn.Parameter(torch.randn(width, 2 * width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, stride=2)
        x = F.leaky_relu(F.instance_norm(x, weight=self.scale, bias=self.shift), 0.2)
        y = F.conv2d(F.pad(F.interpolate(x, scale_factor=2), (1, 1, 1, 1)), self.weight2)
        y = torch.tanh(F.instance_norm(y, eps=1e-3) + F.interpolate(x, scale_factor=2.0))
        z = y.flatten(2).transpose(1, 2)
        return z + F.linear(F.silu(F.linear(z, self.fc1)), self.fc2)


def pictures(size: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, size, size + 4)


@dataclass
class Case:
    """A network of ``MODELS``.

    Attributes:
        build: a small one, in training mode.
        inputs: for a size of about 16 to 64.
        conv, norm, ffn, attention: how many places there are, in the terms of the operators.
        last: whether the last layer is a reflection-padded convolution to a few channels.
        left: reasons that the report has to give, by a part of the name or kind.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Sequence[Tensor]]
    conv: int = 0
    norm: int = 0
    ffn: int = 0
    attention: int = 0
    last: int = 0
    left: dict[str, str] = field(default_factory=dict)


NO_NORM = "no InstanceNorm2d after it"
MODELS: dict[str, Case] = {
    "transformer_net": Case(
        lambda: TorchTransformerNet(4),
        lambda size: (pictures(size),),
        conv=15,
        last=1,
    ),
    "cyclegan_reflect": Case(
        lambda: CycleGANGenerator(4, padding_type="reflect"),
        lambda size: (pictures(size),),
        conv=21,
        norm=2,
        last=1,
        left={"ConvTranspose2d": "no operator for it"},
    ),
    "cyclegan_zeros": Case(
        lambda: CycleGANGenerator(4, padding_type="zeros"),
        lambda size: (pictures(size),),
        conv=21,
        norm=2,
        last=1,
        left={"ConvTranspose2d": "no operator for it"},
    ),
    "two_streams": Case(
        lambda: TwoStreams(4),
        lambda size: (pictures(size), pictures(size)),
        conv=15,
        left={"fnet.conv2": NO_NORM},
    ),
    "unet_stage": Case(
        lambda: UNetStage(4),
        lambda size: (pictures(size - size % 2, 2, 1),),
        conv=6,
        left={"seg": NO_NORM, "tu": "no operator for it"},
    ),
    "encoder": Case(
        lambda: Encoder(16),
        lambda size: (torch.randn(2, size, 16),),
        ffn=6,
        attention=6,
    ),
    "encoder_post_norm": Case(
        lambda: Encoder(16, 2, norm_first=False),
        lambda size: (torch.randn(2, size, 16),),
        ffn=2,
        attention=2,
    ),
    "vit": Case(
        lambda: ViT(16),
        lambda size: (torch.rand(2, 3, 4 * (size // 4), 4 * (size // 4)),),
        ffn=2,
        attention=2,
        left={"patches": NO_NORM},
    ),
    "functional": Case(
        lambda: Functional(8),
        # Two pictures: for one, PyTorch 2.13's CPU instance norm has wrong gradients where what follows it
        # gives a channels_last gradient, as the transposition here does.
        lambda size: (pictures(size, 2),),
        conv=2,
        ffn=1,
    ),
}
