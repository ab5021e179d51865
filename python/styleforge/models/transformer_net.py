"""The style-transfer network of Johnson et al. (2016) on styleforge's fused operators."""

# No `from __future__ import annotations` here: torch.jit.script cannot read class attributes' postponed
# annotations.
import torch
from torch import Tensor, nn

from ..ops import conv_precision, fused_conv_instance_norm_relu
from ._reflect_conv import formats_are_known, reflect_conv2d
from .checkpoints import check_state_dict, clean_state_dict, infer_base_channels
from .torch_transformer_net import TorchTransformerNet

__all__ = ["TransformerNet"]


class _Conv(nn.Module):
    """Holds the parameters of one convolution under the checkpoint name ``<layer>.conv2d``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(in_channels, out_channels, kernel_size)


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    padding: int,
    stride: int,
    upsample: int,
    eps: float,
    activation: str,
    residual: Tensor | None,
    precision: str | None,
) -> Tensor:
    """Upsample, reflection-pad, convolve, normalise, add the residual and activate: one operator call.

    Instance normalisation subtracts the convolution's bias again, so the operator does not read it; it is
    passed because an optimiser and DistributedDataParallel want a gradient of it, zeros, in every step.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        y: Tensor = torch.ops.styleforge.fused_conv_instance_norm_relu(
            x, weight, bias, norm_weight, norm_bias, [stride, stride], [padding, padding], "reflect",
            upsample, eps, activation, 0.01, residual, _precision(precision),
        )  # fmt: skip
        return y
    return fused_conv_instance_norm_relu(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        stride=stride,
        padding=padding,
        padding_mode="reflect",
        upsample=upsample,
        eps=eps,
        activation=activation,
        residual=residual,
        precision=precision,
    )


def _precision(precision: str | None) -> str:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return "ieee" if precision is None else precision
    return conv_precision(precision)


class _ResidualBlock(nn.Module):
    """Two fused 3x3 layers; the second adds the block's input inside the operator and has no activation."""

    precision: str | None

    def __init__(self, channels: int, precision: str | None) -> None:
        super().__init__()
        self.conv1 = _Conv(channels, channels, 3)
        self.in1 = nn.InstanceNorm2d(channels, affine=True)
        self.conv2 = _Conv(channels, channels, 3)
        self.in2 = nn.InstanceNorm2d(channels, affine=True)
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        precision = self.precision
        c1, n1, c2, n2 = self.conv1.conv2d, self.in1, self.conv2.conv2d, self.in2
        y = _fused(x, c1.weight, c1.bias, n1.weight, n1.bias, 1, 1, 1, self.in1.eps, "relu", None, precision)
        return _fused(y, c2.weight, c2.bias, n2.weight, n2.bias, 1, 1, 1, self.in2.eps, "none", x, precision)


