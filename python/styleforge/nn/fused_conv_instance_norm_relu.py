"""``FusedConvInstanceNormReLU``: convolution, instance norm and activation as one module."""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn as nn
from torch import Tensor

from styleforge.nn._checks import check_choice, check_pair, check_positive, check_type
from styleforge.ops import conv_precision
from styleforge.ops._common import (
    ACTIVATIONS,
    PADDING_MODES,
    PRECISIONS,
    BelowAutograd,
    autograd_is_idle,
    pair,
)

_fused_conv_instance_norm_relu = torch.ops.styleforge.fused_conv_instance_norm_relu.default
_without_python = _fused_conv_instance_norm_relu._op
# Of the operator's arguments from padding_mode to negative_slope.
_DEFAULTS = ("zeros", 1, 1e-5, "relu", 0.01)


class FusedConvInstanceNormReLU(nn.Module):
    """``activation(instance_norm(conv2d(pad(upsample(input)))) + residual)`` as one operator.

    See ``styleforge.ops.fused_conv_instance_norm_relu``.

    Args:
        in_channels: Ci.
        out_channels: Co.
        kernel_size: one or two integers, in pixels.
        stride: one or two integers, in pixels.
        padding: on each side, one or two integers; None takes ``(kernel_size - 1) // 2`` (0, 1, 1, 2 for 1,
            3, 4, 5).
        eps: added to the variance.
        bias: whether the convolution has one. The norm cancels it; it is there for checkpoints that have it.
        affine: learnable scale and shift after the norm.
        padding_mode: zeros, reflect or replicate.
        upsample: 1, or 2 for nearest-neighbour upsampling before the padding.
        activation: none, relu, leaky_relu, silu, sigmoid or tanh.
        negative_slope: of leaky_relu.
        precision: of float32 on the GPU: "ieee", "tf32", or None: what ``torch.backends.cudnn`` says at every
            call (a scripted module keeps what it said when the module was built).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: [Co, Ci, kh, kw].
        bias: [Co] or None.
        norm_weight: [Co] or None; ``gamma`` in older state dicts, which load as well.
        norm_bias: [Co] or None; ``beta`` in older state dicts.

    Shape:
        input [N, Ci, H, W], residual and output [N, Co, Ho, Wo]; channels_last where the input is.

    Raises:
        ValueError: a constructor argument is not one of those above.
        RuntimeError: from the operator, when the input does not fit.
    """

    __constants__ = [
        "activation",
        "eps",
        "negative_slope",
        "padding",
        "padding_mode",
        "scripted_precision",
        "stride",
        "upsample",
    ]
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        eps: float = 1e-5,
        bias: bool = True,
        affine: bool = True,
        *,
        padding_mode: str = "zeros",
        upsample: int = 1,
        activation: str = "relu",
        negative_slope: float = 0.01,
        precision: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        if precision is not None:
            check_choice("precision", precision, PRECISIONS)
        if upsample not in (1, 2):
            raise ValueError(f"upsample must be 1 or 2, got {upsample}")
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = check_pair("kernel_size", kernel_size, 1)
        self.stride = check_pair("stride", stride, 1)
        self.padding = (
            ((self.kernel_size[0] - 1) // 2, (self.kernel_size[1] - 1) // 2)
            if padding is None
            else check_pair("padding", padding, 0)
        )
        self.eps = eps
        self.affine = affine
        self.padding_mode = padding_mode
        self.upsample = upsample
        self.activation = activation
        self.negative_slope = negative_slope
        self.precision = precision
        self.scripted_precision = conv_precision(precision)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.weight = parameter(out_channels, in_channels, *self.kernel_size)
        self.register_parameter("bias", parameter(out_channels) if bias else None)
        self.register_parameter("norm_weight", parameter(out_channels) if affine else None)
        self.register_parameter("norm_bias", parameter(out_channels) if affine else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and bias as ``nn.Conv2d`` draws them; scale one, shift zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
            nn.init.uniform_(self.bias, -bound, bound)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    @classmethod
    def from_torch(
        cls,
        conv: nn.Conv2d,
        norm: nn.InstanceNorm2d,
        activation: str = "relu",
        *,
        negative_slope: float = 0.01,
        padding: int | Sequence[int] | None = None,
        padding_mode: str | None = None,
        upsample: int = 1,
        precision: str | None = None,
    ) -> "FusedConvInstanceNormReLU":
        """The fused form of existing layers, sharing their parameters.

        Args:
            conv: no groups, no dilation, integer padding.
            norm: the instance norm after it, without running statistics.
            activation: what follows the norm.
            negative_slope: of leaky_relu.
            padding: of a padding layer before ``conv``, in place of the convolution's own.
            padding_mode: of that padding layer; None takes the convolution's.
            upsample: of a nearest upsampling before it.
            precision: as in the constructor.

        Raises:
            TypeError: the layers are of other classes.
            ValueError: the layers have something that the fused operator does not.
        """
        _check_layers(conv, norm)
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding if padding is None else padding,  # type: ignore[arg-type]
            norm.eps,
            bias=conv.bias is not None,
            affine=norm.affine,
            padding_mode=conv.padding_mode if padding_mode is None else padding_mode,
            upsample=upsample,
            activation=activation,
            negative_slope=negative_slope,
            precision=precision,
            device="meta",
        )
        new.weight = conv.weight
        new.bias = conv.bias
        new.norm_weight = norm.weight
        new.norm_bias = norm.bias
        return new.train(conv.training)

    def load_from_pytorch(self, conv: nn.Conv2d, instance_norm: nn.InstanceNorm2d) -> None:
        """Copies the parameters of existing layers into this one.

        Args:
            conv: a convolution of this module's channels and kernel, without groups and dilation.
            instance_norm: the norm after it, without running statistics.

        Raises:
            TypeError: the layers are of other classes.
            ValueError: the layers have something that this module does not, or other shapes.
        """
        _check_layers(conv, instance_norm)
        if conv.weight.shape != self.weight.shape:
            raise ValueError(
                f"conv.weight must have shape {list(self.weight.shape)}, got {list(conv.weight.shape)}"
            )
        with torch.no_grad():
            self.weight.copy_(conv.weight)
            if self.bias is not None and conv.bias is not None:
                self.bias.copy_(conv.bias)
            if self.norm_weight is not None and self.norm_bias is not None:
                if not instance_norm.affine:
                    nn.init.ones_(self.norm_weight)
                    nn.init.zeros_(self.norm_bias)
                else:
                    self.norm_weight.copy_(instance_norm.weight)
                    self.norm_bias.copy_(instance_norm.bias)
            elif instance_norm.affine:
                raise ValueError(
                    "instance_norm has scale and shift, which this module (affine=False) has no place for"
                )

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """Input [N, Ci, H, W] and residual [N, Co, Ho, Wo] to [N, Co, Ho, Wo]."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            scripted: Tensor = torch.ops.styleforge.fused_conv_instance_norm_relu(
                input,
                self.weight,
                self.bias,
                self.norm_weight,
                self.norm_bias,
                self.stride,
                self.padding,
                self.padding_mode,
                self.upsample,
                self.eps,
                self.activation,
                self.negative_slope,
                residual,
                self.scripted_precision,
            )
            return scripted
        if autograd_is_idle(input):
            return _infer(self, input, residual)
        precision = self.precision
        if precision is None:  # which only float32 knows
            precision = conv_precision() if input.dtype is torch.float32 else "ieee"
        weight, bias, norm_weight, norm_bias = self._tensors()
        output: Tensor = _fused_conv_instance_norm_relu(
            input,
            weight,
            bias,
            norm_weight,
            norm_bias,
            self.stride,
            self.padding,
            self.padding_mode,
            self.upsample,
            self.eps,
            self.activation,
            self.negative_slope,
            residual,
            precision,
        )
        return output

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        # nn.Module finds a parameter only after it has looked everywhere else for an attribute of that name.
        parameters = self._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            norm_weight, norm_bias = parameters["norm_weight"], parameters["norm_bias"]
        except KeyError:  # a parametrization or a wrapper keeps them elsewhere
            return self.weight, self.bias, self.norm_weight, self.norm_bias
        assert weight is not None
        return weight, bias, norm_weight, norm_bias

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for old, new in (("gamma", "norm_weight"), ("beta", "norm_bias")):
            if prefix + old in state_dict and prefix + new not in state_dict:
                value = state_dict.pop(prefix + old)
                if self.affine:
                    state_dict[prefix + new] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The constructor's arguments, without those at their defaults that seldom change."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        text += f", padding={self.padding}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if self.upsample != 1:
            text += f", upsample={self.upsample}"
        if self.bias is None:
            text += ", bias=False"
        if not self.affine:
            text += ", affine=False"
        return f"{text}, activation={self.activation}"


def _infer(module: FusedConvInstanceNormReLU, input: Tensor, residual: Tensor | None) -> Tensor:
    """The operator without gradients, by the shortest way: on the host a call costs what Python costs."""
    own = module.__dict__  # attributes of an nn.Module take three times as long
    precision = "ieee"
    if input.dtype is torch.float32:
        precision = own["precision"] or conv_precision()
    parameters = own["_parameters"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        norm_weight, norm_bias = parameters["norm_weight"], parameters["norm_bias"]
    except KeyError:  # a parametrization or a wrapper keeps them elsewhere
        weight, bias, norm_weight, norm_bias = module._tensors()
    stride, padding = own["stride"], own["padding"]
    # One integer takes half of the time that a pair takes, an argument that is left out none.
    if stride[0] == stride[1]:
        stride = stride[0]
    if padding[0] == padding[1]:
        padding = padding[0]
    how = (own["padding_mode"], own["upsample"], own["eps"], own["activation"], own["negative_slope"])
    guard = BelowAutograd()
    try:
        if residual is not None or how != _DEFAULTS:
            rest = (stride, padding, *how, residual, precision)
            output: Tensor = _without_python(input, weight, bias, norm_weight, norm_bias, *rest)
        elif precision == "ieee":
            output = _without_python(input, weight, bias, norm_weight, norm_bias, stride, padding)
        else:
            output = _without_python(
                input, weight, bias, norm_weight, norm_bias, stride, padding, precision=precision
            )
        return output
    finally:
        del guard


def _check_layers(conv: nn.Conv2d, norm: nn.InstanceNorm2d) -> None:
    check_type("conv", conv, nn.Conv2d)
    check_type("norm", norm, nn.InstanceNorm2d)
    if conv.groups != 1 or pair(conv.dilation) != (1, 1):
        raise ValueError(
            f"conv must have groups=1 and dilation=1, got groups={conv.groups}, dilation={conv.dilation}"
        )
    if isinstance(conv.padding, str):
        raise ValueError(f'conv.padding must be integers, got "{conv.padding}"')
    if conv.padding_mode not in PADDING_MODES:
        raise ValueError(
            f'conv.padding_mode must be one of {", ".join(PADDING_MODES)}, got "{conv.padding_mode}"'
        )
    if norm.track_running_stats:
        raise ValueError(
            "norm must not track running statistics: the fused operator always takes the input's own"
        )
    if norm.num_features != conv.out_channels:
        raise ValueError(
            f"norm must have {conv.out_channels} features (conv's channels), got {norm.num_features}"
        )
