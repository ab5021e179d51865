"""Planes whose blocks get their part by one bulk copy: clusters of every size, even and ragged cuts."""

from __future__ import annotations

import itertools

import pytest
import torch

import styleforge
from _cuda import on_compute_9
from _reference import instance_norm, poison, rms_error, tensor

pytestmark = on_compute_9

FORWARD = torch.ops.styleforge._fused_instance_norm_forward.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("sizes", [(1, 3, 128, 128), (2, 5, 96, 104), (1, 2, 8, 1), (3, 2, 100, 62)], ids=str)
def test_however_a_plane_is_cut(
    sizes: tuple[int, ...], cluster: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "bulk")
    x = tensor(*sizes, dtype=dtype, device="cuda", offset=2.0)
    r = tensor(*sizes, dtype=dtype, device="cuda")
    weight, bias = torch.rand(sizes[:2], device="cuda") + 0.5, torch.randn(sizes[:2], device="cuda")
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    rstd = torch.rsqrt(variance + 1e-5)
    for activation, residual in (("relu", None), ("leaky_relu", r), ("silu", r)):
        reference = instance_norm(x, weight, bias, activation=activation, residual=residual)
        for threads, cache in ((32, 4), (96, 3), (256, 3)):
            monkeypatch.setenv(
                "STYLEFORGE_TUNE", f"cluster={cluster},threads={threads},cache={cache},prefetch=3"
            )
            poison(x.numel(), dtype, "cuda")
            first = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
            assert styleforge.last_path() == "instance_norm:cuda:plane:bulk"
            assert rms_error(first[0], reference) < 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(first[1], mean.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(first[2], rstd.float(), rtol=1e-5, atol=1e-6)
            for _ in range(3):
                again = FORWARD(x, weight, bias, 1e-5, activation, 0.01, residual)
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_launches_in_a_row_and_from_two_streams(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dependent launches: a call's blocks start, and prefetch, while those of the call before still write."""
    monkeypatch.setenv("STYLEFORGE_PATH", "bulk")
    x = tensor(4, 64, 256, 256, dtype=dtype, device="cuda", offset=2.0)
    call = torch.ops.styleforge.fused_instance_norm
    expected = call(x)
    assert styleforge.last_path() == "instance_norm:cuda:plane:bulk"
    assert rms_error(expected, instance_norm(x)) < 4 * torch.finfo(dtype).eps
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    chained = [x]
    results = []
    for _ in range(10):
        results.append(call(x))
        with torch.cuda.stream(other):
            results.append(call(x))
        chained.append(call(chained[-1]))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
    for before, after in itertools.pairwise(chained):
        assert torch.equal(after, call(before))
