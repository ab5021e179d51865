"""NCHW and channels_last on the GPU: the copy between them, and convolutions with both, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _reference import conv_instance_norm, dense_strides, poison, rms_error, tensor

pytestmark = pytest.mark.cuda

NORM = torch.ops.styleforge.fused_instance_norm
CONV = torch.ops.styleforge.fused_conv_instance_norm_relu
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Whole tiles and partial ones on either side; pieces of 16 bytes on both sides, on one, on none; many
# samples.
COPIED = [
    (1, 64, 64, 64),
    (2, 128, 32, 32),
    (1, 65, 9, 7),
    (3, 8, 17, 16),
    (2, 200, 5, 13),
    (1, 3, 40, 24),
    (5, 2, 1, 3),
    (1, 257, 3, 3),
    (2, 40, 31, 45),
    (300, 16, 4, 2),
]


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", COPIED, ids=str)
def test_the_copy_between_formats(sizes: tuple[int, ...], dtype: torch.dtype, misaligned: bool) -> None:
    """A residual of the other format than the input is copied; the norm of zeros is that residual."""
    values = tensor(*sizes, dtype=dtype, device="cuda")
    for to_channels_last in (False, True):
        source = values if to_channels_last else _channels_last(values)
        if misaligned:  # no address is a multiple of 16 bytes
            source = torch.cat((values.new_zeros(1), source.as_strided((source.numel(),), (1,))))[1:]
            strides = dense_strides(sizes, values if to_channels_last else _channels_last(values))
            source = source.as_strided(sizes, strides, 1)
            assert source.data_ptr() % 16 != 0
        zeros = torch.zeros(sizes, dtype=dtype, device="cuda")
        zeros = _channels_last(zeros) if to_channels_last else zeros
        poison(values.numel(), dtype, "cuda")
        result = NORM(zeros, residual=source)
        assert torch.equal(result, values + 0.0)  # -0.0 became 0.0 on the way
        assert result.stride() == dense_strides(sizes, zeros)


def test_the_copy_is_ours() -> None:
    x = tensor(2, 64, 48, 40, device="cuda", dtype=torch.float16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        NORM(x, residual=_channels_last(x))
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages()]
    if not kernels:
        pytest.skip("no CUPTI")
    assert any("transpose_kernel" in name for name in kernels), kernels


def test_very_large_batches() -> None:
    """More samples than a grid has planes: ATen's copy."""
    x = tensor(70_000, 2, 2, 2, device="cuda")
    assert torch.equal(NORM(torch.zeros_like(x), residual=_channels_last(x)), x + 0.0)


# input channels, output channels, (H, W), kernel, stride, upsample, STYLEFORGE_CONV_TUNE: rows that are whole
# 16-byte pieces and not, one tile a block and several, weights that are rewritten in one batch and in several
LAYERS = [
    (64, 64, (64, 64), 3, 1, 1, ""),
    (64, 64, (61, 50), 3, 1, 1, ""),
    (64, 64, (33, 40), 3, 1, 1, "columns=32,height=4"),
    (128, 128, (128, 128), 3, 1, 1, ""),
    (64, 128, (130, 121), 3, 2, 1, "columns=128,height=8"),
    (72, 72, (45, 72), 5, 1, 1, "tiles=2"),
    (64, 128, (90, 33), 3, 1, 1, "tiles=3,columns=64"),
    (256, 256, (32, 64), 1, 1, 1, "tiles=2,columns=64"),
    (200, 34, (17, 24), 3, 1, 1, ""),
    (128, 34, (17, 24), 3, 1, 1, "share=2,columns=32,height=4"),
    (128, 100, (33, 50), 3, 2, 1, "share=2,columns=64,height=8"),
    (64, 32, (40, 70), 3, 1, 2, ""),
    (3, 32, (70, 88), 9, 1, 1, ""),
]


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_both_formats_give_the_same_bits(
    case: Any, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused convolution is for sm_90")
    ci, co, size, kernel, stride, upsample, tune = case
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
    padding = (kernel // 2, kernel // 2)
    for (batch, activation), mode in itertools.product(
        ((1, "relu"), (2, "leaky_relu"), (2, "silu")), ("zeros", "reflect", "replicate")
    ):
        x = tensor(batch, ci, *size, dtype=dtype, device="cuda", offset=0.3)
        w = tensor(co, ci, kernel, kernel, dtype=dtype, device="cuda", scale=(ci * kernel * kernel) ** -0.5)
        scale, shift = torch.randn(batch, co, device="cuda"), torch.randn(batch, co, device="cuda")
        args = (scale, shift, (stride, stride), padding, mode, upsample, 1e-5, activation, 0.1)
        reference = conv_instance_norm(x, w, None, *args)
        r = torch.randn_like(reference).to(dtype) if batch > 1 else None
        reference = conv_instance_norm(x, w, None, *args, r)
        for forced in ("", "sm90:one_pass", "sm90:two_pass"):
            monkeypatch.setenv("STYLEFORGE_PATH", forced)
            poison(reference.numel(), dtype, "cuda")
            nchw = CONV(x, w, None, *args, r, precision)
            path = styleforge.last_path()
            assert "sm90" in path or (ci == 3 and not forced)  # pictures have a kernel of their own
            poison(reference.numel(), dtype, "cuda")
            nhwc = CONV(_channels_last(x), _channels_last(w), None, *args, r, precision)
            assert nchw.stride() == dense_strides(nchw.shape, x)
            assert nhwc.stride() == dense_strides(nhwc.shape, _channels_last(x))
            if path == styleforge.last_path():
                assert torch.equal(nchw, nhwc)
            elif not styleforge.last_path().endswith(":lean"):  # which is for channels_last alone
                # To NCHW, phases of an upsampling take two passes, and tiles of 128 channels unless forced.
                assert upsample == 2 or not forced
            limit = {torch.float16: 1e-3, torch.bfloat16: 6e-3}.get(
                dtype, 1e-3 if precision == "tf32" else 2e-6
            )
            assert rms_error(nchw, reference) < limit and rms_error(nhwc, reference) < limit
            assert torch.equal(nchw, CONV(x, w, None, *args, r, precision))


def test_the_whole_network_takes_no_other_copies() -> None:
    """A contiguous block: one launch brings input and weights into place, one does the rest."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused convolution is for sm_90")
    x, w = tensor(1, 64, 64, 64, device="cuda", dtype=torch.float16), torch.randn(64, 64, 3, 3, device="cuda")
    w = w.half()
    CONV(x, w, padding=(1, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        CONV(x, w, padding=(1, 1))
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if "kernel" in event.key]
    if not kernels:
        pytest.skip("no CUPTI")
    assert len(kernels) == 2 and any("conv_operands" in name for name in kernels), kernels