class TransformerNet(nn.Module):
    """Real-time style transfer: 15 fused convolution + instance-norm layers and a last plain convolution.

    Parameter names are those of the fast-neural-style example in pytorch/examples, so its checkpoints load
    unchanged (see ``styleforge.models.load_checkpoint``). Reflection padding, nearest upsampling,
    normalisation, activation and the residual sum run inside
    ``torch.ops.styleforge.fused_conv_instance_norm_relu``. The network works under ``torch.jit.script``,
    ``torch.compile(fullgraph=True)`` and ``torch.export``, and trains.

    Args:
        base_channels: channels after the first layer, 32 in the paper and in public checkpoints; the residual
            blocks have four times as many.
        precision: arithmetic of float32 convolutions, ``"ieee"`` or ``"tf32"``; ``None`` follows PyTorch's
            cuDNN flags (in TorchScript, where those cannot be read: ``"ieee"``).
        channels_last: run the inner layers in channels-last memory, which is faster on CPU and GPU; input and
            output keep the memory format of the input either way.

    Source:
        Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV
        2016.
    """

    precision: str | None
    channels_last: bool
    base_channels: int

    def __init__(
        self, base_channels: int = 32, *, precision: str | None = None, channels_last: bool = True
    ) -> None:
        super().__init__()
        if base_channels < 1:
            raise ValueError(f"TransformerNet: base_channels must be at least 1, got {base_channels}")
        if precision not in (None, "ieee", "tf32"):
            raise ValueError(f"TransformerNet: precision must be None, 'ieee' or 'tf32', got {precision!r}")
        c = base_channels
        self.base_channels = base_channels
        self.precision = precision
        self.channels_last = channels_last
        self.conv1 = _Conv(3, c, 9)
        self.in1 = nn.InstanceNorm2d(c, affine=True)
        self.conv2 = _Conv(c, 2 * c, 3)
        self.in2 = nn.InstanceNorm2d(2 * c, affine=True)
        self.conv3 = _Conv(2 * c, 4 * c, 3)
        self.in3 = nn.InstanceNorm2d(4 * c, affine=True)
        self.res1 = _ResidualBlock(4 * c, precision)
        self.res2 = _ResidualBlock(4 * c, precision)
        self.res3 = _ResidualBlock(4 * c, precision)
        self.res4 = _ResidualBlock(4 * c, precision)
        self.res5 = _ResidualBlock(4 * c, precision)
        self.deconv1 = _Conv(4 * c, 2 * c, 3)
        self.in4 = nn.InstanceNorm2d(2 * c, affine=True)
        self.deconv2 = _Conv(2 * c, c, 3)
        self.in5 = nn.InstanceNorm2d(c, affine=True)
        self.deconv3 = _Conv(c, 3, 9)
        if channels_last:
            # Weights in the layout of the activations: cuDNN would otherwise convert them in every call.
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Stylises a batch of pictures.

        Args:
            x: RGB pictures ``[N, 3, H, W]`` in 0..255, H and W at least 5, in the parameters' dtype and
                device.

        Returns:
            RGB pictures in about 0..255 (not clamped), ``[N, 3, 4*ceil(ceil(H/2)/2),
            4*ceil(ceil(W/2)/2)]``: the input's size where that is a multiple of four, else rounded up to
            one.

        Raises:
            RuntimeError: where an operator refuses shape, dtype or device, naming the argument.
        """
        keep_channels_last = False
        y = x
        if formats_are_known():
            keep_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            if self.channels_last:
                y = y.contiguous(memory_format=torch.channels_last)
        c1, c2, c3 = self.conv1.conv2d, self.conv2.conv2d, self.conv3.conv2d
        d1, d2 = self.deconv1.conv2d, self.deconv2.conv2d
        n1, n2, n3, n4, n5 = self.in1, self.in2, self.in3, self.in4, self.in5
        precision = self.precision
        y = _fused(y, c1.weight, c1.bias, n1.weight, n1.bias, 4, 1, 1, self.in1.eps, "relu", None, precision)
        y = _fused(y, c2.weight, c2.bias, n2.weight, n2.bias, 1, 2, 1, self.in2.eps, "relu", None, precision)
        y = _fused(y, c3.weight, c3.bias, n3.weight, n3.bias, 1, 2, 1, self.in3.eps, "relu", None, precision)
        y = self.res1(y)
        y = self.res2(y)
        y = self.res3(y)
        y = self.res4(y)
        y = self.res5(y)
        y = _fused(y, d1.weight, d1.bias, n4.weight, n4.bias, 1, 1, 2, self.in4.eps, "relu", None, precision)
        y = _fused(y, d2.weight, d2.bias, n5.weight, n5.bias, 1, 1, 2, self.in5.eps, "relu", None, precision)
        last = self.deconv3.conv2d
        result = reflect_conv2d(y, last.weight, last.bias, _precision(precision))
        if keep_channels_last:
            return result.contiguous(memory_format=torch.channels_last)
        return result.contiguous()

    @classmethod
    def from_torch(cls, module: nn.Module) -> "TransformerNet":
        """Makes a fused network with a copy of the parameters of the same network in plain PyTorch layers.

        Args:
            module: a ``TorchTransformerNet``, the ``TransformerNet`` of pytorch/examples, or any module whose
                state dict has those names and shapes.

        Returns:
            The fused network on the same device, in the same dtype and training mode.

        Raises:
            CheckpointError: naming parameters that are missing, unexpected or of another shape.
        """
        return cls.from_state_dict(module.state_dict(), source=type(module).__name__).train(module.training)

    @classmethod
    def from_state_dict(
        cls, state_dict: dict[str, Tensor], *, source: str = "state dict"
    ) -> "TransformerNet":
        """Makes a network from the tensors of a checkpoint; its width follows from the first layer's weight.

        Args:
            state_dict: parameters under the checkpoint names, of one dtype and on one device; running
                statistics and ``module.`` prefixes are dropped.
            source: what error messages call the state dict, such as its file name.

        Returns:
            The network in the parameters' dtype and on their device, in training mode.

        Raises:
            CheckpointError: naming parameters that are missing, unexpected or of another shape.
        """
        tensors = clean_state_dict(state_dict)
        with torch.device("meta"):
            net = cls(infer_base_channels(tensors, source))
        check_state_dict(tensors, net.state_dict(), source)
        first = tensors["conv1.conv2d.weight"]
        net = net.to_empty(device=first.device).to(first.dtype)
        net.load_state_dict(tensors)
        return net

    def to_torch(self) -> TorchTransformerNet:
        """Returns the network in plain PyTorch layers, with copied parameters, device, dtype and mode."""
        parameter = self.conv1.conv2d.weight
        net = TorchTransformerNet(self.base_channels).to(device=parameter.device, dtype=parameter.dtype)
        net.load_state_dict(self.state_dict())
        return net.train(self.training)

    def extra_repr(self) -> str:
        """Shows what ``print`` cannot see from the submodules."""
        return (
            f"base_channels={self.base_channels}, precision={self.precision}, "
            f"channels_last={self.channels_last}"
        )
