"""``fused_conv_instance_norm_relu``: accuracy, layouts, precision, gradients, registration, errors."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, seed
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import styleforge
from _cuda import capture
from _reference import (
    ACTIVATIONS,
    DEVICES,
    FLOATS,
    LAYOUTS,
    assert_as_accurate,
    assert_as_accurate_together,
    conv,
    conv_instance_norm,
    dense_strides,
    instance_norm,
    max_error,
    poison,
    random_configurations,
    rms,
    rms_error,
    tensor,
    tf32,
    torch_conv_instance_norm,
)
from styleforge.ops import fused_conv_instance_norm_relu

OP = torch.ops.styleforge.fused_conv_instance_norm_relu
MODES = ("zeros", "reflect", "replicate")
PRECISIONS = ("ieee", "tf32")
# Random configurations, over all dtypes and precisions (which pytest-xdist can spread).
EASY = random_configurations(len(PRECISIONS) * len(FLOATS))


def _weight(out_channels: int, in_channels: int, kh: int, kw: int, dtype: torch.dtype, device: str) -> Tensor:
    """Scaled so that the convolution's result has about the input's variance."""
    return (
        (torch.randn(out_channels, in_channels, kh, kw) / (in_channels * kh * kw) ** 0.5).to(dtype).to(device)
    )


def _norm_params(
    kind: str, batch: int, channels: int, dtype: torch.dtype, device: str
) -> tuple[Tensor | None, Tensor | None]:
    if kind == "none":
        return None, None
    sizes = (batch, channels) if "NC" in kind else (channels,)
    wanted = torch.float32 if "float32" in kind else dtype
    return (
        (torch.randn(sizes) * 0.5 + 1).to(wanted).to(device),
        None if "weight" in kind else torch.randn(sizes).to(wanted).to(device),
    )


def _ulps(dtype: torch.dtype, device: str, terms: int, precision: str = "ieee") -> float | None:
    """Below how many units in the last place two convolutions of ``terms`` products a pixel count as equal.

    cuDNN chooses an algorithm for each problem, and the operator's problem (padding in the convolution,
    deterministic) is another one than that of ``F.pad`` and ``F.conv2d``: sums in another order, TF32 for one
    of them and not for the other.
    """
    if dtype == torch.float64:  # the reference is rounded as well
        return 4 + 0.5 * terms**0.5
    if dtype == torch.float32 and device == "cuda":
        return 2.0**-11 / torch.finfo(dtype).eps if precision == "tf32" else 2 + 0.5 * terms**0.5
    return None


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_configurations_are_as_accurate_as_pytorch(
    precision: str, dtype: torch.dtype, device: str
) -> None:
    """Each of them alone, and all together, where luck averages out, without any floor."""
    errors: list[tuple[float, float]] = []

    @seed(len(PRECISIONS) * FLOATS.index(dtype) + PRECISIONS.index(precision))  # other examples in each
    @EASY
    @given(
        batch=st.integers(1, 4),
        channels=st.tuples(st.integers(1, 24), st.integers(1, 70)),
        height=st.integers(1, 19),
        width=st.integers(1, 23),
        kernel=st.tuples(st.integers(1, 7), st.integers(1, 7))
        | st.sampled_from(((3, 3), (1, 1), (4, 4), (5, 5))),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.just((1, 1)),
        padding=st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just((1, 1)),
        padding_mode=st.sampled_from(MODES),
        upsample=st.sampled_from((1, 2)),
        with_bias=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        weight_layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
        params=st.sampled_from(("none", "C", "NC", "C-float32", "NC-float32", "C-weight")),
        residual=st.sampled_from((None, "contiguous", "channels_last", "transposed")),
        activation=st.sampled_from(ACTIVATIONS),
        slope=st.sampled_from((0.01, 0.2, -0.5)),
        eps=st.sampled_from((1e-5, 1e-3)),
        spread=st.sampled_from((1.0, 20.0)),
        offset=st.sampled_from((0.0, 2.0)),
        data_seed=st.integers(0, 2**31 - 1),
    )
    def check(
        batch: int,
        channels: tuple[int, int],
        height: int,
        width: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        padding_mode: str,
        upsample: int,
        with_bias: bool,
        layout: str,
        weight_layout: str,
        params: str,
        residual: str | None,
        activation: str,
        slope: float,
        eps: float,
        spread: float,
        offset: float,
        data_seed: int,
    ) -> None:
        if device == "cpu" and dtype == torch.bfloat16:
            # oneDNN's strided bfloat16 convolution (PyTorch 2.13, AVX-512) multiplies memory that it has not
            # written by zero where the result is a pixel or two wide: after a NaN torch.conv2d gives NaN.
            stride = (stride[0], 1)
        size = [s * upsample for s in (height, width)]
        assume(all(s + 2 * p >= k for s, p, k in zip(size, padding, kernel, strict=True)))
        if padding_mode == "reflect":
            assume(all(p < s for s, p in zip(size, padding, strict=True)))
        torch.manual_seed(data_seed)
        ci, co = channels
        x = tensor(
            batch, ci, height, width, dtype=dtype, device=device, layout=layout, scale=spread, offset=offset
        )
        w = tensor(
            co, ci, *kernel, dtype=dtype, device=device, layout=weight_layout, scale=(ci * kernel[0]) ** -0.5
        )
        bias = torch.randn(co).to(dtype).to(device) if with_bias else None
        norm_weight, norm_bias = _norm_params(params, batch, co, dtype, device)
        out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)]
        r = tensor(batch, co, *out, dtype=dtype, device=device, layout=residual) if residual else None
        args = (
            x,
            w,
            bias,
            norm_weight,
            norm_bias,
            stride,
            padding,
            padding_mode,
            upsample,
            eps,
            activation,
            slope,
        )
        reference = conv_instance_norm(*args, r)
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(*args, r)
        poison(batch * co * out[0] * out[1], dtype, device)
        with tf32(precision != "tf32"):  # the argument counts, not the flag
            result = OP(*args, r, precision)
        assert result.dtype == dtype
        assert result.stride() == dense_strides(reference.shape, x)
        # The size of what is added up: a convolution's rounding errors are as large as its terms, and come
        # out of the norm divided by the deviation, which is small on a plane of a few pixels.
        z = conv(x, w, stride, padding, padding_mode, upsample)
        deviation = torch.sqrt(z.var((2, 3), correction=0, keepdim=True) + eps)
        amplified = (
            rms(1 / deviation) * conv(x.abs(), w.abs(), stride, padding, padding_mode, upsample).max().item()
        )
        lost = amplified * (rms(norm_weight) if norm_weight is not None else 1.0)
        few = out[0] * out[1] <= 4 or rms(1 / deviation) * rms(z) > 30
        before = rms(instance_norm(z, norm_weight, norm_bias, eps)) + (rms(r) if r is not None else 0.0)
        rounded = device == "cuda" and dtype == torch.float32 and precision == "tf32"
        scale = before + (lost if few or rounded else 0.0)
        ulps = _ulps(dtype, device, ci * kernel[0] * kernel[1], precision)
        assert_as_accurate(result, yardstick, reference, scale=scale, ulps=ulps)
        size_of_result = rms(reference)
        if size_of_result > 0 and not few and not rounded:
            relative = (rms_error(result, reference), rms_error(yardstick, reference))
            errors.append((relative[0] / size_of_result, relative[1] / size_of_result))

    check()
    if len(errors) >= 20:
        assert_as_accurate_together(errors, dtype)


# The layers of TransformerNet and CycleGAN: name -> (Ci, Co, kernel, stride, padding, upsample)
LAYERS = {
    "first 9x9": (3, 32, 9, 1, 4, 1),
    "down 3x3": (32, 64, 3, 2, 1, 1),
    "residual 3x3": (64, 64, 3, 1, 1, 1),
    "up 3x3": (64, 32, 3, 1, 1, 2),
    "4x4 stride 2": (16, 32, 4, 2, 1, 1),
    "1x1": (40, 33, 1, 1, 0, 1),
    "rectangular": (16, 24, (3, 7), (2, 1), (1, 3), 1),
}


def _two(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_real_networks(
    layer: str, padding_mode: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    ci, co, kernel, stride, padding, upsample = LAYERS[layer]
    side = 20 if device == "cpu" else 64
    x = tensor(2, ci, side, side + 4, dtype=dtype, device=device, layout=layout)
    w = _weight(co, ci, *_two(kernel), dtype, device)
    norm_weight, norm_bias = _norm_params("C", 2, co, dtype, device)
    args = (x, w, None, norm_weight, norm_bias, _two(stride), _two(padding), padding_mode, upsample)
    reference = conv_instance_norm(*args)
    with tf32(False):
        yardstick = torch_conv_instance_norm(*args)
    poison(reference.numel(), dtype, device)
    result = OP(*args)
    assert result.stride() == dense_strides(reference.shape, x)
    terms = ci * _two(kernel)[0] * _two(kernel)[1]
    assert_as_accurate(result, yardstick, reference, ulps=_ulps(dtype, device, terms))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("forced", ["", "split", "portable", "ticket"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_layers_on_every_path(
    dtype: torch.dtype, layout: str, forced: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("STYLEFORGE_PATH", forced)
    for ci, co, sizes, kernel, stride, upsample in (
        (3, 32, (256, 256), 9, 1, 1),
        (32, 64, (255, 257), 3, 2, 1),
        (64, 5, (64, 65), 3, 1, 2),
        (1, 2, (1500, 1400), 3, 1, 1),
    ):
        x = tensor(1, ci, *sizes, dtype=dtype, device="cuda", layout=layout)
        w = _weight(co, ci, kernel, kernel, dtype, "cuda")
        out = [((s * upsample - 1) // stride) + 1 for s in sizes]
        r = tensor(1, co, *out, dtype=dtype, device="cuda")
        padding = (kernel // 2, kernel // 2)
        common: dict[str, Any] = dict(
            stride=(stride, stride), padding=padding, padding_mode="reflect", upsample=upsample, residual=r
        )
        with tf32(False):
            reference = torch_conv_instance_norm(x.double(), w.double(), **{**common, "residual": r.double()})
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(x, w, **common)
        poison(r.numel(), dtype, "cuda")
        result = OP(x, w, precision=precision, **common)
        assert "cuda" in styleforge.last_path()
        ulps = _ulps(dtype, "cuda", ci * kernel * kernel, precision)
        assert_as_accurate(result, yardstick, reference, ulps=ulps)


# input channels, output channels, (H, W), kernel, stride, padding, upsample: whole and partial tiles, every
# tile size, one and several chunks of channels, taps unrolled and not, channels that vectors do not divide,
# pictures
FUSED = [
    (64, 64, (64, 64), (3, 3), (1, 1), (1, 1), 1),
    (128, 128, (128, 128), (3, 3), (1, 1), (1, 1), 1),
    (128, 128, (32, 32), (3, 3), (1, 1), (1, 1), 1),
    (256, 256, (64, 64), (1, 1), (1, 1), (0, 0), 1),
    (64, 128, (128, 128), (3, 3), (2, 2), (1, 1), 1),
    (200, 72, (45, 31), (3, 3), (1, 1), (1, 1), 1),
    (32, 34, (17, 9), (5, 4), (1, 2), (2, 1), 1),
    (72, 100, (33, 50), (7, 7), (3, 3), (3, 2), 1),
    (64, 32, (40, 70), (3, 3), (1, 1), (1, 1), 2),
    (32, 70, (17, 9), (3, 3), (1, 1), (1, 1), 2),
    (3, 32, (70, 90), (9, 9), (1, 1), (4, 4), 1),
    (2, 64, (61, 44), (7, 7), (2, 2), (3, 3), 1),
    # more padding than the kernel reaches: the last tile needs pixels that are not among its own
    (64, 64, (45, 30), (1, 1), (1, 1), (2, 2), 1),
    (64, 40, (29, 31), (3, 5), (2, 1), (4, 3), 1),
]


@pytest.mark.cuda
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_convolution(
    case: Any, dtype: torch.dtype, precision: str, padding_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused convolution is for sm_90")
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    ci, co, size, kernel, stride, padding, upsample = case
    for batch, layout, weight_format in ((1, "channels_last", torch.channels_last), (3, "contiguous", None)):
        x = tensor(batch, ci, *size, dtype=dtype, device="cuda", layout=layout, offset=0.3)
        w = _weight(co, ci, *kernel, dtype, "cuda")
        if weight_format is not None:
            w = w.contiguous(memory_format=weight_format)
        norm_weight, norm_bias = _norm_params("NC" if batch > 1 else "C", batch, co, dtype, "cuda")
        args = (x, w, None, norm_weight, norm_bias, stride, padding, padding_mode, upsample)
        reference = conv_instance_norm(*args)
        residual = torch.randn_like(reference).to(dtype) if batch > 1 else None
        reference = conv_instance_norm(*args, residual=residual)
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(*args, residual=residual)
        poison(reference.numel(), dtype, "cuda")
        result = OP(*args, residual=residual, precision=precision)
        assert "sm90" in styleforge.last_path()
        assert result.stride() == dense_strides(reference.shape, x)
        error, allowed = rms_error(result, reference), rms_error(yardstick, reference)
        # TF32 is allowed, not demanded: PyTorch may have computed in float32. Sums in another order: 1e-7.
        assert error <= max(1.2 * allowed + 1e-7, 5e-4 if precision == "tf32" else 0.0)
        again = OP(*args, residual=residual, precision=precision)
        assert torch.equal(result, again)


# input channels, output channels, (H, W), kernel, stride, upsample, STYLEFORGE_CONV_TUNE: one tile a block
# and several, moments merged by every block and in a step of their own, whole and partial tiles
RESIDENT = [
    (64, 64, (64, 64), 3, 1, 1, ""),
    (64, 64, (61, 50), 3, 1, 1, "columns=64,height=8"),
    (128, 128, (128, 128), 3, 1, 1, ""),
    (64, 64, (256, 256), 3, 1, 1, ""),
    (64, 128, (130, 121), 3, 2, 1, "columns=128,height=8"),
    (72, 72, (45, 70), 5, 1, 1, "tiles=2"),
    (64, 128, (90, 33), 3, 1, 1, "tiles=3,columns=64"),
    (64, 32, (40, 70), 3, 1, 2, "tiles=4,height=4"),
    (256, 256, (33, 64), 1, 1, 1, "tiles=2,columns=64"),
    # float32: two blocks a tile
    (64, 128, (120, 100), 3, 2, 1, "share=2,columns=64,height=8"),
    (64, 64, (61, 50), 3, 1, 1, "share=2,columns=64,height=4"),
    (128, 104, (32, 29), 3, 1, 1, "share=2,columns=32,height=4"),
    (120, 64, (24, 40), 3, 1, 2, "share=2,columns=64,height=8,merged=1"),
]


@pytest.mark.cuda
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
@pytest.mark.parametrize("case", RESIDENT, ids=str)
def test_one_pass_and_two_passes(
    case: Any, dtype: torch.dtype, precision: str, padding_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm in the convolution's kernel, where the tensor fits on the chip, and in one behind it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused convolution is for sm_90")
    ci, co, size, kernel, stride, upsample, tune = case
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
    for batch, activation in ((1, "relu"), (2, "leaky_relu"), (1, "sigmoid")):
        x = tensor(batch, ci, *size, dtype=dtype, device="cuda", layout="channels_last", offset=0.3)
        w = _weight(co, ci, kernel, kernel, dtype, "cuda")
        norm_weight, norm_bias = _norm_params("NC" if batch > 1 else "C", batch, co, dtype, "cuda")
        padding = (kernel // 2, kernel // 2)
        args = (x, w, None, norm_weight, norm_bias, (stride, stride), padding, padding_mode, upsample, 1e-5)
        reference = conv_instance_norm(*args)
        residual = torch.randn_like(reference).to(dtype) if batch > 1 else None
        rest: dict[str, Any] = dict(activation=activation, residual=residual)
        reference = conv_instance_norm(*args, **rest)
        errors = {}
        for forced in ("sm90", "sm90:two_pass"):
            monkeypatch.setenv("STYLEFORGE_PATH", forced)
            poison(reference.numel(), dtype, "cuda")
            result = OP(*args, **rest, precision=precision)
            path = styleforge.last_path()
            if batch == 1 and forced == "sm90":
                assert ":one_pass" in path, path
            elif forced == "sm90:two_pass":
                assert "sm90" in path and "one_pass" not in path
            errors[forced] = rms_error(result, reference)
            assert torch.equal(
                result, OP(*args, activation=activation, residual=residual, precision=precision)
            )
        assert errors["sm90"] <= 1.1 * errors["sm90:two_pass"] + 1e-7
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(*args, **rest)
        allowed = 1.2 * rms_error(yardstick, reference) + 1e-7
        assert errors["sm90"] <= max(allowed, 5e-4 if precision == "tf32" else 0.0)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", [3, 9])
def test_blocks_of_which_two_do_not_fit(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough for two a multiprocessor, whose shared memory has room for one; in a graph and outside."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused convolution is for sm_90")
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    x = tensor(8, 64, 128, 128, dtype=torch.float16, device="cuda", layout="channels_last")
    w = _weight(64, 64, kernel, kernel, torch.float16, "cuda")
    call = partial(OP, x, w, stride=[3, 3], padding=[kernel // 2])
    graph, result = capture(call)
    assert styleforge.last_path() == "conv_instance_norm_relu:cuda+sm90"
    result.zero_()
    graph.replay()
    reference = conv_instance_norm(x, w, stride=(3, 3), padding=(kernel // 2, kernel // 2))
    assert rms_error(result, reference) < 1e-3
    assert torch.equal(result, call())


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(64, 64), (128, 128)], ids=["merged by all", "merged apart"])
@pytest.mark.parametrize("where", ["input", "norm_weight"])
def test_numbers_that_are_none_are_not_waited_for(
    where: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks wait for moments that are not there yet, which is a NaN of its own: all bits set."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused convolution is for sm_90")
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    x = torch.randn(1, 128, *size, device="cuda").contiguous(memory_format=torch.channels_last)
    w = _weight(128, 128, 3, 3, torch.float32, "cuda")
    norm_weight = torch.ones(128, device="cuda")
    reference = OP(x, w, None, norm_weight, None, padding=(1, 1), precision="tf32")
    none = torch.tensor([-1], dtype=torch.int32, device="cuda").view(torch.float32)
    if where == "input":
        x[0, :, 5, 7] = none
    else:
        norm_weight[3] = none
    result = OP(x, w, None, norm_weight, None, padding=(1, 1), precision="tf32")
    assert ":one_pass" in styleforge.last_path()
    gone = torch.isnan(result).flatten(2).all(2)[0]
    if where == "input":
        assert gone.all()
    else:
        assert gone.nonzero().flatten().tolist() == [3]
        others = [c for c in range(128) if c != 3]
        assert torch.equal(result[:, others], reference[:, others])


@pytest.mark.cuda
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_precision_counts_and_not_the_flag(flag: bool, with_grad: bool) -> None:
    """In inference and in training: "ieee" never rounds to TF32, whatever ``torch.backends.cudnn`` says."""
    x = tensor(2, 64, 40, 40, device="cuda").requires_grad_(with_grad)
    w = _weight(64, 64, 3, 3, torch.float32, "cuda").requires_grad_(with_grad)
    reference = conv_instance_norm(x.detach(), w.detach(), activation="none")
    with tf32(flag):
        ieee = OP(x, w, activation="none", precision="ieee")
        fast = OP(x, w, activation="none", precision="tf32")
    assert rms_error(ieee, reference) < 3e-6
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < rms_error(fast, reference) < 2e-3


def _rounded_to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, to nearest, ties away from zero (finite values below the largest)."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).reshape(x.shape)


# layer -> (path, whether the weights pass one of our kernels as well)
ROUNDED = {
    "first 9x9": ("padded_channels", True),
    "up 3x3": ("upsample_phases", False),  # the phases' weights are sums, rounded once they are added
    "residual 3x3": ("aten_conv", False),
}


@pytest.mark.cuda
@pytest.mark.parametrize("layer", ROUNDED)
def test_tf32_operands_are_rounded_to_nearest(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What our kernels write for tensor cores has no bits left to cut: rounding before changes nothing."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no TF32 below sm_80")
    monkeypatch.setenv("STYLEFORGE_PATH", "portable")  # cuDNN's convolutions
    path, with_weights = ROUNDED[layer]
    ci, co, kernel, stride, padding, upsample = LAYERS[layer]
    x = tensor(2, ci, 48, 52, device="cuda", layout="channels_last")
    w = _weight(co, ci, *_two(kernel), torch.float32, "cuda").contiguous(memory_format=torch.channels_last)
    tail = (None, None, None, _two(stride), _two(padding), "reflect", upsample, 1e-5, "none")
    rounded_x = _rounded_to_tf32(x).contiguous(memory_format=torch.channels_last)
    rounded_w = _rounded_to_tf32(w).contiguous(memory_format=torch.channels_last) if with_weights else w
    fast = OP(x, w, *tail, precision="tf32")
    assert path in styleforge.last_path()
    assert torch.equal(fast, OP(rounded_x, rounded_w, *tail, precision="tf32"))
    exact = OP(x, w, *tail, precision="ieee")
    assert not torch.equal(exact, OP(rounded_x, rounded_w, *tail, precision="ieee"))
    reference = conv_instance_norm(x, w, *tail)
    assert rms_error(exact, reference) < 3e-6
    assert rms_error(fast, reference) < 1e-3


@pytest.mark.cuda
def test_tf32_keeps_values_at_the_end_of_the_range() -> None:
    """What would round to infinity stays finite; NaN and infinity stay what they are."""
    largest = torch.finfo(torch.float32).max
    w = torch.full((1, 3, 1, 3), 1e-30, device="cuda")
    for value in (largest, -largest, float("inf"), -float("inf"), float("nan")):
        x = tensor(1, 3, 8, 9, device="cuda", scale=1e30)
        x[0, 1, 3, 4] = value
        args = (None, None, None, (1, 1), (0, 1), "reflect", 1, 1e-5, "none")
        fast, ieee = OP(x, w, *args, precision="tf32"), OP(x, w, *args, precision="ieee")
        assert torch.equal(fast.isfinite(), ieee.isfinite())


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_changes_nothing(device: str) -> None:
    """It cancels exactly, even one that would cost all digits in float32."""
    x, w = tensor(2, 4, 9, 9, device=device), _weight(6, 4, 3, 3, torch.float32, device)
    bias = torch.full((6,), 1e6, device=device)
    assert torch.equal(OP(x, w, bias), OP(x, w))
    assert max_error(OP(x, w, bias), conv_instance_norm(x, w)) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("stride", [(1, 286331153), (613566757, 1), (1, 2**32), (2**40, 2)], ids=str)
def test_strides_beyond_the_input(stride: tuple[int, int], channels: int, device: str) -> None:
    """Of which the extent of a tile's input is 0, or 10, or negative in 32 bits."""
    x, w = tensor(2, channels, 8, 9, device=device), _weight(64, channels, 1, 1, torch.float32, device)
    result = OP(x, w, stride=stride)
    expected = conv_instance_norm(x, w, stride=[min(s, 9) for s in stride])
    assert result.shape == expected.shape
    assert rms_error(result, expected) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [(64, 64), (64, 34), (3, 32)], ids=str)
