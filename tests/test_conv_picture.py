"""The first layer's own kernel: convolutions of one to four channels, read where they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import styleforge
from _reference import (
    conv_instance_norm,
    dense_strides,
    poison,
    rms_error,
    tensor,
    tf32,
    torch_conv_instance_norm,
)

OP = torch.ops.styleforge.fused_conv_instance_norm_relu
DTYPES = [
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
]
# input channels, output channels, (H, W), kernel, stride, padding: whole and partial tiles of 16 pixels by
# 32 or 16 rows and of 32 channels, several tiles a block, pixels at odd and even numbers of halves
CASES = [
    (3, 32, (128, 96), (9, 9), (1, 1), (4, 4)),
    (3, 32, (531, 520), (9, 9), (1, 1), (4, 4)),
    (3, 64, (70, 90), (7, 7), (1, 1), (3, 3)),
    (3, 72, (45, 61), (7, 7), (2, 2), (3, 3)),
    (3, 8, (33, 17), (3, 3), (1, 1), (1, 1)),
    (1, 40, (50, 34), (5, 4), (1, 3), (2, 1)),
    (2, 16, (19, 100), (1, 1), (1, 1), (0, 0)),
    (4, 32, (40, 41), (3, 11), (2, 1), (1, 5)),
    (3, 32, (5, 6), (5, 5), (1, 1), (3, 4)),
]


@pytest.mark.cuda
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize(("dtype", "precision"), DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Any, dtype: torch.dtype, precision: str, padding_mode: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel is for sm_80 and newer")
    ci, co, size, kernel, stride, padding = case
    for batch, layout in ((1, "channels_last"), (3, "contiguous"), (2, "transposed")):
        x = 100 * torch.randn(batch, ci, *size, device="cuda", dtype=dtype)
        w = torch.randn(co, ci, *kernel, device="cuda", dtype=dtype)
        if layout == "channels_last":
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        elif layout == "transposed":
            x, w = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, w))
        norm_weight, norm_bias = (torch.randn(co, device="cuda", dtype=dtype) for _ in range(2))
        args = (x, w, None, norm_weight, norm_bias, stride, padding, padding_mode)
        reference = conv_instance_norm(*args)
        residual = torch.randn_like(reference).to(dtype) if batch == 3 else None
        reference = conv_instance_norm(*args, residual=residual)
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(*args, residual=residual)
        poison(reference.numel(), dtype, "cuda")
        result = OP(*args, residual=residual, precision=precision)
        name = "picture:3xtf32" if (dtype, precision) == (torch.float32, "ieee") else "picture"
        assert styleforge.last_path() == f"conv_instance_norm_relu:cuda+{name}"
        assert result.stride() == dense_strides(reference.shape, x)
        floor = {torch.float32: 3e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
        allowed = 1.2 * rms_error(yardstick, reference) + floor
        # TF32 is allowed, not demanded: PyTorch may have computed in float32.
        assert rms_error(result, reference) <= max(allowed, 5e-4 if precision == "tf32" else 0.0)
        assert torch.equal(result, OP(*args, residual=residual, precision=precision))


@pytest.mark.cuda
def test_what_is_not_finite_stays_where_it_is() -> None:
    """Numbers beside the kernel's row meet zeros as weights, and must not be read."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel is for sm_80 and newer")
    for dtype, precision in DTYPES:
        x = tensor(1, 3, 40, 64, dtype=dtype, device="cuda", layout="contiguous")
        w = torch.randn(8, 3, 3, 3, device="cuda", dtype=dtype)
        moved = torch.full((1, 3, 40, 66), float("nan"), device="cuda", dtype=dtype)
        moved[..., 1:-1] = x
        assert torch.equal(OP(moved[..., 1:-1], w, precision=precision), OP(x, w, precision=precision))
        x[0, 0, 20, 32] = float("inf")
        # As each channel's statistics.
        assert not OP(x, w, activation="none", precision=precision).isfinite().any()
