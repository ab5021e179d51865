"""Planes in their blocks' registers: clusters of every size, two of them to a plane, even and ragged cuts."""

from __future__ import annotations

import itertools

import pytest
import torch

import styleforge
from _cuda import on_compute_9
from _reference import conv_instance_norm, instance_norm, poison, rms_error, tensor

pytestmark = on_compute_9

FORWARD = torch.ops.styleforge._fused_instance_norm_forward.default
CONVOLUTION = torch.ops.styleforge.fused_conv_instance_norm_relu.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("sizes", [(1, 3, 128, 128), (2, 5, 96, 104), (1, 2, 8, 1), (3, 2, 100, 62)], ids=str)
def test_however_a_plane_is_cut(
    sizes: tuple[int, ...], cluster: int, copies: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "plane")
    x = tensor(*sizes, dtype=dtype, device="cuda", offset=2.0)
    r = tensor(*sizes, dtype=dtype, device="cuda")
    weight, bias = torch.rand(sizes[:2], device="cuda") + 0.5, torch.randn(sizes[:2], device="cuda")
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    rstd = torch.rsqrt(variance + 1e-5)
    for activation, residual in (("relu", None), ("leaky_relu", r), ("silu", r)):
        reference = instance_norm(x, weight, bias, activation=activation, residual=residual)
        for threads in (64, 96, 512):
            tune = f"cluster={cluster},copies={copies},threads={threads},registers=2"
            monkeypatch.setenv("STYLEFORGE_TUNE", tune)
            poison(x.numel(), dtype, "cuda")
            first = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
            kind = "cluster" if cluster > 1 else "block"
            assert styleforge.last_path() == f"instance_norm:cuda:plane:{kind}"
            assert rms_error(first[0], reference) < 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(first[1], mean.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(first[2], rstd.float(), rtol=1e-5, atol=1e-6)
            for _ in range(3):
                again = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [16, 32, 64])
def test_small_planes_of_a_block(side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads with one, two, four and eight vectors each, and too many threads."""
    x = tensor(3, 7, side, side, dtype=dtype, device="cuda", offset=2.0)
    weight, bias = torch.rand(7, device="cuda") + 0.5, torch.randn(7, device="cuda")
    reference = instance_norm(x, weight, bias, activation="relu")
    for threads in (None, 32, 64, 128, 256, 512):
        tune = "cluster=1,registers=2" + (f",threads={threads}" if threads else "")
        monkeypatch.setenv("STYLEFORGE_TUNE", tune)
        poison(x.numel(), dtype, "cuda")
        first = FORWARD(x, weight, bias, 1e-5, "relu", 0.01, None)
        assert styleforge.last_path() == "instance_norm:cuda:plane:block"
        assert rms_error(first[0], reference) < 4 * torch.finfo(dtype).eps
        assert torch.equal(FORWARD(x, weight, bias, 1e-5, "relu", 0.01, None)[0], first[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_launches_in_a_row_and_from_two_streams(dtype: torch.dtype) -> None:
    """Dependent launches: a call's blocks start while those of the call before still run."""
    x = tensor(1, 3, 512, 512, dtype=dtype, device="cuda", offset=2.0)
    expected = torch.ops.styleforge.fused_instance_norm(x)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(50):
        results.append(torch.ops.styleforge.fused_instance_norm(x))
        with torch.cuda.stream(other):
            results.append(torch.ops.styleforge.fused_instance_norm(x))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
    chained = [x]
    for _ in range(20):
        chained.append(torch.ops.styleforge.fused_instance_norm(chained[-1]))
    torch.cuda.synchronize()
    for before, after in itertools.pairwise(chained):
        assert torch.equal(torch.ops.styleforge.fused_instance_norm(before), after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("planes", "side"), [(1, 128), (3, 160)])
def test_in_place_beside_other_work(planes: int, side: int, dtype: torch.dtype) -> None:
    """A convolution's result is normalised where it lies, whenever a plane's blocks come to run."""
    x = tensor(1, 4, side, side, dtype=dtype, device="cuda")
    w = tensor(planes, 4, 5, 5, dtype=dtype, device="cuda")
    reference = conv_instance_norm(x, w, padding=(2, 2), upsample=2, activation="none")
    busy = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
    product, other = torch.empty_like(busy), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(200):
        with torch.cuda.stream(other):
            torch.mm(busy, busy, out=product)
        results.append(CONVOLUTION(x, w, padding=[2], upsample=2, activation="none"))
        assert styleforge.last_path().endswith("aten_conv+instance_norm:cuda:plane:cluster")
    torch.cuda.synchronize()
    for result in results:
        assert rms_error(result, reference) < 16 * torch.finfo(dtype).eps
        assert torch.equal(result, results[0])
