"""What rewritten networks call: the operators, for whatever the layers that they replace accept.

A network that is rewritten without running it says nothing of ranks, dtypes and sizes. What depends on them
is decided here at each call: pictures without a batch, additions that broadcast or promote, dropout in
training. The functions also compile as TorchScript, with the ``precision`` that held when the network was
rewritten; elsewhere PyTorch's flags are asked at each call.
"""

# No `from __future__ import annotations`: TorchScript reads the annotations.
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.models._reflect_conv import reflect_conv2d
from styleforge.ops import conv_precision, matmul_precision
from styleforge.ops._common import autocast_dtype
from styleforge.ops._composite import activate, ffn_activate


def conv_instance_norm(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm_bias: Optional[Tensor],
    residual: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    padding_mode: str,
    upsample: int,
    eps: float,
    activation: str,
    negative_slope: float,
    unbatched: bool,
    precision: str,
) -> Tensor:
    """``activation(instance_norm(conv2d(pad(upsample(input)))) + residual)``.

    Args:
        input: [N, Ci, H, W]; [Ci, H, W] as the layers take it where ``unbatched``.
        weight: and what is not below: as in ``styleforge.ops.fused_conv_instance_norm_relu``.
        residual: added before the activation; anything that broadcasts.
        unbatched: [C, H, W] is a picture, as for ``nn.InstanceNorm2d``; for ``F.instance_norm`` it is not.
        precision: in TorchScript only; PyTorch's flags elsewhere.
    """
    picture = input.dim() == 3 and unbatched
    if picture and upsample == 1:
        input = input.unsqueeze(0)
    if input.dim() != 4:
        return _as_written(
            input,
            weight,
            bias,
            norm_weight,
            norm_bias,
            residual,
            stride,
            padding,
            padding_mode,
            upsample,
            eps,
            activation,
            negative_slope,
            unbatched,
        )
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        precision = conv_precision()
    sizes = [
        input.size(0),
        weight.size(0),
        (input.size(2) * upsample + 2 * padding[0] - weight.size(2)) // stride[0] + 1,
        (input.size(3) * upsample + 2 * padding[1] - weight.size(3)) // stride[1] + 1,
    ]
    fits = _fits(residual, input, _dtype_of_products(input), sizes)
    output: Tensor = torch.ops.styleforge.fused_conv_instance_norm_relu(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        stride,
        padding,
        padding_mode,
        upsample,
        eps,
        activation if fits else "none",
        negative_slope,
        residual if fits else None,
        precision,
    )
    if picture:
        output = output.squeeze(0)
    if fits or residual is None:
        return output
    return activate(output + residual, activation, negative_slope)


def instance_norm(
    input: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    eps: float,
    activation: str,
    negative_slope: float,
    unbatched: bool,
) -> Tensor:
    """``activation(instance_norm(input) + residual)``; arguments as in ``conv_instance_norm``."""
    picture = input.dim() == 3 and unbatched
    if picture:
        input = input.unsqueeze(0)
    if input.dim() != 4:  # F.instance_norm is there for signals and volumes too
        normed = F.instance_norm(input, None, None, weight, bias, True, 0.1, eps)
        if residual is not None:
            normed = normed + residual
        return activate(normed, activation, negative_slope)
    sizes = [input.size(0), input.size(1), input.size(2), input.size(3)]
    fits = _fits(residual, input, input.dtype, sizes)
    output: Tensor = torch.ops.styleforge.fused_instance_norm(
        input,
        weight,
        bias,
        eps,
        activation if fits else "none",
        negative_slope,
        residual if fits else None,
    )
    if picture:
        output = output.squeeze(0)
    if fits or residual is None:
        return output
    return activate(output + residual, activation, negative_slope)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    output_padding: List[int],
    groups: int,
    dilation: List[int],
) -> Tensor:
    """``conv_transpose2d`` before an instance norm, which takes the bias out again: for its gradient only.

    A trace has one of the two for all times: the one with the bias.
    """
    keeps = bias is not None and torch.is_grad_enabled() and bias.requires_grad
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        keeps = keeps or torch.jit.is_tracing()  # type: ignore
    if keeps:
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return F.conv_transpose2d(input, weight, None, stride, padding, output_padding, groups, dilation)


