"""Small feed-forward networks in one launch (sm_90): accuracy, cuts, layouts, repetition, choice.

What 16-bit ones have in common with larger products: test_gemm_half_cuda.py.
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
from _gemm import SM90, assert_same_bits, ffn_parameters, random_matrix
from _reference import FFN_ACTIVATIONS, assert_as_accurate, ffn, poison, torch_ffn

OP = torch.ops.styleforge.fused_ffn
FORWARD = torch.ops.styleforge._fused_ffn_forward
PATH = "ffn:cuda:sm90:3xtf32:one_launch"
PATHS = {
    torch.float32: PATH,
    torch.float16: "ffn:cuda:sm90:16bit:one_launch",
    torch.bfloat16: "ffn:cuda:sm90:16bit:one_launch",
}
DTYPES = pytest.mark.parametrize("dtype", PATHS, ids=str)
ONE = "one=2"  # STYLEFORGE_GEMM_TUNE: this kernel wherever it can
ROWS = (16, 24, 32)  # of a block, float32

pytestmark = SM90


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets how the kernel is cut."""

    def apply(tune: str = ONE) -> None:
        monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
        monkeypatch.setenv("STYLEFORGE_GEMM_TUNE", tune)

    return apply


def _check(*args: Any) -> None:
    """Against float64 and PyTorch, over poisoned memory; what is kept for the backward as well."""
    x, w1, b1, w2 = args[:4]
    rows = x.numel() // x.shape[-1]
    reference, yardstick = ffn(*args), torch_ffn(*args)
    accuracy: dict[str, float] = {"ulps": 4.0} if x.dtype == torch.float32 else {"factor": 1.2}
    if x.dtype == torch.float32:
        b1 = None  # what is kept is before its bias
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    result = OP(*args)
    assert styleforge.last_path() == PATHS[x.dtype]
    assert_as_accurate(result, yardstick, reference, **accuracy)
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    again, hidden = FORWARD(*args, "ieee")
    assert styleforge.last_path() == PATHS[x.dtype]
    assert torch.equal(again, result)
    wide = x.double() @ w1.double().T + (0 if b1 is None else b1.double())
    assert_as_accurate(hidden, torch.nn.functional.linear(x, w1, b1), wide, **accuracy)


# rows, embed, hidden, out
SIZES = {
    "one tile": (32, 128, 64, 128),
    "ragged": (197, 104, 328, 72),
    "one row": (1, 64, 128, 64),
    "few numbers": (70, 8, 16, 8),
    "several turns": (300, 128, 2056, 128),
    "the issue's": (256, 128, 512, 128),
}


# Of 16-bit numbers only.
WIDE = {"wide": (70, 256, 200, 136), "wide results": (130, 72, 320, 256)}


@DTYPES
@pytest.mark.parametrize("size", [*SIZES, *WIDE])
def test_sizes_and_epilogues(size: str, dtype: torch.dtype, force: Callable[..., None]) -> None:
    if size in WIDE and dtype == torch.float32:
        pytest.skip("wider than the float32 kernel")
    force()
    rows, embed, hidden, out = {**SIZES, **WIDE}[size]
    for activation in FFN_ACTIVATIONS:
        x, r = random_matrix(rows, embed, dtype=dtype), random_matrix(rows, out, dtype=dtype)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out, dtype)
        for parameters in ((w1, b1, w2, b2), (w1, None, w2, None)):
            for residual in (None, r):
                _check(x, *parameters, activation, residual)


