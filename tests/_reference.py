"""What the operators' results are held against.

``instance_norm``, ``conv_instance_norm``, ``ffn`` and ``attention`` are the formulas in float64, written
apart from the package: explicit sums, no library convolution, norm, GELU or softmax. ``torch_*`` are
PyTorch's own layers in the dtype of the input, the yardstick for how large an error may be. All run where
the input is: float64 sums are as good on the GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "sigmoid", "tanh")
FFN_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
MATRIX_LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "offset")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def random_configurations(shares: int) -> settings:
    """Settings of a random test that is one of ``shares`` (which pytest-xdist can spread): 500 in all."""
    examples = int(os.environ.get("STYLEFORGE_TEST_EXAMPLES", "500"))
    return settings(
        max_examples=-(-examples // shares), deadline=None, suppress_health_check=list(HealthCheck)
    )


# --- data -----------------------------------------------------------------------------------------


def tensor(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """Normally distributed values, [N, C, H, W], laid out in memory as asked; rounded to ``dtype`` once."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64, device=device) * scale + offset).to(dtype)

    if layout == "contiguous":
        return random(*sizes)
    if layout == "channels_last":
        return random(*sizes).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = sizes
        return random(n, c + 1, h + 2, 2 * w + 1)[:, 1:, 1 : h + 1, 1::2]
    if layout == "transposed":
        n, c, h, w = sizes
        return random(n, c, w, h).transpose(2, 3)
    if layout == "expanded":
        n, c, h, w = sizes
        return random(1, c, h, w).expand(n, c, h, w)
    if layout == "offset":  # contiguous, but no address is a multiple of 16 bytes
        count = 1
        for size in sizes:
            count *= size
        return random(count + 1)[1:].view(sizes)
    raise AssertionError(layout)


