"""``ResidualBlock``: two fused convolutions; the second operator absorbs the addition of the input."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from styleforge.nn.fused_conv_instance_norm_relu import FusedConvInstanceNormReLU


class ResidualBlock(nn.Module):
    """``activation(in2(conv2(relu(in1(conv1(x))))) + x)``, two operator calls, no separate addition.

    Args:
        channels: of input and output.
        kernel_size: odd, so that the size stays the same.
        stride: 1; there for the seed's signature, another one would change the size of the branch.
        padding_mode: zeros, reflect or replicate.
        activation: after the addition: relu (default), none (Johnson et al. 2016, CycleGAN), or another one.
        eps: of the norms.
        bias: whether the convolutions have one (unused, see ``FusedConvInstanceNormReLU``).
        affine: learnable scale and shift after the norms.
        precision: as in ``FusedConvInstanceNormReLU``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        conv1: ``FusedConvInstanceNormReLU`` with ReLU.
        conv2: ``FusedConvInstanceNormReLU`` with the block's activation; takes the input as its residual.

    Shape:
        [N, channels, H, W] in and out.

    Raises:
        ValueError: even kernel size, stride other than 1, or an argument that ``FusedConvInstanceNormReLU``
            refuses.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        padding_mode: str = "zeros",
        activation: str = "relu",
        eps: float = 1e-5,
        bias: bool = True,
        affine: bool = True,
        precision: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or stride != 1:
            raise ValueError(
                "kernel_size must be odd and stride 1, so that the input can be added, "
                f"got {kernel_size} and {stride}"
            )

        def layer(layer_activation: str) -> FusedConvInstanceNormReLU:
            return FusedConvInstanceNormReLU(
                channels,
                channels,
                kernel_size,
                stride,
                eps=eps,
                bias=bias,
                affine=affine,
                padding_mode=padding_mode,
                activation=layer_activation,
                precision=precision,
                device=device,
                dtype=dtype,
            )

        self.conv1 = layer("relu")
        self.conv2 = layer(activation)

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, channels, H, W] to the same shape."""
        output: Tensor = self.conv2(self.conv1(input), input)
        return output

    def load_from_pytorch_block(
        self,
        conv1: nn.Conv2d,
        in1: nn.InstanceNorm2d,
        relu1: nn.Module | None,
        conv2: nn.Conv2d,
        in2: nn.InstanceNorm2d,
        relu2: nn.Module | None = None,
    ) -> None:
        """Copies the parameters of a block written in PyTorch layers.

        Args:
            conv1: the first convolution.
            in1: the norm after it.
            relu1: has no parameters and is ignored.
            conv2: the second convolution.
            in2: the norm after it.
            relu2: ignored as well.

        Raises:
            ValueError: the layers have something that the block does not, or other shapes.
        """
        del relu1, relu2
        self.conv1.load_from_pytorch(conv1, in1)
        self.conv2.load_from_pytorch(conv2, in2)
