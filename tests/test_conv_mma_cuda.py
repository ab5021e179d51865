"""The fused convolution that runs on every GPU since sm_80, ``mma`` and ``mma:3xtf32``, forced.

Every tile on all kinds of arithmetic, shapes, paddings and formats, against float64; graphs; what is not
finite.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _cuda import capture
from _reference import (
    conv_instance_norm,
    dense_strides,
    poison,
    rms_error,
    tensor,
    tf32,
    torch_conv_instance_norm,
)

pytestmark = pytest.mark.cuda
OP = torch.ops.styleforge.fused_conv_instance_norm_relu
PRECISIONS = ("ieee", "tf32")


def force(monkeypatch: pytest.MonkeyPatch, tile: str = "") -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this convolution is for sm_80 and newer")
    monkeypatch.setenv("STYLEFORGE_PATH", "mma")
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tile)


def weight_of(out_channels: int, in_channels: int, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Scaled so that the convolution's result has about the input's variance."""
    scale = (in_channels * kernel[0] * kernel[1]) ** -0.5
    return (torch.randn(out_channels, in_channels, *kernel) * scale).to(dtype).cuda()


def norm_params(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(sizes) * 0.5 + 1).to(dtype).cuda(), torch.randn(sizes).to(dtype).cuda()


# input channels, output channels, (H, W), kernel, stride, padding, upsample: whole and partial tiles, one and
# several chunks of channels, channels that vectors do not divide, kernels of even and of large sides, strides
# beyond two and in one direction, one tap with more and with fewer chunks than are on their way at a time,
# pictures
CASES = [
    (64, 64, (64, 64), (3, 3), (1, 1), (1, 1), 1),
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
    (64, 48, (37, 29), (4, 4), (2, 2), (1, 1), 1),
    (40, 64, (30, 41), (9, 9), (1, 1), (4, 4), 1),
    (32, 36, (40, 61), (3, 3), (1, 4), (1, 1), 1),
    (128, 130, (19, 23), (1, 2), (2, 1), (0, 1), 1),
    (64, 20, (9, 100), (1, 1), (1, 2), (0, 0), 1),
    (600, 40, (12, 20), (1, 1), (1, 1), (0, 0), 1),
]
# With STYLEFORGE_CONV_TUNE: as it is chosen, and every tile with some of the cases.
TILES = 7
TILED = [(case, "") for case in CASES] + [
    (case, f"tile={tile + 1}")
    for (i, case), tile in itertools.product(enumerate(CASES), range(TILES))
    if (i + tile) % 4 == 0
]


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
@pytest.mark.parametrize(("case", "tile"), TILED, ids=str)
def test_portable_convolution(
    case: Any, dtype: torch.dtype, precision: str, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of GPUs that have matrix units and no copy engine; it runs on every one since sm_80."""
    force(monkeypatch, tile)
    ci, co, size, kernel, stride, padding, upsample = case
    for batch, layout, padding_mode in (
        (1, "channels_last", "zeros"),
        (3, "contiguous", "reflect"),
        (2, "channels_last", "replicate"),
    ):
        x = tensor(batch, ci, *size, dtype=dtype, device="cuda", layout=layout, offset=0.3)
        w = weight_of(co, ci, kernel, dtype)
        if batch == 1:
            w = w.contiguous(memory_format=torch.channels_last)
        norm_weight, norm_bias = norm_params((batch, co) if batch > 1 else (co,), dtype)
        args = (x, w, None, norm_weight, norm_bias, stride, padding, padding_mode, upsample)
        reference = conv_instance_norm(*args)
        residual = torch.randn_like(reference).to(dtype) if batch > 1 else None
        reference = conv_instance_norm(*args, residual=residual)
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(*args, residual=residual)
        poison(reference.numel(), dtype, "cuda")
        result = OP(*args, residual=residual, precision=precision)
        # Pictures run float32 also where TF32 is allowed.
        ieee = dtype == torch.float32 and (precision == "ieee" or ci <= 3)
        if (kernel, stride) == ((7, 7), (3, 3)):  # no tile's halo fits: cuDNN's convolution, and it says so
            assert "aten_conv" in styleforge.last_path()
        else:
            assert styleforge.last_path().endswith("+mma:3xtf32" if ieee else "+mma")
        assert result.stride() == dense_strides(reference.shape, x)
        error, allowed = rms_error(result, reference), rms_error(yardstick, reference)
        # TF32 is allowed, not demanded: PyTorch may have computed in float32. Sums in another order: 1e-7.
        assert error <= max(1.2 * allowed + 1e-7, 5e-4 if precision == "tf32" else 0.0)
        again = OP(*args, residual=residual, precision=precision)
        assert torch.equal(result, again)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_portable_convolution_keeps_what_is_not_finite(
    value: float, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN of every payload: where fragments are split or cut they must not become numbers."""
    force(monkeypatch)
    x = tensor(2, 64, 20, 24, dtype=dtype, device="cuda", layout="channels_last")
    w = weight_of(34, 64, (3, 3), dtype)
    fine = OP(x, w, padding=[1, 1], precision=precision)
    bits = torch.int16 if dtype == torch.float16 else torch.int32
    x[1, 5, 7, 3] = value
    if value != value:
        x.view(bits)[1, 5, 7, 3] = torch.iinfo(bits).max  # the NaN that CUDA's own arithmetic makes
    result = OP(x, w, padding=[1, 1], precision=precision)
    assert styleforge.last_path().split("+")[1].startswith("mma")
    assert torch.equal(result[0], fine[0])
    assert result[1].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_portable_convolution_in_a_graph(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed over other inputs; weights and moments are the graph's own."""
    force(monkeypatch)
    x = tensor(2, 72, 33, 40, dtype=dtype, device="cuda", layout="channels_last")
    w = weight_of(40, 72, (3, 3), dtype)
    call = partial(OP, x, w, padding=[1, 1], padding_mode="reflect", precision=precision)
    graph, result = capture(call)
    for seed_of_input in range(3):
        torch.manual_seed(seed_of_input)
        x.copy_(torch.randn(x.shape))
        for _ in range(20):
            graph.replay()
        assert torch.equal(result, call())
