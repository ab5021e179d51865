"""The wide TF32 products under ``fused_ffn`` on sm_90: accuracy, epilogues, layouts, choice of path.

The yardstick is exact sums of operands rounded to nearest TF32 ones: cuBLAS takes float32 for small matrices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _gemm import SM90, assert_same_bits, assert_same_bits_beside_copies, ffn_parameters, random_matrix
from _reference import FFN_ACTIVATIONS, assert_as_accurate, ffn, ffn_activate, poison, torch_ffn

OP = torch.ops.styleforge.fused_ffn
FORWARD = torch.ops.styleforge._fused_ffn_forward
OWN, ATEN = "ffn:cuda:sm90:tf32", "ffn:cuda:aten_matmul"
MIXED = "ffn:cuda:sm90:tf32+aten_matmul"
WIDE = "wide=2"  # STYLEFORGE_GEMM_TUNE: these kernels wherever they can

pytestmark = SM90


@pytest.fixture(autouse=True)
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets the path and how products are cut."""

    def apply(path: str, tune: str = "") -> None:
        monkeypatch.setenv("STYLEFORGE_PATH", path)
        monkeypatch.setenv("STYLEFORGE_GEMM_TUNE", tune)

    return apply


def _nearest(x: Tensor) -> Tensor:
    """To the nearest TF32 number, in float64."""
    return (x.float().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _nearest(x) @ _nearest(weight).T
    return y if bias is None else y + bias.double()


def _rounded_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    y = _linear(ffn_activate(_linear(x, w1, b1), activation), w2, b2)
    return (y if residual is None else y + residual.double()).float()


def _check(*args: Any) -> None:
    """Over poisoned memory; what is kept for the backward as well."""
    x, w1, _, w2 = args[:4]
    rows = x.numel() // x.shape[-1]
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    result = OP(*args, "tf32")
    assert styleforge.last_path() == OWN
    assert_as_accurate(result, _rounded_ffn(*args), ffn(*args), factor=1.2)
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    again, product = FORWARD(*args, "tf32")
    assert styleforge.last_path() == OWN
    assert torch.equal(again, result)
    exact = x.double() @ w1.double().T
    assert_as_accurate(product, _linear(x, w1, None).float(), exact, factor=1.2)


# rows, embed, hidden, out
SIZES = {
    "one tile": (128, 64, 128, 128),
    "ragged": (197, 100, 332, 76),
    "one row": (1, 64, 128, 64),
    "few numbers": (70, 4, 8, 4),
    "right pieces beyond the end": (140, 72, 196, 200),
    "many tiles": (2200, 132, 524, 132),
    "long sums": (300, 256, 2056, 260),
}


@pytest.mark.parametrize("columns", [192, 256])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_epilogues(size: str, columns: int, force: Callable[[str, str], None]) -> None:
    force("sm90", f"{WIDE},columns={columns}")
    rows, embed, hidden, out = SIZES[size]
    for activation in FFN_ACTIVATIONS:
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out)
        for parameters in ((w1, b1, w2, b2), (w1, None, w2, None)):
            for residual in (None, r):
                _check(x, *parameters, activation, residual)


def test_products_that_fill_the_device(force: Callable[[str, str], None]) -> None:
    """Several tiles a block, so that warpgroups take turns; as accurate as PyTorch's TF32."""
    force("sm90", WIDE)
    for rows, embed, hidden, out in (
        (8192, 512, 2048, 512),
        (5000, 1028, 1540, 772),
        (2048, 4096, 1024, 2048),
    ):
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        args: tuple[Any, ...] = (x, *ffn_parameters(embed, hidden, out), "gelu", r)
        _check(*args)
        assert_as_accurate(OP(*args, "tf32"), torch_ffn(*args), ffn(*args), factor=1.2)


@pytest.mark.parametrize("narrow", [0, 1, 200])
@pytest.mark.parametrize("columns", [192, 256])
def test_the_last_tiles_cut_up(columns: int, narrow: int, force: Callable[[str, str], None]) -> None:
    """They take another way through shared memory than whole ones: in blocks that had some of these, or none.

    A block gets one piece at most, however many are asked for. With 1 none: blocks have several whole tiles,
    of sums so short that one warpgroup may be tiles ahead of the other.
    """
    force("sm90", f"{WIDE},columns={columns},narrow={narrow}")
    shapes = ((4096, 64, 5 * columns, columns), (4096, 64, 10 * columns, columns), (8192, 512, 2048, 512))
    for rows, embed, hidden, out in shapes:
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        args: tuple[Any, ...] = (x, *ffn_parameters(embed, hidden, out), "gelu", r)
        _check(*args)
        assert_same_bits_beside_copies(lambda args=args: OP(*args, "tf32"))


@pytest.mark.parametrize("part", range(4))
def test_random_shapes_and_cuts(part: int, force: Callable[[str, str], None]) -> None:
    draw = random.Random(part)
    for _ in range(25):
        rows, embed, out = draw.randint(1, 700), 4 * draw.randint(1, 240), 4 * draw.randint(1, 240)
        hidden = 4 * draw.randint(1, 400)
        cut = f"columns={draw.choice((192, 256))},narrow={draw.randint(1, 6)}"
        force("sm90", f"{WIDE},{cut},stages={draw.randint(1, 4)},band={draw.randint(1, 9)}")
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out)
        parameters = (w1, draw.choice((None, b1)), w2, draw.choice((None, b2)))
        _check(x, *parameters, draw.choice(FFN_ACTIVATIONS), draw.choice((None, r)))


