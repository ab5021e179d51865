"""The perceptual loss of Johnson et al. (2016): content features, style Gram matrices, total variation.

Content and style terms are divided by the energy of their targets, so that their weights mean the same with
every VGG-19 file: the original Caffe weights and torchvision's differ in activation scale, and layers among
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .vgg import VGG19Features


class Losses(NamedTuple):
    """The weighted terms of one batch, scalars."""

    content: Tensor
    style: Tensor
    variation: Tensor

    @property
    def total(self) -> Tensor:
        """What to minimise."""
        return self.content + self.style + self.variation


def gram_matrix(features: Tensor) -> Tensor:
    """Correlations between channels, ``[N, C, C]``, float32 whatever the features' dtype.

    Args:
        features: activations ``[N, C, H, W]``.

    Returns:
        ``F F^T / (C H W)``, the normalisation of Johnson et al., equation 3.
    """
    n, c, h, w = features.shape
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().reshape(n, c, h * w)
        return flat @ flat.transpose(1, 2) / (c * h * w)


def total_variation(pictures: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, with pixels in 0..1."""
    pictures = pictures.float() / 255
    vertical = (pictures[:, :, 1:] - pictures[:, :, :-1]).square().mean()
    horizontal = (pictures[:, :, :, 1:] - pictures[:, :, :, :-1]).square().mean()
    return vertical + horizontal


class PerceptualLoss(nn.Module):
    """Compares stylised pictures with their originals in content and with one picture in style.

    Args:
        vgg: features that include all the layers below.
        style_picture: RGB ``[1, 3, H, W]`` in 0..255.
        style_layers: activations whose Gram matrices are matched, each with the same weight.
        content_layer: activation that is matched directly.
        content_weight: weight of the relative content error, of the order of 1.
        style_weight: weight of the relative Gram error, averaged over the layers.
        tv_weight: weight of the total variation.
    """

    def __init__(
        self,
        vgg: VGG19Features,
        style_picture: Tensor,
        *,
        style_layers: Sequence[str],
        content_layer: str,
        content_weight: float,
        style_weight: float,
        tv_weight: float,
    ) -> None:
        super().__init__()
        self.vgg = vgg
        self.style_layers = tuple(style_layers)
        self.content_layer = content_layer
        self.content_weight = content_weight
        self.style_weight = style_weight
        self.tv_weight = tv_weight
        with torch.no_grad():
            features = vgg(style_picture)
        self.targets = {layer: gram_matrix(features[layer]) for layer in self.style_layers}

    def forward(self, stylised: Tensor, originals: Tensor) -> Losses:
        """Computes the weighted losses of a batch, both ``[N, 3, H, W]`` in 0..255."""
        with torch.no_grad():
            wanted = self.vgg(originals, until=self.content_layer)[self.content_layer].float()
        features = self.vgg(stylised)
        content = (features[self.content_layer].float() - wanted).square().mean() / wanted.square().mean()
        style = stylised.new_zeros((), dtype=torch.float32)
        for layer in self.style_layers:
            target = self.targets[layer]
            error = (gram_matrix(features[layer]) - target).square().sum((1, 2)).mean()
            style = style + error / target.square().sum()
        return Losses(
            self.content_weight * content,
            self.style_weight * style / len(self.style_layers),
            self.tv_weight * total_variation(stylised),
        )
