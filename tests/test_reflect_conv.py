"""The last layer's convolution: kernel columns as output channels against reflection padding and conv2d."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import styleforge
from _cuda import capture
from _reference import dense_strides, poison, rms, rms_error, tf32
from styleforge.models import _reflect_conv
from styleforge.models._reflect_conv import reflect_conv2d, reflect_conv2d_by_columns

# Batch, input channels, output channels, H, W, kh, kw: odd sizes, the least ones the kernel fits, and others.
CASES = [
    (1, 32, 3, 24, 20, 9, 9),
    (2, 8, 3, 17, 31, 9, 9),
    (3, 4, 3, 9, 9, 9, 9),
    (2, 5, 1, 9, 40, 9, 9),
    (1, 1, 4, 12, 11, 5, 3),
    (4, 3, 2, 3, 7, 3, 7),
]


def arguments(
    batch: int,
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    kernel_height: int,
    kernel_width: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, in_channels, height, width, generator=generator, dtype=dtype)
    weight = torch.randn(
        out_channels, in_channels, kernel_height, kernel_width, generator=generator, dtype=dtype
    )
    bias = torch.randn(out_channels, generator=generator, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last), weight, bias


def padded_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = weight.shape[2] // 2, weight.shape[3] // 2
    return F.conv2d(F.pad(x, (columns, columns, rows, rows), mode="reflect"), weight, bias)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The input shapes that went through ``reflect_conv2d_by_columns``."""
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return reflect_conv2d_by_columns(x, weight, bias)

    monkeypatch.setattr(_reflect_conv, "reflect_conv2d_by_columns", spy)
    return seen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last_weight", [False, True])
def test_columns_match_padding_and_convolution(case: tuple[int, ...], channels_last_weight: bool) -> None:
    x, weight, bias = arguments(*case)
    if channels_last_weight:
        weight = weight.contiguous(memory_format=torch.channels_last)
    result = reflect_conv2d_by_columns(x, weight, bias)
    expected = padded_conv2d(x, weight, bias)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(reflect_conv2d_by_columns(x, weight, None), padded_conv2d(x, weight, None))


def test_float32_is_as_accurate_as_the_plain_convolution() -> None:
    x, weight, bias = arguments(2, 32, 3, 70, 66, 9, 9, torch.float32)
    reference = padded_conv2d(x.double(), weight.double(), bias.double())
    error = (reflect_conv2d_by_columns(x, weight, bias).double() - reference).norm()
    assert error <= 1.5 * (padded_conv2d(x, weight, bias).double() - reference).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_takes_the_columns(calls: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    x, weight, bias = arguments(2, 8, 3, 12, 16, 9, 9, dtype)
    with torch.no_grad():
        result = reflect_conv2d(x, weight.requires_grad_(), bias)
    assert calls == [(2, 8, 12, 16)]
    torch.testing.assert_close(result, padded_conv2d(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, w, b: (x.contiguous(), w, b), id="contiguous"),
        pytest.param(lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()), id="half"),
        pytest.param(lambda x, w, b: (x[:, :, :8], w, b), id="fewer rows than the kernel"),
        pytest.param(lambda x, w, b: (x, w.repeat(2, 1, 1, 1), b.repeat(2)), id="many outputs"),
        pytest.param(lambda x, w, b: (x, w.clone().requires_grad_(), b), id="gradient of the weight"),
        pytest.param(lambda x, w, b: (x.clone().requires_grad_(), w, b), id="gradient of the input"),
        pytest.param(lambda x, w, b: (x, w, b.clone().requires_grad_()), id="gradient of the bias"),
    ],
)
def test_other_calls_take_the_plain_convolution(
    calls: list[tuple[int, ...]], change: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    x, weight, bias = change(*arguments(2, 8, 3, 12, 16, 9, 9))
    result = reflect_conv2d(x, weight, bias)
    assert calls == []
    assert torch.equal(result, padded_conv2d(x, weight, bias))
    assert result.requires_grad == any(t.requires_grad for t in (x, weight, bias))


@pytest.mark.parametrize("size", [(0, 8, 12, 16), (2, 8, 12, 16)])
def test_script(size: tuple[int, ...]) -> None:
    x, weight, bias = arguments(size[0], size[1], 3, size[2], size[3], 9, 9)
    scripted = torch.jit.script(reflect_conv2d)
    result = scripted(x, weight, bias)
    assert result.shape == (size[0], 3, *size[2:])
    torch.testing.assert_close(result, padded_conv2d(x, weight, bias))


def test_compiled_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reflect_conv2d, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((12, 16), (21, 13), (8, 30)):
        x, weight, bias = arguments(2, 4, 3, height, width, 9, 9)
        torch.testing.assert_close(compiled(x, weight, bias), padded_conv2d(x, weight, bias))


def test_input_smaller_than_the_padding_is_refused() -> None:
    with pytest.raises(RuntimeError):
        reflect_conv2d(*arguments(1, 2, 3, 4, 16, 9, 9))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_operator_opcheck(device: str) -> None:
    x, weight, bias = (t.to(device) for t in arguments(2, 8, 3, 12, 16, 9, 9, torch.float32))
    op = torch.ops.styleforge._reflect_conv2d.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (x, weight, bias), test_utils=tests)
    torch.library.opcheck(op, (x.contiguous(), weight, None, "tf32"), test_utils=tests)
    for given in (x, x.contiguous(), x[:0], x[:0].contiguous()):  # also of one channel and of no sample
        result = op(given, weight[:1])
        assert result.stride() == dense_strides(result.shape, given)


