"""The style-transfer network of Johnson et al. (2016) in plain PyTorch layers.

This file needs nothing but PyTorch: it is the yardstick that the fused network is tested against, and what
``TransformerNet.to_torch()`` returns. Layers, parameter names and numerics are those of the fast-neural-style
example in pytorch/examples, so its public checkpoints load as they are.

Source: Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV
2016, with instance instead of batch normalisation (Ulyanov et al., 2016) and resize convolutions (Odena et
al., 2016).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvLayer", "TorchResidualBlock", "TorchTransformerNet", "UpsampleConvLayer"]


class ConvLayer(nn.Module):
    """Reflection padding of ``kernel_size // 2``, then a convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side length of the square kernel.
        stride: step of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.reflection_pad = nn.ReflectionPad2d(kernel_size // 2)
        self.conv2d = nn.Conv2d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``."""
        y: Tensor = self.conv2d(self.reflection_pad(x))
        return y


class UpsampleConvLayer(nn.Module):
    """Nearest-neighbour upsampling, reflection padding of ``kernel_size // 2``, then a convolution.

    Upsampling before the convolution avoids the checkerboard pattern of transposed convolutions.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side length of the square kernel.
        stride: step of the convolution.
        upsample: integer scale factor; 1 leaves the size as it is.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, upsample: int = 1
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.reflection_pad = nn.ReflectionPad2d(kernel_size // 2)
        self.conv2d = nn.Conv2d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, upsample * H, upsample * W]``."""
        if self.upsample > 1:
            x = F.interpolate(x, scale_factor=float(self.upsample), mode="nearest")
        y: Tensor = self.conv2d(self.reflection_pad(x))
        return y


class TorchResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance normalisation and an identity shortcut; no activation after the sum.

    Args:
        channels: channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, kernel_size=3, stride=1)
        self.in1 = nn.InstanceNorm2d(channels, affine=True)
        self.conv2 = ConvLayer(channels, channels, kernel_size=3, stride=1)
        self.in2 = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, channels, H, W]`` to the same shape."""
        y = F.relu(self.in1(self.conv1(x)))
        z: Tensor = self.in2(self.conv2(y))
        return z + x


class TorchTransformerNet(nn.Module):
    """Image-to-image network: downsample twice, five residual blocks, upsample twice.

    Args:
        base_channels: channels after the first layer, 32 in the paper and in public checkpoints; the residual
            blocks have four times as many.
    """

    def __init__(self, base_channels: int = 32) -> None:
        super().__init__()
        c = base_channels
        self.base_channels = base_channels
        self.conv1 = ConvLayer(3, c, kernel_size=9, stride=1)
        self.in1 = nn.InstanceNorm2d(c, affine=True)
        self.conv2 = ConvLayer(c, 2 * c, kernel_size=3, stride=2)
        self.in2 = nn.InstanceNorm2d(2 * c, affine=True)
        self.conv3 = ConvLayer(2 * c, 4 * c, kernel_size=3, stride=2)
        self.in3 = nn.InstanceNorm2d(4 * c, affine=True)
        self.res1 = TorchResidualBlock(4 * c)
        self.res2 = TorchResidualBlock(4 * c)
        self.res3 = TorchResidualBlock(4 * c)
        self.res4 = TorchResidualBlock(4 * c)
        self.res5 = TorchResidualBlock(4 * c)
        self.deconv1 = UpsampleConvLayer(4 * c, 2 * c, kernel_size=3, stride=1, upsample=2)
        self.in4 = nn.InstanceNorm2d(2 * c, affine=True)
        self.deconv2 = UpsampleConvLayer(2 * c, c, kernel_size=3, stride=1, upsample=2)
        self.in5 = nn.InstanceNorm2d(c, affine=True)
        self.deconv3 = ConvLayer(c, 3, kernel_size=9, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Stylises a batch of pictures.

        Args:
            x: RGB pictures ``[N, 3, H, W]`` in 0..255, H and W at least 5.

        Returns:
            RGB pictures in about 0..255 (not clamped), ``[N, 3, 4*ceil(ceil(H/2)/2),
            4*ceil(ceil(W/2)/2)]``: the input's size where that is a multiple of four, else rounded up to
            one.
        """
        y = F.relu(self.in1(self.conv1(x)))
        y = F.relu(self.in2(self.conv2(y)))
        y = F.relu(self.in3(self.conv3(y)))
        y = self.res1(y)
        y = self.res2(y)
        y = self.res3(y)
        y = self.res4(y)
        y = self.res5(y)
        y = F.relu(self.in4(self.deconv1(y)))
        y = F.relu(self.in5(self.deconv2(y)))
        z: Tensor = self.deconv3(y)
        return z