@pytest.mark.parametrize("size", [(16, 18), (150, 131)], ids=str)
def test_a_residual_may_begin_anywhere(
    size: tuple[int, int], channels: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    """One element behind a vector's address, in the result's format; few tiles and many."""
    ci, co = channels
    w = _weight(co, ci, 3, 3, dtype, device)
    flat = torch.randn(2 * co * size[0] * size[1] + 1).to(dtype).to(device)[1:]
    for layout in ("contiguous", "channels_last"):
        x = tensor(2, ci, *size, dtype=dtype, device=device, layout=layout)
        r = flat.view(2, co, *size)
        if layout == "channels_last":
            r = flat.view(2, *size, co).permute(0, 3, 1, 2)
        result = OP(x, w, padding=[1, 1], residual=r)
        assert torch.equal(result, OP(x, w, padding=[1, 1], residual=r.clone()))
        assert rms_error(result, conv_instance_norm(x, w, padding=(1, 1), residual=r)) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_spread_as_in_pytorch(activation: str, device: str) -> None:
    w, r = _weight(5, 3, 3, 3, torch.float32, device), tensor(3, 5, 8, 9, device=device)
    r[1, 1, 2, 3], r[1, 2, 0, 0] = float("nan"), float("inf")
    for layout, (value, where) in itertools.product(
        ("contiguous", "channels_last"),
        ((float("nan"), (0, 1, 3, 3)), (float("inf"), (2, 0, 0, 0)), (-float("inf"), (0, 2, 7, 8))),
    ):
        x = tensor(3, 3, 8, 9, device=device, layout=layout)
        x[where] = value
        for mode in MODES:
            args = (x, w, None, None, None, (1, 1), (1, 1), mode, 1, 1e-5, activation, 0.01, r)
            result, expected = OP(*args), torch_conv_instance_norm(*args)
            assert torch.equal(result.isnan(), expected.isnan())
            assert torch.equal(result.isinf(), expected.isinf())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
@pytest.mark.parametrize("forced", ["", "sm90", "sm90:two_pass", "mma"])
def test_one_infinite_pixel_spreads_from_every_tile(
    forced: str, dtype: torch.dtype, precision: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plane has an infinite mean and no variance: NaN everywhere, and no relu makes zeros of it."""
    monkeypatch.setenv("STYLEFORGE_PATH", forced)
    # Of three channels a forced kernel takes none, and cuDNN's in half makes zeros of -inf.
    channels = (64,) if forced else (3, 64)
    for ci, (y, x) in itertools.product(channels, ((0, 0), (3, 20), (37, 41), (69, 59))):
        w = _weight(64, ci, 1, 1, dtype, device)
        for layout in ("contiguous", "channels_last"):
            image = tensor(1, ci, 70, 60, dtype=dtype, device=device, layout=layout)
            image[0, 1, y, x] = float("inf")
            assert OP(image, w, precision=precision).isnan().all(), (ci, y, x)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 3, 1), (1, 8, 3, 5)])
def test_strides_follow_pytorchs_rule(sizes: tuple[int, ...], upsample: int, device: str) -> None:
    """Every order of the dimensions in memory; weights in both formats; a fake says the same."""
    mode = FakeTensorMode()
    for order in itertools.permutations(range(4)):
        back = [order.index(d) for d in range(4)]
        x = torch.randn([sizes[d] for d in order], device=device).permute(back)
        wide = torch.randn([sizes[d] + 1 for d in order], device=device).permute(back)
        sliced = wide[: sizes[0], : sizes[1], : sizes[2], : sizes[3]]
        for input, weight_format in itertools.product(
            (x, sliced, x[:1].expand(sizes)), (torch.contiguous_format, torch.channels_last)
        ):
            w = _weight(4, sizes[1], 3, 3, torch.float32, device).contiguous(memory_format=weight_format)
            result = OP(input, w, padding=[1, 1], upsample=upsample)
            reference = conv_instance_norm(input, w, padding=(1, 1), upsample=upsample)
            assert result.stride() == dense_strides(reference.shape, input), (order, input.stride())
            assert max_error(result, reference) < 1e-3
            fake = OP(mode.from_tensor(input), mode.from_tensor(w), padding=[1, 1], upsample=upsample)
            assert fake.shape == result.shape and fake.stride() == result.stride()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batches_give_empty_results(device: str) -> None:
    for memory_format, upsample in itertools.product((torch.contiguous_format, torch.channels_last), (1, 2)):
        x = torch.empty(0, 3, 6, 5, device=device).contiguous(memory_format=memory_format).requires_grad_()
        w = _weight(4, 3, 3, 3, torch.float32, device).requires_grad_()
        assert OP(x.detach(), w.detach(), padding=[1], upsample=upsample).shape == (
            0,
            4,
            6 * upsample,
            5 * upsample,
        )
        result = OP(x, w, padding=[1], upsample=upsample)
        assert result.shape == (0, 4, 6 * upsample, 5 * upsample)
        result.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert w.grad is not None and torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device: str) -> None:
    """The norm may run in place, but only in the convolution's own result."""
    for ci, co, kernel, upsample in ((3, 4, 3, 1), (1, 1, 1, 1), (3, 4, 3, 2)):
        x, w = tensor(2, ci, 8, 8, device=device), _weight(co, ci, kernel, kernel, torch.float32, device)
        w = torch.ones_like(w) if kernel == 1 else w
        r = tensor(2, co, 8 * upsample, 8 * upsample, device=device)
        before = [t.clone() for t in (x, w, r)]
        padding = [kernel // 2]
        first = OP(x, w, padding=padding, upsample=upsample, residual=r)
        assert torch.equal(first, OP(x, w, padding=padding, upsample=upsample, residual=r))
        for now, then in zip((x, w, r), before, strict=True):
            assert torch.equal(now, then)


def test_one_integer_stands_for_two() -> None:
    x, w = tensor(1, 3, 9, 9), _weight(4, 3, 3, 3, torch.float32, "cpu")
    expected = OP(x, w, stride=[2, 2], padding=[1, 1])
    assert torch.equal(OP(x, w, stride=2, padding=1), expected)
    assert torch.equal(OP(x, w, stride=[2], padding=[1]), expected)
    assert torch.equal(fused_conv_instance_norm_relu(x, w, stride=2, padding=(1, 1)), expected)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "padding_mode", "upsample", "params"),
    [
        ((3, 3), (1, 1), (1, 1), "zeros", 1, "C"),
        ((3, 2), (2, 1), (1, 2), "reflect", 1, "NC"),
        ((3, 3), (1, 1), (1, 1), "replicate", 2, "none"),
        ((1, 1), (1, 1), (0, 0), "zeros", 1, "C-weight"),
    ],
)
def test_gradcheck(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    padding_mode: str,
    upsample: int,
    params: str,
    activation: str,
    device: str,
) -> None:
    double = torch.float64
    for layout, with_residual in (("contiguous", False), ("channels_last", True)):
        x = tensor(2, 2, 4, 3, dtype=double, device=device, layout=layout).requires_grad_()
        w = _weight(3, 2, *kernel, double, device).requires_grad_()
        norm = [
            p.requires_grad_() if p is not None else None for p in _norm_params(params, 2, 3, double, device)
        ]
        settings_ = (stride, padding, padding_mode, upsample, 1e-2, activation, 0.2)
        shape = OP(x, w, None, None, None, *settings_).shape
        r = tensor(*shape, dtype=double, device=device).requires_grad_() if with_residual else None

        def function(*t: Tensor | None, s: tuple[Any, ...] = settings_) -> Tensor:
            return OP(t[0], t[1], None, t[2], t[3], *s, t[4])

        # cuDNN's float64 convolutions may add up in another order from run to run.
        assert torch.autograd.gradcheck(function, (x, w, *norm, r), nondet_tol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_as_accurate_as_pytorchs(
    layer: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    ci, co, kernel, stride, padding, upsample = LAYERS[layer]
    side = 10 if device == "cpu" else 40
    x = tensor(2, ci, side, side + 3, dtype=dtype, device=device, layout=layout)
    w = _weight(co, ci, *_two(kernel), dtype, device)
    norm_weight, norm_bias = _norm_params("C", 2, co, dtype, device)
    tail = (_two(stride), _two(padding), "reflect", upsample, 1e-5, "silu", 0.01)
    inputs = [x, w, norm_weight, norm_bias]
    reference_output = conv_instance_norm(x, w, None, norm_weight, norm_bias, *tail)
    inputs.append(tensor(*reference_output.shape, dtype=dtype, device=device))
    grad = torch.randn(reference_output.shape, device=device).to(dtype)

    def gradients(function: Any, tensors: list[Any], grad: Tensor) -> list[Any]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        function(leaves[0], leaves[1], None, leaves[2], leaves[3], *tail, leaves[4]).backward(grad)
        return [leaf.grad for leaf in leaves]

    poison(grad.numel(), dtype, device)
    with tf32(False):
        results = gradients(OP, inputs, grad)
        yardsticks = gradients(torch_conv_instance_norm, inputs, grad)
    references = gradients(conv_instance_norm, [t.double() for t in inputs], grad.double())
    for leaf, result, yardstick, reference in zip(inputs, results, yardsticks, references, strict=True):
        assert result.dtype == leaf.dtype and result.shape == leaf.shape
        pixels = grad.numel() / co
        scale = None if result.dim() == 4 else pixels**0.5
        assert_as_accurate(result, yardstick, reference, ulps=2.0, scale=scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gradient_of_the_bias_is_zeros(dtype: torch.dtype, device: str) -> None:
    x = tensor(2, 3, 8, 8, dtype=dtype, device=device)
    w = _weight(4, 3, 3, 3, dtype, device)
    bias = torch.ones(4, dtype=dtype, device=device, requires_grad=True)
    for input in (x, x.clone().requires_grad_()):
        bias.grad = None
        OP(input, w, bias).sum().backward()
        assert bias.grad is not None
        assert bias.grad.dtype == dtype and torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_may_be_written_to(autocast: bool, device: str) -> None:
    """As ``nn.ReLU(inplace=True)`` behind it does, and ``y += x``."""
    x = tensor(2, 3, 6, 5, device=device)
    weight = _weight(3, 3, 3, 3, torch.float32, device)
    gradients = []
    for in_place in (False, True):
        leaves = [t.clone().requires_grad_() for t in (weight, x[0, :, 0, 0])]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            result = OP(x, *leaves, padding=[1, 1], activation="none")
        other = x.to(result.dtype)
        result = result.add_(other).relu_() if in_place else torch.relu(result + other)
        gradients.append(torch.autograd.grad(result.float().square().sum(), leaves))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-2)
    assert not gradients[1][1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_forward_is_the_same_with_and_without_gradients(device: str) -> None:
    """Two implementations stand behind them; training must see what inference will."""
    for layout, upsample, mode in itertools.product(("contiguous", "channels_last"), (1, 2), MODES):
        x = tensor(2, 8, 12, 10, device=device, layout=layout)
        w = _weight(9, 8, 3, 3, torch.float32, device)
        common: dict[str, Any] = dict(padding=[1, 1], padding_mode=mode, upsample=upsample)
        with tf32(False):
            plain = OP(x, w, **common)
            trained = OP(x, w.clone().requires_grad_(), **common)
        assert trained.requires_grad and trained.stride() == plain.stride()
        torch.testing.assert_close(trained.detach(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_says_that_it_is_not_supported(device: str) -> None:
    x = tensor(1, 2, 6, 6, device=device).requires_grad_()
    w = _weight(3, 2, 3, 3, torch.float32, device)
    bias = torch.zeros(3, device=device).requires_grad_()
    for mode, upsample in (("zeros", 1), ("zeros", 2), ("reflect", 1)):
        result = OP(x, w, bias, padding=[1, 1], padding_mode=mode, upsample=upsample, activation="silu")
        (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=": double backward is not supported"):
            grad.sum().backward()


# --- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: str, requires_grad: bool, device: str) -> None:
    """PyTorch's own checks: schema, autograd registration, fake, AOT dispatch, static and dynamic."""

    def leaf(t: Tensor) -> Tensor:
        return t.requires_grad_(requires_grad)

    x = leaf(tensor(2, 3, 6, 5, device=device, layout=layout))
    w = leaf(_weight(4, 3, 3, 3, torch.float32, device))
    bias = leaf(torch.rand(4, device=device))
    nw, nb = leaf(torch.rand(2, 4, device=device)), leaf(torch.rand(2, 4, device=device))
    r = leaf(tensor(2, 4, 6, 5, device=device, layout="channels_last"))
    args = (x, w, bias, nw, nb, [1, 1], [1, 1], "reflect", 1, 1e-5, "relu", 0.01, r, "ieee")
    plain = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OP.default, args, test_utils=plain)
    torch.library.opcheck(OP.default, args, test_utils="test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OP.default, (x, w), dict(stride=[2, 1], upsample=2, padding=[0, 2], activation="silu")
    )


# --- errors ---------------------------------------------------------------------------------------


def _x(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes or (2, 3, 8, 9), dtype=dtype)


def _w(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes or (4, 3, 3, 3), dtype=dtype)


# arguments, message after "fused_conv_instance_norm_relu: "
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "rank": ((_x(3, 8, 9), _w()), {}, "input must have shape [N, C, H, W], got [3, 8, 9]"),
    "integer": (
        (_x(dtype=torch.int32), _w()),
        {},
        "input must be float32, float16, bfloat16 or float64, got int32",
    ),
    "complex": (
        (_x(dtype=torch.complex64), _w()),
        {},
        "input must be float32, float16, bfloat16 or float64, got complex64",
    ),
    "weight rank": (
        (_x(), _w(4, 3, 3)),
        {},
        "weight must have shape [out_channels, 3, kernel_height, kernel_width], got [4, 3, 3]",
    ),
    "weight channels": (
        (_x(), _w(4, 2, 3, 3)),
        {},
        "weight must have shape [out_channels, 3, kernel_height, kernel_width], got [4, 2, 3, 3]",
    ),
    "weight dtype": (
        (_x(), _w(dtype=torch.float16)),
        {},
        "weight must have the dtype of input, float32, got float16",
    ),
    "weight empty": ((_x(), _w(0, 3, 3, 3)), {}, "weight must have no empty dimension, got [0, 3, 3, 3]"),
    "bias shape": ((_x(), _w(), _x(3)), {}, "bias must have shape [4], got [3]"),
    "bias dtype": (
        (_x(), _w(), _x(4, dtype=torch.float64)),
        {},
        "bias must have the dtype of input, float32, got float64",
    ),
    "norm_weight shape": (
        (_x(), _w()),
        {"norm_weight": _x(3)},
        "norm_weight must have shape [4] or [2, 4], got [3]",
    ),
    "norm_bias shape": (
        (_x(), _w()),
        {"norm_bias": _x(3, 4)},
        "norm_bias must have shape [4] or [2, 4], got [3, 4]",
    ),
    "norm_weight dtype": (
        (_x(), _w()),
        {"norm_weight": _x(4, dtype=torch.float16)},
        "norm_weight must be float32, got float16",
    ),
    "norm shapes": (
        (_x(), _w()),
        {"norm_weight": _x(4), "norm_bias": _x(2, 4)},
        "norm_weight and norm_bias must have the same shape, got [4] and [2, 4]",
    ),
    "stride 0": ((_x(), _w()), {"stride": [0, 1]}, "stride must be one or two integers >= 1, got [0, 1]"),
    "padding negative": (
        (_x(), _w()),
        {"padding": [1, -1]},
        "padding must be one or two integers >= 0, got [1, -1]",
    ),
    "three paddings": (
        (_x(), _w()),
        {"padding": [1, 1, 1]},
        "padding must be one or two integers >= 0, got [1, 1, 1]",
    ),
    "padding_mode": (
        (_x(), _w()),
        {"padding_mode": "circular"},
        'padding_mode must be one of zeros, reflect, replicate, got "circular"',
    ),
    "upsample": ((_x(), _w()), {"upsample": 3}, "upsample must be 1 or 2, got 3"),
    "activation": (
        (_x(), _w()),
        {"activation": "elu"},
        'activation must be one of none, relu, leaky_relu, silu, sigmoid, tanh, got "elu"',
    ),
    "precision": ((_x(), _w()), {"precision": "bf16"}, 'precision must be one of ieee, tf32, got "bf16"'),
    "reflect too far": (
        (_x(), _w()),
        {"padding": [8, 0], "padding_mode": "reflect"},
        "padding must be smaller than the (upsampled) input for padding_mode reflect, "
        "got padding 8 for input [2, 3, 8, 9]",
    ),
    "kernel too large": (
        (_x(2, 3, 2, 9), _w(4, 3, 5, 3)),
        {"padding": [1, 1]},
        "weight's kernel [5, 3] must not be larger than the padded input, "
        "got input [2, 3, 2, 9] with padding [1, 1]",
    ),
    "residual shape": (
        (_x(), _w()),
        {"residual": _x(2, 4, 8, 9)},
        "residual must have shape [2, 4, 6, 7], got [2, 4, 8, 9]",
    ),
    "residual dtype": (
        (_x(), _w()),
        {"residual": _x(2, 4, 6, 7, dtype=torch.float64)},
        "residual must have the dtype of input, float32, got float64",
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["plain", "grad", "fake"])
@pytest.mark.parametrize("case", ERRORS)
def test_each_error_is_one_line_that_names_the_argument(case: str, way: str, device: str) -> None:
    args, kwargs, message = ERRORS[case]
    mode = FakeTensorMode()

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.to(device)
        if way == "fake":
            return mode.from_tensor(moved)
        return moved.requires_grad_() if way == "grad" and moved.dtype.is_floating_point else moved

    with pytest.raises(RuntimeError) as caught:
        OP(*(prepare(a) for a in args), **{k: prepare(v) for k, v in kwargs.items()})
    assert str(caught.value).splitlines()[0] == f"fused_conv_instance_norm_relu: {message}"


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("argument", ["weight", "bias", "norm_weight", "norm_bias", "residual"])
def test_a_meta_tensor_beside_real_ones_is_refused(argument: str, upsample: int) -> None:
    given = {"weight": _w(), "residual": _x(2, 4, 6 if upsample == 1 else 14, 7 if upsample == 1 else 16)}
    arguments = {"weight": _w(), argument: given.get(argument, _x(4)).to("meta")}
    with pytest.raises(RuntimeError, match=f"{argument} must be on the device of input, cpu, got"):
        OP(_x(), upsample=upsample, **arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["plain", "grad"])
@pytest.mark.parametrize("argument", ["weight", "bias", "norm_weight", "norm_bias", "residual"])
def test_tensors_on_two_devices_are_refused(argument: str, way: str) -> None:
    given = {"weight": _w(), "residual": _x(2, 4, 6, 7)}.get(argument, _x(4))
    x = _x().requires_grad_(way == "grad")
    for input, other, devices in ((x.cuda(), "cpu", ("cuda:0", "cpu")), (x, "cuda", ("cpu", "cuda:0"))):
        arguments = {"weight": _w().to(input.device), argument: given.to(other)}
        with pytest.raises(RuntimeError) as caught:
            OP(input, **arguments)
        expected = f"{argument} must be on the device of input, {devices[0]}, got {devices[1]}"
        assert str(caught.value).splitlines()[0] == f"fused_conv_instance_norm_relu: {expected}"


def test_a_failed_check_of_upsampling_is_the_same_text() -> None:
    """The upsampling path of the CPU plans for itself."""
    with pytest.raises(
        RuntimeError, match=r"^fused_conv_instance_norm_relu: residual must have shape \[2, 4, 16, 18\]"
    ):
        OP(_x(), _w(), padding=[1, 1], upsample=2, residual=_x(2, 4, 16, 17))
