"""channels_last tensors held by all multiprocessors together, in shared memory or in registers.

Forward and backward, however they are cut.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import styleforge
from _cuda import on_compute_9
from _reference import instance_norm, max_error, poison, rms_error, tensor

pytestmark = on_compute_9

FORWARD = torch.ops.styleforge._fused_instance_norm_forward.default
BACKWARD = torch.ops.styleforge._fused_instance_norm_backward.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Units of one block and of many, ragged shares, slices that are not full, more units than multiprocessors.
SIZES = [(1, 128, 40, 64), (3, 8, 5, 7), (2, 40, 1, 3), (5, 72, 9, 30), (1, 8, 2, 4), (150, 16, 12, 12)]
CUTS = ["", "lanes=1", "lanes=2,threads=128", "lanes=4,threads=256", "threads=64"]
PLACES = ["resident", "held"]
FROM_OUTPUT = ("relu", "leaky_relu", "sigmoid", "tanh")


def _held(cut: str, sizes: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a pixel has as many vectors as the cut asks for (rounded up to a power of two)."""
    vectors = sizes[1] * dtype.itemsize // 16
    wanted = int(cut.split(",")[0].removeprefix("lanes=")) if cut.startswith("lanes=") else 1
    return wanted < 2 * vectors


def _channels_last(*sizes: int, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    return tensor(*sizes, dtype=dtype, device="cuda", layout="channels_last", offset=offset)


def _parameters(channels: int, per_sample: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sizes = (per_sample, channels) if per_sample else (channels,)
    weight, bias = torch.rand(sizes, device="cuda") + 0.5, torch.randn(sizes, device="cuda")
    return weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward(
    sizes: tuple[int, ...], dtype: torch.dtype, cut: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", place)
    monkeypatch.setenv("STYLEFORGE_TUNE", cut)
    x, r = _channels_last(*sizes, dtype=dtype, offset=2.0), _channels_last(*sizes, dtype=dtype)
    weight, bias = _parameters(sizes[1], sizes[0], torch.float32)
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    rstd = torch.rsqrt(variance + 1e-5)
    for activation, residual in (("relu", None), ("none", r), ("silu", r)):
        reference = instance_norm(x, weight, bias, activation=activation, residual=residual)
        poison(x.numel(), dtype, "cuda")
        first = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
        held = styleforge.last_path() == f"instance_norm:cuda:{place}"
        assert held == _held(cut, sizes, dtype)
        assert rms_error(first[0], reference) < 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(first[1], mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first[2], rstd.float(), rtol=1e-5, atol=1e-6)
        for _ in range(3):
            again = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward(
    sizes: tuple[int, ...], dtype: torch.dtype, cut: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", place)
    monkeypatch.setenv("STYLEFORGE_TUNE", cut)
    x, grad = _channels_last(*sizes, dtype=dtype, offset=2.0), _channels_last(*sizes, dtype=dtype)
    r = _channels_last(*sizes, dtype=dtype)
    kinds = [("relu", False), ("relu", True), ("none", True), ("silu", True), ("leaky_relu", False)]
    for (activation, has_residual), per_sample in itertools.product(kinds, (0, sizes[0])):
        weight, bias = _parameters(sizes[1], per_sample, dtype if per_sample else torch.float32)
        residual = r if has_residual else None
        leaves = [t.double().requires_grad_() for t in (x, weight, bias, r)]
        given = leaves[3] if has_residual else None
        exact_output = instance_norm(
            leaves[0], leaves[1], leaves[2], activation=activation, negative_slope=0.2, residual=given
        )
        output, mean, rstd = FORWARD(x, weight, bias, 1e-5, activation, 0.2, residual)
        # A ReLU whose input is within rounding of zero goes the other way: not what is tested here.
        clear = (exact_output.abs() > 2 * torch.finfo(dtype).eps * 4) | (activation not in FROM_OUTPUT)
        exact_zero = exact_output == 0
        own = torch.where(clear | (exact_zero & (output == 0)), grad, torch.zeros_like(grad))
        own = own.contiguous(memory_format=torch.channels_last)
        wanted = leaves if has_residual else leaves[:3]
        exact = torch.autograd.grad(exact_output, wanted, own.double())
        from_output = activation in FROM_OUTPUT
        keeps_residual = residual if activation not in (*FROM_OUTPUT, "none") else None
        keeps_output = output if has_residual and from_output else None
        arguments = (own, x, mean, rstd, weight, bias, activation, 0.2, keeps_residual, keeps_output)
        poison(x.numel() * 3, dtype, "cuda")
        found = BACKWARD(*arguments)
        # What is no plain mask keeps to shared memory.
        own_place = place if activation in ("none", "relu") else "resident"
        held = styleforge.last_path() == f"instance_norm_backward:cuda:{own_place}"
        assert held == _held(cut, sizes, dtype)
        again = BACKWARD(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        results = list(found[:3])
        if has_residual:
            results.append(own if activation == "none" else found[3])
        monkeypatch.setenv("STYLEFORGE_PATH", "split")
        yardsticks = BACKWARD(*arguments)
        assert "split" in styleforge.last_path()
        monkeypatch.setenv("STYLEFORGE_PATH", place)
        for i, (result, reference) in enumerate(zip(results, exact, strict=True)):
            assert result.dtype == (x, weight, bias, r)[i].dtype and result.shape == reference.shape
            two_passes = rms_error(own if i == 3 and activation == "none" else yardsticks[i], reference)
            scale = reference.square().mean().sqrt().item()
            floor = 2 * torch.finfo(result.dtype).eps * scale + 4e-6 * (1.0 if i in (0, 3) else scale + 1.0)
            assert rms_error(result, reference) <= 1.2 * two_passes + floor


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_launches_in_a_row_and_from_two_streams(
    dtype: torch.dtype, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that wait for each other, of launches that overlap."""
    monkeypatch.setenv("STYLEFORGE_PATH", place)
    x = _channels_last(2, 64, 128, 128, dtype=dtype, offset=2.0)
    grad = _channels_last(2, 64, 128, 128, dtype=dtype)
    weight, bias = _parameters(64, 0, torch.float32)
    expected = FORWARD(x, weight, bias, 1e-5, "relu", 0.01, None)
    assert styleforge.last_path() == f"instance_norm:cuda:{place}"
    arguments = (grad, x, *expected[1:], weight, bias, "relu", 0.01, None, None)
    gradients = BACKWARD(*arguments)
    assert styleforge.last_path() == f"instance_norm_backward:cuda:{place}"
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(30):
        results.append((FORWARD(x, weight, bias, 1e-5, "relu", 0.01, None), expected))
        results.append((BACKWARD(*arguments), gradients))
        with torch.cuda.stream(other):
            results.append((FORWARD(x, weight, bias, 1e-5, "relu", 0.01, None), expected))
            results.append((BACKWARD(*arguments), gradients))
    torch.cuda.synchronize()
    for found, wanted in results:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Of which threads have four vectors, eight and sixteen.
LARGE = [(1, 128, 128, 128), (1, 64, 248, 250), (8, 64, 128, 128)]


@pytest.mark.parametrize("sizes", LARGE, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_full_registers(sizes: tuple[int, ...], activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of which every multiprocessor has as much as it can hold are chosen for it, and are right."""
    x, grad = (_channels_last(*sizes, dtype=torch.float16, offset=offset) for offset in (2.0, 0.5))
    weight, bias = _parameters(sizes[1], 0, torch.float32)
    reference = instance_norm(x, weight, bias, activation=activation)
    poison(x.numel(), torch.float16, "cuda")
    output, mean, rstd = FORWARD(x, weight, bias, 1e-5, activation, 0.01, None)
    assert styleforge.last_path() == "instance_norm:cuda:held"
    assert rms_error(output, reference) < 4 * torch.finfo(torch.float16).eps
    for saved in (None, output):
        arguments = (grad, x, mean, rstd, weight, bias, activation, 0.01, None, saved)
        poison(x.numel() * 3, torch.float16, "cuda")
        found = BACKWARD(*arguments)
        assert styleforge.last_path() == "instance_norm_backward:cuda:held"
        again = BACKWARD(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        monkeypatch.setenv("STYLEFORGE_PATH", "split")
        expected = BACKWARD(*arguments)
        monkeypatch.setenv("STYLEFORGE_PATH", "")
        for result, wanted in zip(found, expected, strict=True):
            if wanted.numel() == 0:
                continue
            scale = wanted.double().square().mean().sqrt().item()
            close = 1e-5 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
            assert rms_error(result, wanted.double()) <= close * scale
            assert max_error(result, wanted.double()) <= 40 * close * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_statistics_beside_an_outlier(
    place: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies: with the first of a thread's values, of a block, of the tensor."""
    monkeypatch.setenv("STYLEFORGE_PATH", place)
    for y, x in ((0, 0), (1, 3), (63, 63)):
        values = _channels_last(1, 64, 64, 64, dtype=dtype, offset=100.0)
        values[:, :, y, x] = 3e4
        variance, mean = torch.var_mean(values.double(), dim=(2, 3), correction=0)
        _, found_mean, found_rstd = FORWARD(values, None, None, 1e-5, "none", 0.01, None)
        assert styleforge.last_path() == f"instance_norm:cuda:{place}"
        torch.testing.assert_close(found_mean, mean.float(), rtol=2e-6, atol=0)
        torch.testing.assert_close(found_rstd, torch.rsqrt(variance + 1e-5).float(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 7, 9), (4099,), (2, 8, 16, 16), (0, 3)], ids=str)
def test_widen(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(sizes, device="cuda").to(dtype)
    tensors = [x]
    if len(sizes) == 4:
        tensors += [x.contiguous(memory_format=torch.channels_last), x[:, :, 1:], x.transpose(0, 1)]
    for tensor_ in tensors:
        found = torch.ops.styleforge._widen(tensor_)
        assert torch.equal(found, tensor_.float()) and found.stride() == torch.empty_like(tensor_).stride()
