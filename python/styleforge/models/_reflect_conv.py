"""Reflection-padded convolution with few output channels, the last layer of a style-transfer network."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations.
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from styleforge.ops import _few_channels as few_channels
from styleforge.ops import pad_upsample
from styleforge.ops._cast import cast

__all__ = ["reflect_conv2d", "reflect_conv2d_by_columns"]


def _reflected_ends(x: Tensor, reach: int, dim: int) -> tuple[Tensor, Tensor]:
    """The two ends of ``x`` along ``dim`` with what reflection padding of ``reach`` puts around them.

    A kernel of ``2 * reach + 1`` gives ``reach`` outputs on each, those for which it leaves ``x``.
    """
    size = x.size(dim)
    head = torch.cat((x.narrow(dim, 1, reach).flip(dim), x.narrow(dim, 0, 2 * reach)), dim)
    tail = torch.cat(
        (x.narrow(dim, size - 2 * reach, 2 * reach), x.narrow(dim, size - 1 - reach, reach).flip(dim)), dim
    )
    return head, tail


def _sum_columns(columns: Tensor, kernel_width: int) -> Tensor:
    """Adds up what each kernel column contributes: ``output[x] = sum_j columns[j][x + j]``.

    Args:
        columns: ``[N, kernel_width * Co, H, W]`` in channels_last memory, channel ``j * Co + c`` being kernel
            column ``j`` of output channel ``c``.
        kernel_width: number of kernel columns.

    Returns:
        ``[N, Co, H, W - kernel_width + 1]`` in channels_last memory.
    """
    channels = columns.size(1)
    out_channels = channels // kernel_width
    # In memory a row is W x kernel_width x Co. Output x starts at pixel x, and its next term is always one
    # pixel and one kernel column on: a view with overlapping windows, so the terms need no copy.
    rows = columns.permute(0, 2, 3, 1).flatten(2)
    windows = rows.unfold(2, kernel_width * channels, channels)
    terms = windows.unfold(3, out_channels, channels + out_channels)
    return terms.sum(3).permute(0, 3, 1, 2)


def reflect_conv2d_by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolves with the kernel's columns as output channels, then adds the columns up.

    CPU convolutions compute 16 output channels at a time (a vector register of float32), so three channels
    waste most of the arithmetic. The kernel ``[Co, Ci, kh, kw]`` is the sum of its ``kw`` columns, each a
    kernel ``[Co, Ci, kh, 1]`` that reads its input one pixel further right: one convolution with ``kw * Co``
    output channels, then ``kw`` shifted terms for each output. The multiplications are the same.

    The input is never padded as a whole: rows that the reflection reaches are computed from two strips of
    ``3 * (kh // 2)`` rows, and the columns that it reaches from strips of the small result.

    Args:
        x: ``[N, Ci, H, W]`` in channels_last memory, float32 or float64, H >= kh and W >= kw.
        weight: ``[Co, Ci, kh, kw]`` with odd kh, kw >= 3.
        bias: ``[Co]`` or None.

    Returns:
        ``[N, Co, H, W]`` in channels_last memory.
    """
    out_channels, in_channels, height, width = weight.shape
    by_column = weight.permute(3, 0, 1, 2).reshape(width * out_channels, in_channels, height, 1)
    top, bottom = _reflected_ends(x, height // 2, 2)
    strips: list[Tensor] = []
    for rows in (top, x, bottom):
        columns = F.conv2d(rows, by_column)
        left, right = _reflected_ends(columns, width // 2, 3)
        parts = [_sum_columns(left, width), _sum_columns(columns, width), _sum_columns(right, width)]
        strips.append(torch.cat(parts, 3))
    output = torch.cat(strips, 2)
    if bias is not None:
        output.add_(bias[:, None, None])
    return output


def _recorded() -> bool:
    """Whether this call becomes part of a program that may run on another device and size."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        tracing: bool = torch.jit.is_tracing()  # type: ignore
        return tracing or torch.compiler.is_exporting()
    return False


def formats_are_known() -> bool:
    """Whether a tensor may be asked for channels_last: ``torch.func.vmap`` refuses that."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    return True


def _needs_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _takes_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our operator convolves: on the GPU and without a gradient."""
    if x.device.type != "cuda" or weight.dtype != x.dtype:
        return False  # under autocast the dtypes may differ: PyTorch's convolution settles that
    if not torch.jit.is_scripting() and forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return False  # PyTorch's convolution has forward-mode derivatives
    return not torch.is_autocast_enabled() and not _needs_gradient(x, weight, bias)


def _trained(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A training step's way on the GPU in 16 bits, autocast or not; None where that is PyTorch's."""
    if x.device.type == "cuda" and torch.is_autocast_enabled():
        dtype = torch.get_autocast_dtype("cuda")
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    if not few_channels.takes(x, weight, weight.size(0)):
        return None
    result: Tensor = few_channels.ReflectConv2d.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _takes_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``reflect_conv2d_by_columns`` can run and is the faster way."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if _needs_gradient(x, weight, bias):
        return False
    height, width = weight.size(2), weight.size(3)
    return (
        height % 2 == 1
        and width % 2 == 1
        and min(height, width) >= 3
        and x.size(2) >= height
        and x.size(3) >= width
        and weight.size(0) <= 4
        and formats_are_known()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def reflect_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str = "ieee") -> Tensor:
    """Reflection padding of half the kernel, then a convolution with stride 1.

    Args:
        x: ``[N, Ci, H, W]``, H and W larger than half the kernel.
        weight: ``[Co, Ci, kh, kw]`` with odd kh and kw, in the dtype of ``x``.
        bias: ``[Co]`` or None.
        precision: of float32 on the GPU, "ieee" or "tf32".

    Returns:
        ``[N, Co, H, W]``.

    Raises:
        RuntimeError: where the padding is not smaller than the input, or shapes or dtypes do not fit.
    """
    recorded = _recorded()
    if not recorded and _takes_columns(x, weight, bias):
        return reflect_conv2d_by_columns(x, weight, bias)
    if not recorded and _takes_operator(x, weight, bias):
        output: Tensor = torch.ops.styleforge._reflect_conv2d(x, weight, bias, precision)
        return output
    if not torch.jit.is_scripting() and not recorded:  # type: ignore[attr-defined]
        trained = _trained(x, weight, bias)
        if trained is not None:
            return trained
    rows, columns = weight.size(2) // 2, weight.size(3) // 2
    if not torch.jit.is_scripting() and not recorded:  # type: ignore[attr-defined]
        return F.conv2d(pad_upsample(x, (rows, columns), padding_mode="reflect"), weight, bias)
    return F.conv2d(F.pad(x, [columns, columns, rows, rows], mode="reflect"), weight, bias)