def ffn(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Optional[Tensor],
    fc2_weight: Tensor,
    fc2_bias: Optional[Tensor],
    residual: Optional[Tensor],
    activation: str,
    hidden_dropout: float,
    hidden_training: bool,
    output_dropout: float,
    output_training: bool,
    precision: str,
) -> Tensor:
    """``dropout(fc2(dropout(activation(fc1(input))))) + residual``, one operator where nothing is dropped.

    Args:
        input: [..., embed_dim].
        fc1_weight: and what is not below: as in ``styleforge.ops.fused_ffn``.
        residual: added at the end; anything that broadcasts.
        hidden_dropout: probability after the activation.
        hidden_training: whether it drops.
        output_dropout: probability after the second linear layer.
        output_training: whether it drops.
        precision: in TorchScript only; PyTorch's flags elsewhere.
    """
    if hidden_training and hidden_dropout > 0.0:
        hidden = ffn_activate(F.linear(input, fc1_weight, fc1_bias), activation)
        output = F.linear(F.dropout(hidden, hidden_dropout), fc2_weight, fc2_bias)
        fits = False
    else:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            precision = matmul_precision()
        fits = not (output_training and output_dropout > 0.0)
        if fits:
            sizes: List[int] = []
            for d in range(input.dim() - 1):
                sizes.append(input.size(d))
            sizes.append(fc2_weight.size(0))
            fits = _fits(residual, input, _dtype_of_products(input), sizes)
        output = torch.ops.styleforge.fused_ffn(
            input,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            activation,
            residual if fits else None,
            precision,
        )
    if output_training and output_dropout > 0.0:
        output = F.dropout(output, output_dropout)
    return output if fits or residual is None else output + residual


def reflect_conv(input: Tensor, weight: Tensor, bias: Optional[Tensor], precision: str) -> Tensor:
    """``conv2d(reflection_pad(input))`` with half of the (odd) kernel as padding.

    Args:
        input: [N, Ci, H, W] or [Ci, H, W].
        weight: [Co, Ci, kh, kw].
        bias: [Co] or None.
        precision: in TorchScript only; PyTorch's flags elsewhere.
    """
    if input.dim() != 4:
        rows, columns = weight.size(2) // 2, weight.size(3) // 2
        return F.conv2d(F.pad(input, [columns, columns, rows, rows], mode="reflect"), weight, bias)
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        precision = conv_precision()
    return reflect_conv2d(input, weight, bias, precision)


def _dtype_of_products(input: Tensor) -> torch.dtype:
    """Of the result of a convolution or matrix product; TorchScript knows no autocast of ours."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        kind = input.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            return autocast_dtype(input)
    return input.dtype


def _fits(residual: Optional[Tensor], like: Tensor, dtype: torch.dtype, sizes: List[int]) -> bool:
    """Whether the operator, with a result of ``dtype``, can add it: no number, no broadcasting, no promotion.

    Under autocast the shortcut of a transformer stays in float32, to which 16-bit results are added.
    """
    if residual is None:
        return True
    if not torch.jit.is_scripting() and not isinstance(residual, Tensor):  # type: ignore[attr-defined]
        return False  # type: ignore[unreachable]
    if residual.dtype != dtype or residual.dim() != len(sizes) or residual.device != like.device:
        return False
    fits = True
    for d in range(len(sizes)):
        if residual.size(d) != sizes[d]:
            fits = False
    return fits


def _as_written(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm_bias: Optional[Tensor],
    residual: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    padding_mode: str,
    upsample: int,
    eps: float,
    activation: str,
    negative_slope: float,
    unbatched: bool,
) -> Tensor:
    """The layers one by one, for ranks that the operator does not have."""
    x = input
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if padding[0] > 0 or padding[1] > 0:
        mode = "constant" if padding_mode == "zeros" else padding_mode
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], mode=mode)
    x = F.conv2d(x, weight, bias, stride)
    picture = x.dim() == 3 and unbatched
    if picture:
        x = x.unsqueeze(0)
    x = F.instance_norm(x, None, None, norm_weight, norm_bias, True, 0.1, eps)
    if picture:
        x = x.squeeze(0)
    if residual is not None:
        x = x + residual
    return activate(x, activation, negative_slope)