def random_tensor(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """Normally distributed values of any rank, laid out in memory as asked; rounded to ``dtype`` once."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64, device=device) * scale + offset).to(dtype)

    if layout == "contiguous" or not sizes:
        return random(*sizes)
    if layout == "transposed":  # the last dimension is the slowest in memory
        return random(sizes[-1], *sizes[:-1]).movedim(0, -1)
    if layout == "sliced":
        return random(*(s + 1 for s in sizes[:-1]), 2 * sizes[-1] + 1)[
            (*(slice(1, None) for _ in sizes[:-1]), slice(1, None, 2))
        ]
    if layout == "rows":  # rows further apart than they are long
        return random(*sizes[:-1], sizes[-1] + 3)[..., : sizes[-1]]
    if layout == "expanded":
        return random(1, *sizes[1:]).expand(sizes) if len(sizes) > 1 else random(1).expand(sizes)
    if layout == "offset":  # contiguous, but no address is a multiple of 16 bytes
        return random(math.prod(sizes) + 1)[1:].view(sizes)
    raise AssertionError(layout)


def attention_parameters(
    embed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    biases: str = "both",
    layout: str = "contiguous",
) -> tuple[Any, Any, Any, Any]:
    """qkv_weight, qkv_bias, out_weight, out_bias of the size that keeps the variance; biases: or None."""
    given: dict[str, Any] = dict(dtype=dtype, device=device, layout=layout)
    return (
        random_tensor(3 * embed, embed, scale=embed**-0.5, **given),
        random_tensor(3 * embed, scale=0.5, **given) if biases in ("first", "both") else None,
        random_tensor(embed, embed, scale=embed**-0.5, **given),
        random_tensor(embed, scale=0.5, **given) if biases in ("second", "both") else None,
    )


def random_mask(batch: int, length: int, kind: str = "some", device: str = "cpu") -> Tensor:
    """[batch, length] of bool: some, at random; left, the first ones; dead, like some, and one sample all."""
    if kind == "left":
        counts = torch.randint(0, length + 1, (batch, 1), device=device)
        return torch.arange(length, device=device) < counts
    mask = torch.rand(batch, length, device=device) < 0.4
    if kind == "dead":
        mask[batch - 1] = True
    return mask


def poison(count: int, dtype: torch.dtype, device: str) -> None:
    """Leaves NaN where the allocator is likely to put ``count`` elements next: what is not written shows."""
    blocks = [torch.full((max(count, 1),), float("nan"), dtype=dtype, device=device) for _ in range(3)]
    del blocks


def dense_strides(sizes: Sequence[int], like: Tensor) -> tuple[int, ...]:
    """Strides of a fresh PyTorch result of these sizes for an input like ``like``."""
    from torch._prims_common import suggest_memory_format

    return torch.empty(tuple(sizes), memory_format=suggest_memory_format(like)).stride()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's own cuDNN convolutions with or without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def matmul_tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's own cuBLAS products with or without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- the formulas, float64 ------------------------------------------------------------------------


def rounded_to_tf32(x: Tensor) -> Tensor:
    """The nearest TF32 numbers (ten bits of mantissa, ties to even), in the dtype of `x`."""
    bits = x.detach().float().contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).to(x.dtype)


def activate(x: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    if activation == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if activation == "leaky_relu":
        return torch.where(x > 0, x, x * negative_slope)
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    if activation == "tanh":
        return torch.tanh(x)
    assert activation == "none"
    return x


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def instance_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """The result in float64."""
    x, weight, bias, residual = _wide(input), _wide(weight), _wide(bias), _wide(residual)
    assert x is not None
    pixels = x.shape[2] * x.shape[3]
    mean = x.sum((2, 3), keepdim=True) / pixels
    centred = x - mean
    variance = (centred * centred).sum((2, 3), keepdim=True) / pixels
    y = centred / torch.sqrt(variance + eps)
    if weight is not None:
        y = y * weight.unsqueeze(-1).unsqueeze(-1)
    if bias is not None:
        y = y + bias.unsqueeze(-1).unsqueeze(-1)
    if residual is not None:
        y = y + residual
    return activate(y, activation, negative_slope)


def _source_index(
    size: int, padding: int, padding_mode: str, upsample: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each row (or column) of the padded picture: the input's row there, and whether there is one."""
    i = torch.arange(-padding, size * upsample + padding, device=device)
    last = size * upsample - 1
    inside = (i >= 0) & (i <= last)
    if padding_mode == "reflect":
        i = torch.where(i < 0, -i, i)
        i = torch.where(i > last, 2 * last - i, i)
    i = i.clamp(0, last)
    return i // upsample, inside if padding_mode == "zeros" else torch.ones_like(inside)


def conv(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
) -> Tensor:
    """The convolution kernel row by kernel row, float64."""
    x, w = _wide(input), _wide(weight)
    assert x is not None and w is not None
    rows, row_inside = _source_index(x.shape[2], padding[0], padding_mode, upsample, x.device)
    columns, column_inside = _source_index(x.shape[3], padding[1], padding_mode, upsample, x.device)
    x = x[:, :, rows][:, :, :, columns] * (row_inside[:, None] & column_inside[None, :]).double()
    kh, kw = w.shape[2:]
    height = (x.shape[2] - kh) // stride[0] + 1
    windows = x.unfold(3, kw, stride[1])  # [N, Ci, H, Wo, kw]
    output = x.new_zeros(x.shape[0], w.shape[0], height, windows.shape[3])
    for ky in range(kh):
        ys = slice(ky, ky + (height - 1) * stride[0] + 1, stride[0])
        output = output + torch.einsum("nihwk,oik->nohw", windows[:, :, ys], w[:, :, ky])
    return output


def conv_instance_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The result in float64; the bias takes part, so that a test sees that it cancels."""
    z = conv(input, weight, stride, padding, padding_mode, upsample)
    if bias is not None:
        wide = _wide(bias)
        assert wide is not None
        z = z + wide[:, None, None]
    return instance_norm(z, norm_weight, norm_bias, eps, activation, negative_slope, residual)


def ffn_activate(x: Tensor, activation: str) -> Tensor:
    """Written so that nothing cancels on the left: erfc in place of 1 + erf, e^ in place of 1 + tanh."""
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2.0))
    if activation == "gelu_tanh":
        return x / (1 + torch.exp(-2 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return activate(x, activation)


def ffn(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The result in float64."""
    x, w1, b1, w2, b2 = (_wide(t) for t in (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias))
    assert x is not None and w1 is not None and w2 is not None
    hidden = torch.einsum("...e,he->...h", x, w1)
    if b1 is not None:
        hidden = hidden + b1
    y = torch.einsum("...h,oh->...o", ffn_activate(hidden, activation), w2)
    if b2 is not None:
        y = y + b2
    wide = _wide(residual)
    return y if wide is None else y + wide


def attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The result in float64; a query that sees no key gets zeros from its heads."""
    heads = _Heads(input, qkv_weight, qkv_bias, num_heads, scale, is_causal, key_padding_mask)
    ow, ob = _wide(out_weight), _wide(out_bias)
    assert ow is not None
    y = torch.einsum("nse,oe->nso", heads.joined(heads.result()), ow)
    return y if ob is None else y + ob


def attention_wavering(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    num_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """What rounding queries and keys makes of each element of ``attention``, in float64.

    The RMS of its change for numbers that change by their own size in RMS, to first order, as if the scores
    did so each by itself. Where scores are large, this is the error, and it comes from a few queries for
    which two keys are nearly equal: of so few numbers, the ratio of two algorithms' errors is chance.
    """
    heads = _Heads(input, qkv_weight, qkv_bias, num_heads, scale, is_causal, key_padding_mask)
    wide = _wide(out_weight)
    assert wide is not None
    changes = torch.einsum("nqhd,nkhd->nhqk", heads.q**2, heads.k**2) * (heads.scale * heads.weights) ** 2
    mean = heads.result()
    squares = torch.einsum("nhqk,nkhd->nqhd", changes, heads.v**2) + mean * (
        mean * changes.sum(-1).transpose(1, 2)[..., None]
        - 2 * torch.einsum("nhqk,nkhd->nqhd", changes, heads.v)
    )
    # Queries as much as keys.
    return torch.einsum("nse,oe->nso", heads.joined(2 * squares.clamp(min=0)), wide**2).sqrt()


class _Heads:
    """Attention between the products, in float64: q, k, v [N, S, heads, D], weights [N, heads, S, S]."""

    def __init__(
        self,
        input: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        num_heads: int,
        scale: float | None,
        is_causal: bool,
        key_padding_mask: Tensor | None,
    ) -> None:
        x, w, b = (_wide(t) for t in (input, qkv_weight, qkv_bias))
        assert x is not None and w is not None
        batch, length, embed = x.shape
        qkv = torch.einsum("nse,oe->nso", x, w)
        if b is not None:
            qkv = qkv + b
        self.q, self.k, self.v = qkv.reshape(batch, length, 3, num_heads, embed // num_heads).unbind(2)
        self.scale = (embed // num_heads) ** -0.5 if scale is None else scale
        scores = torch.einsum("nqhd,nkhd->nhqk", self.q, self.k) * self.scale
        hidden = torch.zeros(batch, 1, length, length, dtype=torch.bool, device=x.device)
        if key_padding_mask is not None:
            hidden = hidden | key_padding_mask[:, None, None, :]
        if is_causal:
            tokens = torch.arange(length, device=x.device)
            hidden = hidden | (tokens[None, :] > tokens[:, None])
        peak = scores.detach().masked_fill(hidden, -1e300).amax(-1, keepdim=True) if length else scores
        powers = torch.exp((scores - peak).masked_fill(hidden, 0)).masked_fill(hidden, 0)
        total = powers.sum(-1, keepdim=True)
        self.weights = powers / torch.where(total > 0, total, torch.ones_like(total))

    def result(self) -> Tensor:
        return torch.einsum("nhqk,nkhd->nqhd", self.weights, self.v)

    def joined(self, tensor: Tensor) -> Tensor:
        """[N, S, heads, D] as [N, S, embed]."""
        return tensor.reshape(*tensor.shape[:2], -1)


# --- PyTorch's own layers, in the input's dtype ---------------------------------------------------


def torch_activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    functions: dict[str, Any] = {
        "relu": F.relu,
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "none": lambda v: v,
    }
    return functions[activation](x)


def torch_instance_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """``F.instance_norm``, addition and activation, each rounding to the dtype of the input."""
    per_channel = all(p is None or p.dim() == 1 for p in (weight, bias))
    if weight is not None:
        weight = weight.to(input.dtype)
    if bias is not None:
        bias = bias.to(input.dtype)
    # torch.instance_norm is F.instance_norm without its refusal of a single pixel.
    inner = (weight, bias) if per_channel else (None, None)
    y = torch.instance_norm(input, *inner, None, None, True, 0.1, eps, torch.backends.cudnn.enabled)
    if not per_channel:
        if weight is not None:
            y = y * weight.unsqueeze(-1).unsqueeze(-1)
        if bias is not None:
            y = y + bias.unsqueeze(-1).unsqueeze(-1)
    if residual is not None:
        y = y + residual
    return torch_activate(y, activation, negative_slope)


def torch_conv_instance_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """``F.interpolate``, ``F.pad``, ``F.conv2d`` and ``torch_instance_norm``; TF32 as PyTorch's flags say."""
    x = input
    if upsample != 1:
        x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
    if padding[0] or padding[1]:
        mode = "constant" if padding_mode == "zeros" else padding_mode
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=mode)
    z = F.conv2d(x, weight, bias, tuple(stride))
    return torch_instance_norm(z, norm_weight, norm_bias, eps, activation, negative_slope, residual)