@DTYPES
@pytest.mark.parametrize("part", range(4))
def test_random_shapes_and_cuts(part: int, dtype: torch.dtype, force: Callable[..., None]) -> None:
    draw = random.Random(part)
    line, widest = (4, 128) if dtype == torch.float32 else (8, 256)
    for _ in range(25):
        rows, hidden = draw.randint(1, 500), line * draw.randint(1, 600 // line)
        embed, out = (line * draw.randint(1, widest // line) for _ in range(2))
        cut = f"units={draw.randint(1, 2)}" if dtype != torch.float32 else f"rows={draw.choice(ROWS)}"
        force(f"{ONE},parts={draw.choice((1, 2, 4, 8))},{cut}")
        x, r = random_matrix(rows, embed, dtype=dtype), random_matrix(rows, out, dtype=dtype)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out, dtype)
        parameters = (w1, draw.choice((None, b1)), w2, draw.choice((None, b2)))
        _check(x, *parameters, draw.choice(FFN_ACTIVATIONS), draw.choice((None, r)))


@pytest.mark.parametrize("kind", ["normal", "uniform", "lognormal", "cancelling"])
def test_float32_products_are_as_accurate_as_sgemm(kind: str, force: Callable[..., None]) -> None:
    """Errors measured by what was added up, sum of |a| |b|; within a tenth, as cuBLAS may cut up k."""
    force()
    ours = theirs = 0.0
    for _ in range(4):
        a = torch.randn(256, 128, device="cuda", dtype=torch.float64)
        b = torch.randn(512, 128, device="cuda", dtype=torch.float64)
        if kind == "uniform":
            a, b = a.uniform_(), b.uniform_()
        elif kind == "lognormal":
            a, b = ((4 * torch.randn_like(t)).exp() * t.sign() for t in (a, b))
        elif kind == "cancelling":
            a[:, 64:], b[:, 64:] = a[:, :64], 1e-4 * b[:, 64:] - b[:, :64]
        a, b = a.float(), b.float()
        exact, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
        product = FORWARD(a, b, None, b[:4, :1].expand(4, 512).contiguous(), None, "relu", None, "ieee")[1]
        assert styleforge.last_path() == PATH
        ours += ((product.double() - exact) / size).pow(2).mean().item()
        theirs += (((a @ b.T).double() - exact) / size).pow(2).mean().item()
    assert ours <= 1.1**2 * theirs, f"{math.sqrt(ours / 4):.3g} against SGEMM's {math.sqrt(theirs / 4):.3g}"


@pytest.mark.parametrize("rows", ROWS)
def test_gelu_of_the_float32_kernel_over_its_range(rows: int, force: Callable[..., None]) -> None:
    """As gelu.cuh's, but for what is smaller than normal numbers squared.

    Identity matrices give on what has few digits exactly, and of an activation all but 2^-23.
    """
    force(f"{ONE},rows={rows}")
    eye = torch.eye(64, device="cuda")
    x = (torch.linspace(-11, 16, 100 * 64 * 64, device="cuda") * 2**12).round().view(-1, 64) / 2**12
    result = OP(x, eye, None, eye, None).double()
    assert styleforge.last_path() == PATH
    exact = torch.nn.functional.gelu(x.double())
    left = x < 0  # where erf's formula has lost its digits
    exact[left] = x[left].double() * torch.special.erfc(x[left].double().abs() / math.sqrt(2)) / 2
    error = (result - exact).abs()
    assert (error <= 2**-24 * (x.double().abs() + 3 * exact.abs())).all()
    units = error / torch.ldexp(
        torch.full_like(exact, 2**-23), torch.frexp(exact.abs().clamp(min=1e-30)).exponent - 1
    )
    assert units[~left].max() < 4 and units[left].max() < 12 and units.square().mean().sqrt() < 1.2


@DTYPES
def test_nan_and_infinity_stay_where_they_belong(dtype: torch.dtype, force: Callable[..., None]) -> None:
    """Also beyond widths that are no whole number of turns."""
    force()
    x = random_matrix(200, 40, dtype=dtype)
    w1, b1, w2, b2 = ffn_parameters(40, 136, 64, dtype)
    x[3, 5], x[4, 6], x[199, 5] = math.inf, math.nan, -math.inf
    if dtype == torch.float32:
        x[5, 7] = 3.4028e38
    w2[7, 7] = -math.inf
    for second in (w2, w2.abs()):  # of one sign: infinite hidden numbers give infinity, not NaN
        ours, theirs = OP(x, w1, b1, second, b2, "relu"), torch_ffn(x, w1, b1, second, b2, "relu")
        assert styleforge.last_path() == PATHS[dtype]
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(special(ours), special(theirs))


@DTYPES
def test_rows_of_any_strides(dtype: torch.dtype, force: Callable[..., None]) -> None:
    """Rows that are whole 16 bytes apart are taken as they lie; others go elsewhere, and say so."""
    force()
    w1, b1, w2, b2 = ffn_parameters(64, 96, 48, dtype)
    x = random_matrix(3, 50, 80, dtype=dtype)[..., :64]
    r = random_matrix(3, 50, 56, dtype=dtype)[..., :48]
    wide = torch.cat([w1, w1], 1)[:, :64]
    for first, second in ((w1, w2), (wide, torch.cat([w2, w2], 1)[:, :96])):
        _check(x, first, b1, second, b2, "silu", r)
    offset = torch.cat([w1.new_zeros(1), w1.flatten()])[1:].view(96, 64)
    for first, second in ((w1.T.contiguous().T, w2), (offset, w2)):
        OP(x, first, b1, second, b2, "silu", r)
        assert styleforge.last_path() != PATHS[dtype]


@DTYPES
@pytest.mark.parametrize("cut", ["", ",parts=4,units=2,rows=32"])
def test_the_same_bits_on_every_call_and_in_a_graph(
    cut: str, dtype: torch.dtype, force: Callable[..., None]
) -> None:
    force(ONE + cut)
    x, other = (random_matrix(256, 128, dtype=dtype) for _ in range(2))
    assert_same_bits(x, other, ffn_parameters(128, 512, 128, dtype))


@DTYPES
def test_calls_that_follow_each_other_closely(dtype: torch.dtype, force: Callable[..., None]) -> None:
    """A kernel starts while the one before it drains: what it reads of that one must be there."""
    force()
    parameters = ffn_parameters(128, 512, 128, dtype)
    a = b = random_matrix(256, 128, dtype=dtype)
    for _ in range(30):
        a = OP(a, *parameters, "relu")
        torch.cuda.synchronize()
    for _ in range(30):
        b = OP(b, *parameters, "relu")
    assert torch.equal(a, b)
    x = random_matrix(256, 128, dtype=dtype)
    for _ in range(6):  # weights that change in place are noticed
        for parameter in parameters:
            parameter.mul_(-1)
        _check(x, *parameters, "gelu", None)


def test_gradients_of_what_the_kernel_kept(force: Callable[..., None]) -> None:
    force()
    given = [random_matrix(197, 104), *ffn_parameters(104, 328, 72)]
    upstream = random_matrix(197, 72)

    def gradients(function: Callable[..., Tensor], wanted: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wanted).requires_grad_() for t in given]
        y = function(*leaves, "gelu", None)
        return list(torch.autograd.grad(y, leaves, upstream.to(wanted)))

    ours, theirs, exact = (
        gradients(OP, torch.float32),
        gradients(torch_ffn, torch.float32),
        gradients(ffn, torch.float64),
    )
    for result, yardstick, reference in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(result, yardstick, reference, factor=1.2)


def test_it_is_the_choice_for_small_networks() -> None:
    OP(random_matrix(256, 128), *ffn_parameters(128, 512, 128))
    assert styleforge.last_path() == PATH