@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_values_through_the_epilogue(activation: str, force: Callable[[str, str], None]) -> None:
    """Identity matrices give every TF32 number on exactly: the result is rounded correctly but for near-ties.

    The second product rounds by half a unit; GELU's own error is 0.094 of one, or 6e-9 left of -6.
    """
    force("sm90", WIDE)
    width = 64
    every = torch.arange(-(2**18), 2**18, device="cuda", dtype=torch.int64) * 2**13
    x = every.to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 1e4) & (x.abs() > 1e-30)]
    padded = torch.nn.functional.pad(x, (0, -x.numel() % width)).view(-1, width)
    eye = torch.eye(width, device="cuda")
    result = OP(padded, eye, None, eye, None, activation, None, "tf32").reshape(-1)[: x.numel()].double()
    assert styleforge.last_path() == OWN
    exact = ffn_activate(x.double(), activation)
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs().clamp(min=1e-30)).exponent - 11)
    error = (result - exact).abs()
    if activation == "gelu":
        error = torch.where(x < -6, (error - 6e-9).clamp(min=0), error)
    assert (error / unit).max() < (0.6 if activation == "gelu" else 0.54)


def test_nan_and_infinity_stay_where_they_belong(force: Callable[[str, str], None]) -> None:
    force("sm90", WIDE)
    x = random_matrix(200, 64)
    w1, b1, w2, b2 = ffn_parameters(64, 128, 64)
    x[3, 5], x[4, 6], x[199, 5] = math.inf, math.nan, -math.inf
    w2[7, 7] = -math.inf
    ours, theirs = OP(x, w1, b1, w2, b2, "relu", None, "tf32"), torch_ffn(x, w1, b1, w2, b2, "relu")
    assert styleforge.last_path() == OWN
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(ours), special(theirs))


# --- layouts, streams, repetition -----------------------------------------------------------------


def test_rows_biases_and_weights_of_any_strides(force: Callable[[str, str], None]) -> None:
    """What the copy engine takes is taken as it lies, biases and residuals from any address."""
    force("sm90", WIDE)
    w1, b1, w2, b2 = ffn_parameters(64, 96, 48)
    x, r = random_matrix(3, 50, 80)[..., :64], random_matrix(3, 50, 53)[..., 1:49]
    odd1, odd2 = torch.cat([b1[:1], b1])[1:], torch.cat([b2[:1], b2])[1:]
    wide1, wide2 = torch.cat([w1, w1], 1)[:, :64], torch.cat([w2, w2], 1)[:, :96]
    for args in ((x, w1, b1, w2, b2, "silu", r), (x, wide1, odd1, wide2, odd2, "gelu", r)):
        _check(*args)


def test_the_second_product_can_be_cublas(force: Callable[[str, str], None]) -> None:
    force("sm90", f"{WIDE},mix=2")
    x, r = random_matrix(3, 50, 64), random_matrix(3, 50, 48)
    w1, b1, w2, b2 = ffn_parameters(64, 96, 48)
    for bias, residual, path in ((b2, None, MIXED), (None, r, MIXED), (None, None, MIXED), (b2, r, ATEN)):
        args: tuple[Any, ...] = (x, w1, b1, w2, bias, "gelu", residual)
        poison(2 * 150 * 96, x.dtype, "cuda")
        result = OP(*args, "tf32")
        assert styleforge.last_path() == path
        assert_as_accurate(result, _rounded_ffn(*args), ffn(*args), factor=1.2, ulps=8192.0)


def test_the_same_bits_on_every_call_and_in_a_graph(force: Callable[[str, str], None]) -> None:
    force("sm90", WIDE)
    x, other = random_matrix(700, 256), random_matrix(700, 256)
    assert_same_bits(x, other, ffn_parameters(256, 1024, 256), "tf32")


def test_calls_that_follow_each_other_closely(force: Callable[[str, str], None]) -> None:
    """A kernel starts while the one before it drains: what it reads of that one must be there."""
    force("sm90", WIDE)
    parameters = ffn_parameters(128, 512, 128)
    a = b = random_matrix(512, 128)
    for _ in range(30):
        a = OP(a, *parameters, "relu", a, "tf32").clamp(-4, 4)
        torch.cuda.synchronize()
    for _ in range(30):
        b = OP(b, *parameters, "relu", b, "tf32").clamp(-4, 4)
    assert torch.equal(a, b)


def test_a_weight_changed_in_place_is_noticed(force: Callable[[str, str], None]) -> None:
    """Also by the second product, whose weight is loaded before the first one has ended."""
    force("sm90", WIDE)
    x, parameters = random_matrix(256, 128), ffn_parameters(128, 512, 128)
    for _ in range(10):
        for parameter in parameters:
            parameter.mul_(-1)
        _check(x, *parameters, "gelu", None)