def torch_ffn_activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    functions: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    return functions[activation](x)


def torch_ffn(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """``F.linear``, activation, ``F.linear`` and addition; TF32 as PyTorch's flags say."""
    hidden = torch_ffn_activate(F.linear(input, fc1_weight, fc1_bias), activation)
    y = F.linear(hidden, fc2_weight, fc2_bias)
    return y if residual is None else y + residual


def torch_attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """``F.linear``, ``F.scaled_dot_product_attention``, ``F.linear``; TF32 as PyTorch's flags say."""
    batch, length, embed = input.shape
    qkv = F.linear(input, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, embed // num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    seen = None
    if key_padding_mask is not None:
        seen = ~key_padding_mask[:, None, None, :]
        if is_causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=input.device).tril()
    heads = F.scaled_dot_product_attention(q, k, v, seen, is_causal=is_causal and seen is None, scale=scale)
    return F.linear(heads.transpose(1, 2).reshape(batch, length, embed), out_weight, out_bias)


# --- errors ---------------------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item() if x.numel() else 0.0


def rms_error(result: Tensor, reference: Tensor) -> float:
    return rms(result.detach().to(reference.device).double() - reference)


def max_error(result: Tensor, reference: Tensor) -> float:
    difference = result.detach().to(reference.device).double() - reference
    return difference.abs().max().item() if reference.numel() else 0.0


def assert_as_accurate(
    result: Tensor,
    yardstick: Tensor,
    reference: Tensor,
    factor: float = 1.5,
    ulps: float | None = None,
    scale: float | None = None,
    wavering: Tensor | None = None,
) -> None:
    """``result`` is as near to ``reference`` (float64) as PyTorch's ``yardstick`` in the same dtype.

    The ratio is taken between RMS errors: over a tensor they estimate the standard deviation of the rounding
    errors, whereas the largest error is one draw from its tail, which differs by chance between two equally
    good algorithms. So that a single wrong element is seen as well, the largest error must stay within three
    times PyTorch's largest. Below ``ulps`` units in the last place of the reference's RMS (``scale``, where
    what was added up is larger than the sum) both count as exact: on a small tensor PyTorch's can be so by
    luck. By default one unit, two on the GPU, whose rsqrt is that inexact, and a quarter in half precision,
    which is less than the rounding of the result. ``wavering``: what a unit on the way to it makes of each
    element, where that can be more; it counts as exact, too.
    """
    dtype = result.dtype
    if ulps is None:
        ulps = 0.25 if dtype in (torch.float16, torch.bfloat16) else (2.0 if result.is_cuda else 1.0)
    assert yardstick.dtype == dtype
    assert result.shape == reference.shape, f"{list(result.shape)} instead of {list(reference.shape)}"
    magnitude = rms(reference) if scale is None else max(rms(reference), scale)
    floor = ulps * torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).tiny
    worst = 0.0
    if wavering is not None and wavering.numel():
        floor += 3 * torch.finfo(dtype).eps * rms(wavering)  # of few numbers: three times is no rarity
        worst = 2 * torch.finfo(dtype).eps * wavering.max().item()  # an element alone, further from the usual
    ours, theirs = rms_error(result, reference), rms_error(yardstick, reference)
    assert ours <= factor * theirs + floor, (
        f"RMS error {ours:.3e} against PyTorch's {theirs:.3e} ({dtype}, RMS of the result {magnitude:.3e})"
    )
    peak = torch.finfo(dtype).eps * reference.abs().max().item() if reference.numel() else 0.0
    largest, theirs = max_error(result, reference), max_error(yardstick, reference)
    assert largest <= 2 * factor * theirs + 4 * floor + 2 * peak + worst, (
        f"largest error {largest:.3e}, PyTorch's {theirs:.3e} ({dtype}, RMS {magnitude:.3e})"
    )


def assert_as_accurate_together(
    pairs: Sequence[tuple[float, float]], dtype: torch.dtype, factor: float = 1.5
) -> None:
    """The geometric mean of many (our, PyTorch's) errors' ratios; no floor to speak of is needed here."""
    tiny = 0.02 * torch.finfo(dtype).eps
    logarithms = [math.log((ours + tiny) / (theirs + tiny)) for ours, theirs in pairs]
    ratio = math.exp(sum(logarithms) / len(logarithms))
    assert ratio <= factor, f"{dtype}: over {len(pairs)} configurations {ratio:.2f} x PyTorch's error"
