"""``fused_instance_norm``: accuracy, layouts, paths, gradients, registration, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, seed
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import styleforge
from _reference import (
    ACTIVATIONS,
    DEVICES,
    FLOATS,
    LAYOUTS,
    assert_as_accurate,
    assert_as_accurate_together,
    dense_strides,
    instance_norm,
    max_error,
    poison,
    random_configurations,
    rms,
    rms_error,
    tensor,
    torch_instance_norm,
)
from styleforge.ops import fused_instance_norm

OP = torch.ops.styleforge.fused_instance_norm
FORWARD = torch.ops.styleforge._fused_instance_norm_forward
BACKWARD = torch.ops.styleforge._fused_instance_norm_backward
# Random configurations, over all dtypes and parts (which pytest-xdist can spread).
PARTS = 2
EASY = random_configurations(PARTS * len(FLOATS))


def _params(
    kind: str, batch: int, channels: int, dtype: torch.dtype, device: str
) -> tuple[Tensor | None, ...]:
    """(weight, bias) of one kind: which of them, [C] or [N, C], in which dtype, dense or not."""
    if kind == "none":
        return None, None
    which, shape, precision, *strided = kind.split("-")
    sizes = (channels,) if shape == "C" else (batch, channels)
    wanted = torch.float32 if precision == "float32" else dtype

    def make(offset: float) -> Tensor:
        if strided:
            return (torch.randn(*sizes, 2) * 0.5 + offset).to(wanted).to(device)[..., 0]
        return (torch.randn(sizes) * 0.5 + offset).to(wanted).to(device)

    return (make(1.0) if which in ("weight", "both") else None), (
        make(0.0) if which in ("bias", "both") else None
    )


PARAM_KINDS = (
    "none",
    "both-C-input",
    "both-C-float32",
    "both-NC-input",
    "both-NC-float32",
    "weight-C-input",
    "bias-C-float32",
    "weight-NC-float32",
    "bias-NC-input",
    "both-C-input-strided",
    "both-NC-float32-strided",
)


def _compare(args: tuple[Any, ...], kwargs: dict[str, Any], **limits: float) -> Tensor:
    """Runs the operator over poisoned memory and holds it against float64 and PyTorch. Returns its result."""
    input = args[0]
    reference = instance_norm(*args, **kwargs)
    yardstick = torch_instance_norm(*args, **kwargs)
    poison(input.numel(), input.dtype, input.device.type)
    result = OP(*args, **kwargs)
    assert result.dtype == input.dtype and result.device == input.device
    assert result.stride() == dense_strides(input.shape, input)
    assert_as_accurate(result, yardstick, reference, **limits)
    return result


def _rounding_of_the_mean(offset: float, spread: float) -> float:
    """What half a unit in the last place of a mean is in the result, in units of the result.

    On the GPU both PyTorch and we hold the mean of float32 in float32 (on the CPU both are better).
    """
    return 0.5 * abs(offset) / spread


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations_are_as_accurate_as_pytorch(part: int, dtype: torch.dtype, device: str) -> None:
    """Each of them alone, and all together, where luck averages out, without any floor."""
    errors: list[tuple[float, float]] = []

    @seed(PARTS * FLOATS.index(dtype) + part)  # other examples in each part, the same on each run
    @EASY
    @given(
        batch=st.integers(1, 4),
        channels=st.integers(1, 70),
        height=st.integers(1, 23),
        width=st.integers(1, 37),
        layout=st.sampled_from(LAYOUTS),
        params=st.sampled_from(PARAM_KINDS),
        residual=st.sampled_from((None, *LAYOUTS)),
        activation=st.sampled_from(ACTIVATIONS),
        slope=st.sampled_from((0.01, 0.2, 0.0, -0.5, 1.5)),
        eps=st.sampled_from((1e-5, 1e-3, 0.1)),
        spread=st.sampled_from((1.0, 0.05, 30.0)),
        offset=st.sampled_from((0.0, 3.0, -40.0)),
        data_seed=st.integers(0, 2**31 - 1),
    )
    def check(
        batch: int,
        channels: int,
        height: int,
        width: int,
        layout: str,
        params: str,
        residual: str | None,
        activation: str,
        slope: float,
        eps: float,
        spread: float,
        offset: float,
        data_seed: int,
    ) -> None:
        torch.manual_seed(data_seed)
        sizes = (batch, channels, height, width)
        x = tensor(*sizes, dtype=dtype, device=device, layout=layout, scale=spread, offset=offset)
        weight, bias = _params(params, batch, channels, dtype, device)
        r = tensor(*sizes, dtype=dtype, device=device, layout=residual) if residual else None
        kwargs = dict(eps=eps, activation=activation, negative_slope=slope, residual=r)
        reference = instance_norm(x, weight, bias, **kwargs)
        yardstick = torch_instance_norm(x, weight, bias, **kwargs)
        poison(x.numel(), dtype, device)
        result = OP(x, weight, bias, **kwargs)
        assert result.dtype == dtype
        assert result.stride() == dense_strides(sizes, x)
        # With bias and residual a result is a sum of terms that may cancel: their size sets the rounding.
        before = rms(instance_norm(x, weight, bias, eps)) + (rms(r) if r is not None else 0.0)
        scale = before if activation in ("none", "relu") else None
        ulps = None
        if dtype == torch.float64:  # the reference is rounded as well
            ulps = 4 + 4 * abs(offset) / spread
        elif dtype == torch.float32 and device == "cuda":
            ulps = 2 + _rounding_of_the_mean(offset, spread)
        assert_as_accurate(result, yardstick, reference, scale=scale, ulps=ulps)
        size = rms(reference)
        if size > 0:
            errors.append((rms_error(result, reference) / size, rms_error(yardstick, reference) / size))

    check()
    if len(errors) >= 20:
        assert_as_accurate_together(errors, dtype)


# name -> (scale, offset) of the input
HARD = {
    "mean 1000, deviation 1": (1.0, 1000.0),
    "mean -300, deviation 0.5": (0.5, -300.0),
    "variance below eps": (1e-4, 0.0),
    "variance far below eps": (1e-6, 0.0),
    "squares overflow float16": (300.0, 300.0),
    "near the largest float16": (9000.0, 0.0),
    "tiny": (1e-7, 0.0),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", HARD)
def test_hard_data(case: str, dtype: torch.dtype, layout: str, device: str) -> None:
    scale, offset = HARD[case]
    for sizes in ((2, 8, 32, 32), (1, 3, 65, 127), (2, 5, 9, 7)):
        x = tensor(*sizes, dtype=dtype, device=device, layout=layout, scale=scale, offset=offset)
        wide = device == "cuda" or dtype == torch.float64
        result = _compare((x,), {}, ulps=2.0 + (_rounding_of_the_mean(offset, scale) if wide else 0.0))
        assert result.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_constant_planes_give_the_bias(dtype: torch.dtype, layout: str, device: str) -> None:
    for sizes in ((2, 8, 16, 16), (2, 7, 5, 3), (3, 4, 1, 1)):
        x = torch.full(sizes, 0.7, dtype=dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
        bias = torch.randn(sizes[1], device=device).to(dtype)
        # The mean of equal values may be a unit in the last place off, and 1 / sqrt(eps) makes 316 of it.
        close = dict(rtol=0, atol=1000 * torch.finfo(torch.float32).eps)
        expected = bias[None, :, None, None].expand(sizes)
        torch.testing.assert_close(OP(x, None, bias), expected, **close)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_square_of_a_mean_may_overflow(layout: str) -> None:
    """In float64, whose sums have no wider type. Powers of two: means without a rounding."""
    for sizes in ((1, 16, 8, 8), (2, 3, 5, 7), (1, 600, 2, 2)):
        x = torch.full(sizes, 2.0**600, dtype=torch.float64)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
        assert (OP(x) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_spread_as_in_pytorch(
    activation: str, dtype: torch.dtype, layout: str, device: str
) -> None:
    for sizes in ((3, 8, 16, 16), (2, 5, 7, 9)):
        x = tensor(*sizes, dtype=dtype, device=device, layout=layout)
        r = tensor(*sizes, dtype=dtype, device=device, layout=layout)
        x[0, 1, 3, 2] = float("nan")
        x[1, 0, 2, 1] = float("inf")
        x[1, 2, 6, 6] = -float("inf")
        x[1, 3, 0, 0], x[1, 3, 0, 1] = float("inf"), -float("inf")
        r[0, 0, 0, 0], r[0, 2, 1, 1], r[0, 2, 1, 2] = float("nan"), float("inf"), -float("inf")
        for residual in (None, r):
            result = OP(x, activation=activation, residual=residual)
            expected = torch_instance_norm(x, activation=activation, residual=residual)
            assert torch.equal(result.isnan(), expected.isnan())
            assert torch.equal(result.isposinf(), expected.isposinf())
            assert torch.equal(result.isneginf(), expected.isneginf())
            close = dict(rtol=8 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
            torch.testing.assert_close(result, expected, equal_nan=True, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activation_tails(dtype: torch.dtype, device: str) -> None:
    """Far from zero, where a fast exponential overflows. The norm is the identity here."""
    for activation in ACTIVATIONS:
        x = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=dtype, device=device).repeat(1, 64, 16, 1)
        r = torch.linspace(-200, 200, x.numel(), device=device).to(dtype).view_as(x)
        _compare((x,), dict(activation=activation, residual=r, negative_slope=0.3), ulps=2.0)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 1), (1, 8, 1, 5)]
)
def test_strides_follow_pytorchs_rule(sizes: tuple[int, ...], device: str) -> None:
    """Every order of the dimensions in memory, sliced or not, with dimensions of size 1."""
    for order in itertools.permutations(range(4)):
        back = [order.index(d) for d in range(4)]
        x = torch.randn([sizes[d] for d in order], device=device).permute(back)
        wide = torch.randn([sizes[d] + 1 for d in order], device=device).permute(back)
        sliced = wide[: sizes[0], : sizes[1], : sizes[2], : sizes[3]]
        for input in (x, sliced, x[:1].expand(sizes)):
            assert input.shape == sizes
            result = OP(input)
            assert result.stride() == dense_strides(sizes, input), (order, input.stride())
            assert max_error(result, instance_norm(input)) < 1e-4
            mode = FakeTensorMode()
            assert OP(mode.from_tensor(input)).stride() == result.stride(), (order, input.stride())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_empty_inputs_give_empty_results(sizes: tuple[int, ...], device: str) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(sizes, device=device).contiguous(memory_format=memory_format).requires_grad_()
        weight = torch.ones(sizes[1], device=device, requires_grad=True)
        bias = torch.ones(sizes[1], device=device, requires_grad=True)
        result = OP(x, weight, bias, 1e-5, "relu", 0.01, x.detach())
        assert result.shape == sizes and result.stride() == dense_strides(sizes, x)
        result.sum().backward()
        assert x.grad is not None and x.grad.shape == sizes
        assert torch.equal(weight.grad, torch.zeros_like(weight))
        assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device: str) -> None:
    x = tensor(2, 8, 8, 8, device=device)
    weight, bias, r = torch.rand(8, device=device), torch.rand(8, device=device), torch.rand_like(x)
    before = [t.clone() for t in (x, weight, bias, r)]
    for path in (x, x.contiguous(memory_format=torch.channels_last)):
        OP(path, weight, bias, 1e-5, "relu", 0.01, r)
    for now, then in zip((x, weight, bias, r), before, strict=True):
        assert torch.equal(now, then)


def test_python_function_is_the_operator() -> None:
    x, w, b, r = tensor(2, 3, 4, 5), torch.rand(3), torch.rand(3), tensor(2, 3, 4, 5)
    given = dict(eps=0.1, activation="leaky_relu", negative_slope=0.3, residual=r)
    assert torch.equal(fused_instance_norm(x, w, b, **given), OP(x, w, b, 0.1, "leaky_relu", 0.3, r))
    assert torch.equal(fused_instance_norm(x), OP(x))


# --- paths on CUDA --------------------------------------------------------------------------------

# STYLEFORGE_PATH, layout, sizes, expected path. Vectorised ones, and odd ones that take single elements. The
# default ("") is what the schedule was tuned to on an H200 with its 132 multiprocessors.
PATHS: list[tuple[str, str, tuple[int, ...], str]] = [
    ("", "contiguous", (4, 64, 16, 16), "plane:block"),
    ("", "contiguous", (4, 70, 13, 11), "plane:block"),
    ("", "offset", (4, 64, 32, 32), "plane:block"),
    ("", "contiguous", (3, 5, 1, 1), "plane:block"),
    ("", "contiguous", (5, 40, 128, 128), "plane:block"),
    ("", "contiguous", (5, 40, 127, 129), "plane:block"),
    ("", "contiguous", (2, 20, 191, 193), "plane:cluster"),
    ("plane", "contiguous", (2, 32, 256, 256), "plane:cluster"),
    ("plane", "contiguous", (1, 10, 80, 66), "plane:cluster"),
    ("plane", "contiguous", (1, 2, 640, 512), "plane:cluster"),
    ("plane", "contiguous", (1, 3, 641, 511), "plane:cluster"),
    ("", "contiguous", (1, 3, 512, 512), "plane:cluster"),
    ("split", "contiguous", (1, 3, 512, 512), "split:nchw"),
    ("", "contiguous", (1, 32, 256, 256), "plane:cluster"),
    ("", "contiguous", (1, 10, 80, 66), "plane:cluster"),
    ("", "contiguous", (2, 32, 256, 256), "plane:bulk"),
    ("", "contiguous", (1, 33, 512, 256), "plane:bulk"),
    ("", "contiguous", (1, 16, 512, 512), "stream"),
    ("", "contiguous", (1, 3, 1024, 1024), "stream"),
    ("", "contiguous", (5, 64, 256, 256), "plane:bulk"),
    ("bulk", "contiguous", (4, 64, 16, 16), "plane:bulk"),
    ("bulk", "contiguous", (3, 5, 8, 1), "plane:bulk"),
    ("bulk", "contiguous", (2, 31, 52, 50), "plane:bulk"),
    ("stream", "contiguous", (2, 64, 256, 256), "stream"),
    ("stream", "contiguous", (1, 3, 512, 512), "stream"),
    ("stream", "contiguous", (4, 64, 16, 16), "stream"),
    ("stream", "contiguous", (3, 5, 8, 1), "stream"),
    ("stream", "contiguous", (2, 131, 52, 50), "stream"),
    ("stream", "contiguous", (1, 2, 1111, 1000), "stream"),
    ("stream", "contiguous", (1, 1, 2048, 2048), "stream"),
    ("", "channels_last", (4, 64, 256, 256), "stream:channels_last:team"),
    ("", "channels_last", (5, 64, 256, 256), "stream:channels_last"),
    ("", "channels_last", (16, 128, 128, 128), "stream:channels_last:team"),
    ("", "channels_last", (17, 128, 129, 129), "stream:channels_last:team"),
    ("", "channels_last", (32, 64, 96, 96), "stream:channels_last:team"),
    ("stream", "channels_last", (1, 4, 3, 4), "stream:channels_last"),
    ("stream", "channels_last", (2, 16, 64, 64), "stream:channels_last"),
    ("stream", "channels_last", (1, 16, 301, 299), "stream:channels_last"),
    ("stream", "channels_last", (3, 320, 40, 41), "stream:channels_last"),  # slices
    ("stream", "channels_last", (130, 32, 24, 24), "stream:channels_last"),
    ("stream", "channels_last", (2, 5, 64, 72), "stream:channels_last"),  # several pixels to a row of vectors
    ("stream", "channels_last", (1, 3, 512, 512), "stream:channels_last"),
    ("stream", "channels_last", (1, 64, 800, 804), "stream:channels_last"),  # read twice
    ("", "channels_last", (1, 3, 512, 512), "split:few_channels"),
    ("", "channels_last", (2, 3, 41, 48), "split:few_channels"),
    ("", "channels_last", (70, 3, 20, 20), "split:few_channels"),
    ("", "channels_last", (3, 2, 64, 72), "split:few_channels"),
    ("", "channels_last", (1, 2, 8, 1), "split:few_channels"),
    ("", "channels_last", (2, 16, 8, 7), "slab:block"),
    ("", "channels_last", (2, 13, 5, 7), "slab:block"),
    ("plane", "channels_last", (60, 64, 24, 24), "slab:block"),
    ("", "channels_last", (60, 64, 24, 24), "held"),
    ("", "channels_last", (60, 61, 23, 21), "slab:block"),
    ("plane", "channels_last", (2, 64, 64, 64), "slab:cluster"),
    ("", "channels_last", (2, 64, 64, 64), "held"),
    ("", "channels_last", (2, 37, 101, 99), "slab:cluster"),
    ("plane", "channels_last", (1, 128, 64, 60), "slab:cluster"),
    ("", "channels_last", (1, 136, 64, 62), "held"),
    ("", "contiguous", (1, 1, 2048, 2048), "split:nchw"),
    ("", "contiguous", (1, 1, 2047, 2049), "split:nchw"),
    ("split", "channels_last", (1, 16, 1024, 512), "split:channels_last"),
    ("", "channels_last", (1, 7, 1401, 513), "split:channels_last"),
    ("split", "contiguous", (4, 64, 16, 16), "split:nchw"),
    ("split", "contiguous", (4, 70, 13, 11), "split:nchw"),
    ("split", "contiguous", (2, 3, 255, 257), "split:nchw"),
    ("split", "offset", (2, 3, 256, 256), "split:nchw"),
    ("split", "channels_last", (2, 16, 16, 16), "split:channels_last"),
    ("split", "channels_last", (2, 13, 11, 7), "split:channels_last"),
    ("split", "channels_last", (1, 3, 301, 299), "split:channels_last"),
    ("split", "channels_last", (5, 200, 31, 33), "split:channels_last"),
    ("portable", "contiguous", (2, 3, 128, 128), "plane:block"),
    ("portable", "contiguous", (2, 3, 127, 129), "plane:block"),
    ("portable", "contiguous", (1, 3, 511, 513), "split:nchw"),
    ("portable", "contiguous", (1, 3, 512, 512), "split:nchw"),
    ("portable", "channels_last", (2, 64, 32, 32), "slab:block"),
    ("portable", "channels_last", (2, 37, 31, 33), "slab:block"),
    ("portable", "channels_last", (2, 64, 256, 256), "split:channels_last"),
    ("ticket", "contiguous", (1, 3, 2048, 2048), "split:nchw:ticket"),
    ("ticket", "contiguous", (1, 3, 2047, 2049), "split:nchw:ticket"),
    ("ticket", "contiguous", (3, 2, 2011, 1999), "split:nchw:ticket"),
]


def _forced(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """STYLEFORGE_PATH as given; the C++ side reads it at every call."""
    if path:
        monkeypatch.setenv("STYLEFORGE_PATH", path)
    else:
        monkeypatch.delenv("STYLEFORGE_PATH", raising=False)


def _reference_on_gpu(x: Tensor, **kwargs: Any) -> Tensor:
    """The formula in float64 where the tensor lies: the large shapes would take long on the CPU."""
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0, keepdim=True)
    y = (x.double() - mean) * torch.rsqrt(variance + 1e-5)
    y = y * kwargs["weight"].double()[..., None, None] + kwargs["bias"].double()[..., None, None]
    return torch.nn.functional.silu(y + kwargs["residual"].double())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("forced", "layout", "sizes", "expected"), PATHS, ids=str)
def test_every_cuda_path(
    forced: str,
    layout: str,
    sizes: tuple[int, ...],
    expected: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs_sm90 = "cluster" in expected or "bulk" in expected or expected.startswith(("stream", "held"))
    if needs_sm90 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs thread block clusters or bulk copies (compute capability 9.0)")
    _forced(monkeypatch, forced)
    if (
        dtype != torch.float32
        and layout != "channels_last"
        and expected.startswith("split")
        and forced != "split"
    ):
        sizes = (*sizes[:2], 2 * sizes[2], sizes[3])  # as many bytes as in float32
    if dtype != torch.float32 and expected in ("plane:cluster", "plane:bulk", "stream"):
        sizes = (*sizes[:2], 2 * sizes[2], sizes[3])
    x = tensor(*sizes, dtype=dtype, device="cuda", layout=layout, offset=2.0)
    half_l2 = torch.cuda.get_device_properties(0).L2_cache_size // 2
    if expected == "split:nchw" and x.numel() * x.element_size() > half_l2:
        expected = "split:nchw:ticket"  # on a GPU with a small cache
    weight, bias = torch.rand(sizes[:2], device="cuda") + 0.5, torch.randn(sizes[:2], device="cuda")
    r = tensor(*sizes, dtype=dtype, device="cuda")
    reference = _reference_on_gpu(x, weight=weight, bias=bias, residual=r)
    yardstick = torch_instance_norm(x, weight, bias, activation="silu", residual=r)
    poison(x.numel(), dtype, "cuda")
    result = OP(x, weight, bias, 1e-5, "silu", 0.01, r)
    assert styleforge.last_path() == f"instance_norm:cuda:{expected}"
    assert_as_accurate(result, yardstick, reference)
    # The differentiable forward takes the same path, and hands out the statistics it used.
    again, mean, rstd = FORWARD(x, weight, bias, 1e-5, "silu", 0.01, r)
    assert styleforge.last_path() == f"instance_norm:cuda:{expected}"
    assert torch.equal(again, result)
    variance, exact = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    torch.testing.assert_close(mean, exact.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, torch.rsqrt(variance + 1e-5).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("forced", ["", "portable"])
def test_tensors_larger_than_half_the_l2(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _forced(monkeypatch, forced)
    plane = 1024 * 1024 * 4
    planes = torch.cuda.get_device_properties(0).L2_cache_size // 2 // plane + 2
    x = torch.randn(1, planes, 1024, 1024, device="cuda")
    result = OP(x, activation="relu")
    stream = not forced and torch.cuda.get_device_capability() >= (9, 0)
    assert styleforge.last_path() == f"instance_norm:cuda:{'stream' if stream else 'split:nchw:ticket'}"
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0, keepdim=True)
    reference = ((x.double() - mean) * torch.rsqrt(variance + 1e-5)).relu()
    torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("forced", ["", "stream", "split", "portable"])
@pytest.mark.parametrize("case", HARD)
def test_hard_data_on_every_path(case: str, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _forced(monkeypatch, forced)
    scale, offset = HARD[case]
    for layout in ("contiguous", "channels_last"):
        for sizes in ((2, 4, 96, 96), (1, 3, 301, 299)):
            for dtype in (torch.float32, torch.float16):
                x = tensor(*sizes, dtype=dtype, device="cuda", layout=layout, scale=scale, offset=offset)
                ulps = 2.0 + _rounding_of_the_mean(offset, scale)
                assert _compare((x,), {}, ulps=ulps).isfinite().all()


needs_bulk_copies = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs bulk copies (compute capability 9.0)",
)


@pytest.mark.cuda
@needs_bulk_copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("grid", "stages"), [(1, 1), (1, 6), (3, 2), (40, 1)])
def test_stream_where_planes_are_larger_than_all_rings(
    grid: int, stages: int, order: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that cannot hold a plane together take each other's parts, to the bit."""
    _forced(monkeypatch, "stream")
    x = tensor(2, 3, 152, 244, dtype=dtype, device="cuda", offset=2.0)
    r = tensor(2, 3, 152, 244, dtype=dtype, device="cuda")
    weight, bias = torch.rand(3, device="cuda") + 0.5, torch.randn(3, device="cuda")
    monkeypatch.setenv("STYLEFORGE_TUNE", "bytes=1500,stages=6,order=2")
    expected = FORWARD(x, weight, bias, 1e-5, "silu", 0.01, r)
    reference = instance_norm(x, weight, bias, activation="silu", residual=r)
    assert rms_error(expected[0], reference) < 8 * torch.finfo(dtype).eps
    monkeypatch.setenv("STYLEFORGE_TUNE", f"bytes=1500,stages={stages},grid={grid},order={order}")
    for _ in range(3):
        poison(x.numel(), dtype, "cuda")
        results = FORWARD(x, weight, bias, 1e-5, "silu", 0.01, r)
        assert styleforge.last_path() == "instance_norm:cuda:stream"
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def _holds_in_channels_last(sizes: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    """Every kind of epilogue against float64, by the path that is named, and again to the bit."""
    x = tensor(*sizes, dtype=dtype, device="cuda", layout="channels_last", offset=2.0)
    r = tensor(*sizes, dtype=dtype, device="cuda", layout="channels_last")
    weight, bias = torch.rand(sizes[:2], device="cuda") + 0.5, torch.randn(sizes[:2], device="cuda")
    for activation, residual in (("relu", None), ("leaky_relu", r), ("silu", r)):
        reference = instance_norm(x, weight, bias, activation=activation, residual=residual)
        poison(x.numel(), dtype, "cuda")
        first = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
        assert styleforge.last_path() == f"instance_norm:cuda:{path}"
        assert rms_error(first[0], reference) < 8 * torch.finfo(dtype).eps
        for _ in range(3):
            again = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.cuda
@needs_bulk_copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 40, 60, 56), (1, 136, 61, 40), (2, 3, 64, 64)], ids=str)
@pytest.mark.parametrize(
    "tune",
    [
        "grid=1",
        "grid=3,stages=2",
        "grid=7,stages=5",
        "grid=40,stages=1",
        "grid=100,stages=3,held=1",
        "grid=9,stages=6,held=6,cache=7",
        "ahead=1",
        "grid=3,stages=5,ahead=2",
        "lanes=1",
        "lanes=3",
        "direct=2",
    ],
)
def test_channels_last_stream_however_it_is_cut(
    tune: str, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units that the rings hold and that they do not, statistics by one journey and by two."""
    _forced(monkeypatch, "stream")
    monkeypatch.setenv("STYLEFORGE_TUNE", tune)
    _holds_in_channels_last(sizes, dtype, "stream:channels_last")


@pytest.mark.cuda
@needs_bulk_copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(7, 64, 60, 56), (2, 192, 61, 40), (9, 128, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "tune",
    [
        "",
        "grid=1",
        "grid=2,stages=6",
        "cluster=8",
        "lanes=4,cluster=4,grid=3",
        "lanes=2,cluster=2",
        "ahead=1",
    ],
)
def test_channels_last_in_clusters_however_it_is_cut(
    tune: str, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several units of a cluster; blocks of the cluster without pixels."""
    _forced(monkeypatch, "")
    monkeypatch.setenv("STYLEFORGE_TUNE", f"units=2,{tune}")
    _holds_in_channels_last(sizes, dtype, "stream:channels_last:cluster")


@pytest.mark.cuda
@needs_bulk_copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(7, 64, 60, 56), (2, 192, 61, 40), (9, 128, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "tune",
    [
        "teams=8",
        "teams=4,lanes=4",
        "teams=2,lanes=2",
        "teams=3,grid=20",
        "teams=1,grid=4",
        "teams=2,grid=8,stages=8",
        "teams=4,ahead=1",
    ],
)
def test_channels_last_by_teams_however_it_is_cut(
    tune: str, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several units of a team; blocks without pixels."""
    _forced(monkeypatch, "")
    monkeypatch.setenv("STYLEFORGE_TUNE", tune)
    _holds_in_channels_last(sizes, dtype, "stream:channels_last:team")


@pytest.mark.cuda
def test_many_planes_and_long_planes() -> None:
    """Grids beyond 65,535 blocks, and a plane of more than 2^24 pixels, where a float counter would stop."""
    for sizes in ((700, 100, 2, 3), (1, 70001, 3, 3), (1, 1, 4100, 4100)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = (torch.randn(sizes, device="cuda") + 3).contiguous(memory_format=memory_format)
            variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0, keepdim=True)
            reference = (x.double() - mean) * torch.rsqrt(variance + 1e-5)
            torch.testing.assert_close(OP(x).double(), reference, rtol=1e-4, atol=2e-5)


@pytest.mark.cuda
def test_more_planes_than_a_grid_has_blocks() -> None:
    """2^32 planes and a few are refused, not the few normalised and the others left out."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.empty(65537, 65537, 1, 1, dtype=torch.float16, device="cuda")
    with pytest.raises(RuntimeError, match="invalid configuration"):
        OP(x)


# --- gradients ------------------------------------------------------------------------------------


def _away_from_kink(x: Tensor, *args: Any, residual: Tensor | None = None) -> Tensor:
    """1 where the activation's argument is not near 0, where relu's derivative jumps; 0 elsewhere."""
    return (instance_norm(x, *args, residual=residual).abs() > 0.02).double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "params", ["none", "both-C-input", "both-NC-input", "weight-C-input", "bias-NC-input"]
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(with_residual: bool, params: str, activation: str, device: str) -> None:
    sizes = (2, 3, 4, 3)
    for layout in ("contiguous", "channels_last"):
        x = tensor(*sizes, dtype=torch.float64, device=device, layout=layout).requires_grad_()
        weight, bias = _params(params, 2, 3, torch.float64, device)
        weight = weight.requires_grad_() if weight is not None else None
        bias = bias.requires_grad_() if bias is not None else None
        r = tensor(*sizes, dtype=torch.float64, device=device).requires_grad_() if with_residual else None

        def function(x: Tensor, weight: Tensor | None, bias: Tensor | None, r: Tensor | None) -> Tensor:
            return OP(x, weight, bias, 1e-3, activation, 0.2, r)

        assert torch.autograd.gradcheck(function, (x, weight, bias, r), nondet_tol=0.0)


@pytest.mark.parametrize("slope", [0.0, -0.7, 1.3])
def test_gradcheck_of_unusual_slopes(slope: float) -> None:
    for residual in (None, tensor(2, 3, 4, 3, dtype=torch.float64).requires_grad_()):
        x = tensor(2, 3, 4, 3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, r, s=slope: OP(x, None, None, 1e-5, "leaky_relu", s, r), (x, residual)
        )


def _gradients(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    function(*leaves).backward(grad)
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


# CUDA takes the large ones as well.
GRADIENT_SIZES = [
    pytest.param((2, 5, 9, 7), id="odd"),
    pytest.param((3, 16, 32, 32), id="vectors"),
    pytest.param((1, 3, 65, 130), id="wide"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", GRADIENT_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_as_accurate_as_pytorchs(
    activation: str, layout: str, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> None:
    for params, with_residual in (("both-C-input", False), ("both-NC-input", True), ("both-C-float32", True)):
        x = tensor(*sizes, dtype=dtype, device=device, layout=layout, offset=1.0)
        weight, bias = _params(params, *sizes[:2], dtype, device)
        assert weight is not None and bias is not None
        inputs = [x, weight, bias]
        if with_residual:
            inputs.append(tensor(*sizes, dtype=dtype, device=device))
        mask = _away_from_kink(x, weight, bias, residual=inputs[3] if with_residual else None)
        grad = (torch.randn(sizes, dtype=torch.float64, device=device) * mask).to(dtype)

        def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
            return OP(x, w, b, 1e-5, activation, 0.2, r)

        def theirs(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
            return torch_instance_norm(x, w, b, 1e-5, activation, 0.2, r)

        def exact(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
            return instance_norm(x, w, b, 1e-5, activation, 0.2, r)

        poison(x.numel(), dtype, device)
        results = _gradients(ours, inputs, grad)
        yardsticks = _gradients(theirs, inputs, grad)
        references = _gradients(exact, [t.double() for t in inputs], grad.double())
        for leaf, result, yardstick, reference in zip(inputs, results, yardsticks, references, strict=True):
            assert result.dtype == leaf.dtype and result.shape == leaf.shape
            if result.dim() == 4:
                assert_as_accurate(result, yardstick, reference, ulps=2.0)
            else:  # a handful of sums over pixels, too few for a ratio alone: the rounding of what was summed
                ulps = torch.finfo(dtype).eps / torch.finfo(result.dtype).eps
                if (
                    device == "cuda"
                ):  # float32 statistics: the mean's rounding shifts all terms of the sum alike
                    ulps += _rounding_of_the_mean(1.0, 1.0)
                assert_as_accurate(
                    result, yardstick, reference, ulps=ulps, scale=(sizes[2] * sizes[3]) ** 0.5
                )
        assert results[0].stride() == dense_strides(sizes, x)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(8, 64, 128, 128), (2, 13, 301, 299), (1, 3, 1024, 1024), (64, 128, 7, 5)])
def test_gradients_of_large_tensors(sizes: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = tensor(*sizes, dtype=dtype, device="cuda", layout=layout, offset=1.0)
    w, b = torch.rand(sizes[1], device="cuda") + 0.5, torch.rand(sizes[1], device="cuda")
    r = tensor(*sizes, dtype=dtype, device="cuda", layout=layout)
    grad = tensor(*sizes, dtype=dtype, device="cuda", layout=layout)

    def exact(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + 1e-5) * w[:, None, None] + b[:, None, None]
        return torch.nn.functional.silu(y + r)

    def theirs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return torch_instance_norm(x, w, b, 1e-5, "silu", 0.01, r)

    poison(x.numel(), dtype, "cuda")
    results = _gradients(lambda x, w, b, r: OP(x, w, b, 1e-5, "silu", 0.01, r), [x, w, b, r], grad)
    yardsticks = _gradients(theirs, [x, w, b, r], grad)
    references = _gradients(exact, [t.double() for t in (x, w, b, r)], grad.double())
    for result, yardstick, reference in zip(results, yardsticks, references, strict=True):
        scale = (sizes[0] * sizes[2] * sizes[3]) ** 0.5 if result.dim() < 4 else None
        ulps = 2.0 if result.dim() == 4 else torch.finfo(dtype).eps / torch.finfo(result.dtype).eps
        assert_as_accurate(result, yardstick, reference, ulps=ulps, scale=scale)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_only_where_asked(device: str) -> None:
    for wanted in range(4):
        inputs = [
            tensor(2, 3, 5, 4, device=device),
            torch.rand(3, device=device),
            torch.rand(3, device=device),
            tensor(2, 3, 5, 4, device=device),
        ]
        inputs[wanted].requires_grad_()
        x, w, b, r = inputs
        OP(x, w, b, 1e-5, "tanh", 0.01, r).square().sum().backward()
        got = inputs[wanted].grad
        assert got is not None
        assert [i for i, t in enumerate(inputs) if t.grad is not None] == [wanted]
        exact = inputs[wanted].detach().double().cpu().requires_grad_()
        x, w, b, r = (exact if i == wanted else t.detach().double().cpu() for i, t in enumerate(inputs))
        instance_norm(x, w, b, 1e-5, "tanh", 0.01, r).square().sum().backward()
        torch.testing.assert_close(got.cpu().double(), exact.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_and_non_contiguous_gradients(device: str) -> None:
    """A gradient of strides 0 (from ``sum``), transposed, and one in the other format."""
    for layout in ("contiguous", "channels_last", "sliced"):
        for grad in (
            torch.ones((), device=device).expand(2, 3, 6, 5),
            tensor(2, 3, 6, 5, device=device, layout="transposed"),
            tensor(2, 3, 6, 5, device=device, layout="channels_last"),
        ):
            x = tensor(2, 3, 6, 5, device=device, layout=layout)
            (ours,) = _gradients(lambda x: OP(x, activation="silu"), [x], grad)
            (exact,) = _gradients(
                lambda x: instance_norm(x, activation="silu"), [x.double().cpu()], grad.double().cpu()
            )
            assert max_error(ours, exact) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_says_that_it_is_not_supported(device: str) -> None:
    """Also where a part of the loss does not need it: a gradient penalty must not vanish without a word."""
    x = tensor(1, 2, 4, 4, device=device).requires_grad_()
    result = OP(x, activation="silu")
    (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_instance_norm: double backward is not supported"):
        grad.sum().backward()
    y = OP(x, activation="silu")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_instance_norm: double backward is not supported"):
        (x.sum() + grad.square().sum()).backward()


# --- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_opcheck(layout: str, requires_grad: bool, device: str) -> None:
    """PyTorch's own checks: schema, autograd registration, fake, AOT dispatch, static and dynamic."""

    def leaf(t: Tensor) -> Tensor:
        return t.requires_grad_(requires_grad)

    x = leaf(tensor(2, 3, 6, 5, device=device, layout=layout))
    w, b = leaf(torch.rand(3, device=device)), leaf(torch.rand(3, device=device))
    wn, bn = leaf(torch.rand(2, 3, device=device)), leaf(torch.rand(2, 3, device=device))
    r = leaf(tensor(2, 3, 6, 5, device=device, layout="channels_last"))
    for args in ((x,), (x, w, b, 1e-5, "relu", 0.01, r), (x, wn, bn, 1e-5, "silu", 0.01, r)):
        for dynamic in (False, True):
            dispatch = "test_aot_dispatch_dynamic" if dynamic else "test_aot_dispatch_static"
            utils = ("test_schema", "test_autograd_registration", "test_faketensor", dispatch)
            torch.library.opcheck(OP.default, args, test_utils=utils)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_of_the_pair_underneath(layout: str, dtype: torch.dtype, device: str) -> None:
    x = tensor(2, 3, 6, 5, device=device, layout=layout, dtype=dtype)
    r = tensor(2, 3, 6, 5, device=device, dtype=dtype)
    grad = tensor(2, 3, 6, 5, device=device, dtype=dtype, layout="channels_last")
    for params in ("none", "both-C-input", "both-NC-float32"):
        if dtype == torch.float64 and params.endswith("float32"):
            params = "both-NC-input"
        w, b = _params(params, 2, 3, dtype, device)
        for activation, residual in (("none", None), ("relu", r), ("silu", r), ("tanh", None)):
            forward = (x, w, b, 1e-5, activation, 0.01, residual)
            torch.library.opcheck(FORWARD.default, forward)
            output, mean, rstd = FORWARD(*forward)
            kept = output if residual is not None else None
            saved = (residual, None) if activation == "silu" else (None, kept)
            torch.library.opcheck(BACKWARD.default, (grad, x, mean, rstd, w, b, activation, 0.01, *saved))


# --- errors ---------------------------------------------------------------------------------------


def _x(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes or (2, 3, 4, 5), dtype=dtype)


# arguments, message after "fused_instance_norm: "
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "rank 3": ((_x(3, 4, 5),), {}, "input must have shape [N, C, H, W], got [3, 4, 5]"),
    "rank 5": ((_x(1, 2, 3, 4, 5),), {}, "input must have shape [N, C, H, W], got [1, 2, 3, 4, 5]"),
    "integer": (
        (_x(dtype=torch.int32),),
        {},
        "input must be float32, float16, bfloat16 or float64, got int32",
    ),
    "complex": (
        (_x(dtype=torch.complex64),),
        {},
        "input must be float32, float16, bfloat16 or float64, got complex64",
    ),
    "bool": ((_x(dtype=torch.bool),), {}, "input must be float32, float16, bfloat16 or float64, got bool"),
    "activation": (
        (_x(),),
        {"activation": "gelu"},
        'activation must be one of none, relu, leaky_relu, silu, sigmoid, tanh, got "gelu"',
    ),
    "weight length": ((_x(), _x(4)), {}, "weight must have shape [3] or [2, 3], got [4]"),
    "weight batch": ((_x(), _x(1, 3)), {}, "weight must have shape [3] or [2, 3], got [1, 3]"),
    "weight rank": ((_x(), _x(1, 3, 1)), {}, "weight must have shape [3] or [2, 3], got [1, 3, 1]"),
    "weight scalar": ((_x(), torch.tensor(1.0)), {}, "weight must have shape [3] or [2, 3], got []"),
    "weight dtype": (
        (_x(dtype=torch.float16), _x(3, dtype=torch.bfloat16)),
        {},
        "weight must be float16 (the dtype of input) or float32, got bfloat16",
    ),
    "weight float64": (
        (_x(), _x(3, dtype=torch.float64)),
        {},
        "weight must be float32, got float64",
    ),
    "bias length": ((_x(), None, _x(5)), {}, "bias must have shape [3] or [2, 3], got [5]"),
    "bias dtype": (
        (_x(dtype=torch.float16), None, _x(3, dtype=torch.int64)),
        {},
        "bias must be float16 (the dtype of input) or float32, got int64",
    ),
    "weight and bias shapes": (
        (_x(), _x(3), _x(2, 3)),
        {},
        "weight and bias must have the same shape, got [3] and [2, 3]",
    ),
    "weight and bias dtypes": (
        (_x(dtype=torch.float16), _x(3, dtype=torch.float16), _x(3)),
        {},
        "weight and bias must have the same dtype, got float16 and float32",
    ),
    "residual shape": (
        (_x(),),
        {"residual": _x(2, 3, 4, 6)},
        "residual must have shape [2, 3, 4, 5], got [2, 3, 4, 6]",
    ),
    "residual broadcast": (
        (_x(),),
        {"residual": _x(1, 3, 4, 5)},
        "residual must have shape [2, 3, 4, 5], got [1, 3, 4, 5]",
    ),
    "residual rank": ((_x(),), {"residual": _x(3)}, "residual must have shape [2, 3, 4, 5], got [3]"),
    "residual dtype": (
        (_x(dtype=torch.float16),),
        {"residual": _x()},
        "residual must have the dtype of input, float16, got float32",
    ),
}


def _to(value: Any, device: str, grad: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device)
    return moved.requires_grad_() if grad and moved.dtype.is_floating_point else moved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["plain", "grad", "fake"])
@pytest.mark.parametrize("case", ERRORS)
def test_each_error_is_one_line_that_names_the_argument(case: str, way: str, device: str) -> None:
    args, kwargs, message = ERRORS[case]
    args = tuple(_to(a, device, way == "grad") for a in args)
    kwargs = {k: _to(v, device, way == "grad") for k, v in kwargs.items()}
    if way == "fake":
        mode = FakeTensorMode()
        args = tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        kwargs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with pytest.raises(RuntimeError) as caught:
        OP(*args, **kwargs)
    assert str(caught.value).splitlines()[0] == f"fused_instance_norm: {message}"


# what replaces the mean, message after "mean "
STATISTICS: dict[str, tuple[Tensor, str]] = {
    "too few": (torch.ones(0), "must have shape [2, 3], got [0]"),
    "transposed": (torch.ones(3, 2), "must have shape [2, 3], got [3, 2]"),
    "dtype": (torch.ones(2, 3, dtype=torch.float64), "must be float32, got float64"),
}


@pytest.mark.parametrize("argument", ["mean", "rstd"])
@pytest.mark.parametrize("case", STATISTICS)
def test_the_backward_reads_no_statistics_of_another_size(case: str, argument: str) -> None:
    given, message = STATISTICS[case]
    x, fits = _x(), torch.ones(2, 3)
    mean, rstd = (given, fits) if argument == "mean" else (fits, given)
    with pytest.raises(RuntimeError) as caught:
        BACKWARD(x, x, mean, rstd, None, None, "none", 0.01, None, None)
    assert str(caught.value).splitlines()[0] == f"_fused_instance_norm_backward: {argument} {message}"


@pytest.mark.parametrize("device", DEVICES)
def test_the_backward_takes_statistics_of_any_strides(device: str) -> None:
    x, grad = (tensor(2, 3, 6, 5, device=device) for _ in range(2))
    _, mean, rstd = FORWARD(x, None, None, 1e-5, "relu", 0.01, None)
    rest = (None, None, "relu", 0.01, None, None)
    expected = BACKWARD(grad, x, mean, rstd, *rest)
    found = BACKWARD(grad, x, mean.t().contiguous().t(), rstd.t().contiguous().t(), *rest)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("argument", ["weight", "bias", "residual"])
def test_a_meta_tensor_beside_a_real_one_is_refused(argument: str) -> None:
    given = torch.ones(2, 3, 4, 5) if argument == "residual" else torch.ones(3)
    with pytest.raises(RuntimeError, match=f"{argument} must be on the device of input, cpu, got"):
        OP(torch.ones(2, 3, 4, 5), **{argument: given.to("meta")})


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ["weight", "bias", "residual"])
@pytest.mark.parametrize("way", ["plain", "grad"])
def test_tensors_on_two_devices_are_refused(way: str, argument: str) -> None:
    given = torch.ones(2, 3, 4, 5) if argument == "residual" else torch.ones(3)
    x = torch.ones(2, 3, 4, 5, requires_grad=way == "grad")
    with pytest.raises(RuntimeError) as caught:
        OP(x.cuda(), **{argument: given})
    expected = f"fused_instance_norm: {argument} must be on the device of input, cuda:0, got cpu"
    assert str(caught.value).splitlines()[0] == expected
    with pytest.raises(RuntimeError) as caught:
        OP(x, **{argument: given.cuda()})
    expected = f"fused_instance_norm: {argument} must be on the device of input, cpu, got cuda:0"
    assert str(caught.value).splitlines()[0] == expected


@pytest.mark.cuda
def test_an_error_leaves_cuda_usable() -> None:
    x = torch.randn(2, 3, 4, 5, device="cuda")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            OP(x, torch.ones(4, device="cuda"))
    torch.testing.assert_close(OP(x), torch_instance_norm(x))