# Of the GPU's kernels: several chunks of channels, a last one that is not whole, rows and columns of a kernel
# alone, strips and bands that end within a unit, strips of several turns, a last unit that all warps share.
ON_THE_GPU = [
    *CASES,
    (2, 64, 3, 131, 150, 9, 9),
    (1, 32, 4, 33, 257, 7, 7),
    (1, 32, 2, 40, 40, 3, 9),
    (1, 40, 1, 9, 100, 5, 1),
    (1, 72, 4, 20, 19, 1, 5),
    (3, 24, 2, 11, 300, 11, 15),
    (2, 64, 3, 20, 35, 3, 3),
    (2, 64, 3, 20, 26, 9, 9),
    (1, 32, 3, 150, 390, 9, 9),
]
KINDS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]


def expected_path(forced: str, case: tuple[int, ...], dtype: torch.dtype, precision: str) -> str:
    """How the path begins."""
    capability = torch.cuda.get_device_capability()
    vectors = case[1] * dtype.itemsize % 16 == 0
    # Others have less shared memory.
    takes = capability in ((8, 0), (9, 0), (10, 0)) and vectors and forced in ("", "columns")
    if takes and (capability != (9, 0) or dtype.itemsize == 4 or case[1] <= 32 or forced == "columns"):
        split = ":3xtf32" if (dtype, precision) == (torch.float32, "ieee") else ""
        return f"reflect_conv2d:cuda:columns+one_kernel{split}"
    if capability == (9, 0) and vectors and case[1] >= 32 and forced != "columns":
        return "reflect_conv2d:cuda:columns+"
    return "reflect_conv2d:cuda:"


@pytest.mark.cuda
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("case", ON_THE_GPU, ids=str)
def test_on_the_gpu(
    case: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, bias = (t.cuda().to(dtype) for t in arguments(*case))  # type: ignore[arg-type]
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    reference = padded_conv2d(x.double(), weight.double(), bias.double())
    with tf32(precision == "tf32"):
        yardstick = padded_conv2d(x, weight, bias)
    size = rms(reference)
    # TF32 is allowed, not demanded: PyTorch may have computed in float32.
    allowed = 1.5 * rms_error(yardstick, reference) / size + 1e-7
    allowed = max(allowed, 5e-4 if precision == "tf32" else 0.0)
    for forced, tune in (("", ""), ("columns", "strips=1"), ("sm90", "")):
        monkeypatch.setenv("STYLEFORGE_PATH", forced)
        monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
        poison(4 * x.numel(), dtype, "cuda")
        with torch.no_grad():
            result = reflect_conv2d(x, weight, bias, precision)
            assert styleforge.last_path().startswith(expected_path(forced, case, dtype, precision))
            assert torch.equal(result, reflect_conv2d(x, weight, bias, precision))
        assert result.dtype == dtype
        assert result.stride() == dense_strides(result.shape, x)
        assert rms_error(result, reference) / size <= allowed


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_as_far_as_the_kernel(
    value: float, dtype: torch.dtype, precision: str
) -> None:
    x, weight, bias = (t.cuda().to(dtype) for t in arguments(2, 24, 3, 60, 90, 9, 7))  # type: ignore[arg-type]
    with torch.no_grad():
        fine = reflect_conv2d(x, weight, bias, precision)
        for y, column in ((30, 40), (0, 89), (59, 33)):
            broken = x.clone()
            broken[1, 7, y, column] = value
            if value != value:  # of every payload: the matrix units would cut some to infinity
                broken.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[1, 7, y, column] = -1
            result = reflect_conv2d(broken, weight, bias, precision)
            reached = torch.zeros_like(fine, dtype=torch.bool)
            reached[1, :, max(y - 4, 0) : y + 5, max(column - 3, 0) : column + 4] = True
            assert torch.equal(result[~reached], fine[~reached])
            assert not result[reached].isfinite().any()


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
def test_in_a_graph(dtype: torch.dtype, precision: str) -> None:
    x, weight, bias = (t.cuda().to(dtype) for t in arguments(2, 32, 3, 70, 90, 9, 9))  # type: ignore[arg-type]
    with torch.no_grad():
        graph, result = capture(lambda: reflect_conv2d(x, weight, bias, precision))
        for scale in (1.0, -2.0):
            x.mul_(scale)
            weight.mul_(scale)
            graph.replay()
            assert torch.equal(result, reflect_conv2d(x, weight, bias, precision))
