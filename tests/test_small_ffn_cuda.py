"""Small float32 feed-forward networks in one launch (mma.sync, sm_90): accuracy, layouts, repetition."""

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
ONE = "one=2"  # STYLEFORGE_GEMM_TUNE: this kernel wherever it can

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
    x, w1, _, w2 = args[:4]
    rows = x.numel() // x.shape[-1]
    reference, yardstick = ffn(*args), torch_ffn(*args)
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    result = OP(*args)
    assert styleforge.last_path() == PATH
    assert_as_accurate(result, yardstick, reference, ulps=4.0)
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    again, hidden = FORWARD(*args, "ieee")
    assert styleforge.last_path() == PATH
    assert torch.equal(again, result)
    assert_as_accurate(hidden, x @ w1.T, x.double() @ w1.double().T, ulps=4.0)  # before its bias


# rows, embed, hidden, out
SIZES = {
    "one tile": (32, 128, 64, 128),
    "ragged": (197, 104, 328, 72),
    "one row": (1, 64, 128, 64),
    "few numbers": (70, 8, 16, 8),
    "several turns": (300, 128, 2056, 128),
    "the issue's": (256, 128, 512, 128),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_epilogues(size: str, force: Callable[..., None]) -> None:
    force()
    rows, embed, hidden, out = SIZES[size]
    for activation in FFN_ACTIVATIONS:
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out)
        for parameters in ((w1, b1, w2, b2), (w1, None, w2, None)):
            for residual in (None, r):
                _check(x, *parameters, activation, residual)


@pytest.mark.parametrize("part", range(6))
def test_random_shapes_and_cuts(part: int, force: Callable[..., None]) -> None:
    draw = random.Random(part)
    for _ in range(25):
        rows, hidden = draw.randint(1, 500), 4 * draw.randint(1, 150)
        embed, out = 4 * draw.randint(1, 32), 4 * draw.randint(1, 32)
        force(f"{ONE},parts={draw.choice((1, 2, 4, 8))}")
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out)
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


def test_nan_and_infinity_stay_where_they_belong(force: Callable[..., None]) -> None:
    """Also beyond the hidden width, which is no whole number of turns."""
    force()
    x = random_matrix(200, 64)
    w1, b1, w2, b2 = ffn_parameters(64, 136, 64)
    x[3, 5], x[4, 6], x[199, 5] = math.inf, math.nan, -math.inf
    x[5, 7] = 3.4028e38
    w2[7, 7] = -math.inf
    ours, theirs = OP(x, w1, b1, w2, b2, "relu"), torch_ffn(x, w1, b1, w2, b2, "relu")
    assert styleforge.last_path() == PATH
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(ours), special(theirs))


def test_rows_of_any_strides(force: Callable[..., None]) -> None:
    """Rows that are whole 16 bytes apart are taken as they lie; others go elsewhere, and say so."""
    force()
    w1, b1, w2, b2 = ffn_parameters(64, 96, 48)
    x, r = random_matrix(3, 50, 80)[..., :64], random_matrix(3, 50, 56)[..., :48]
    wide = torch.cat([w1, w1], 1)[:, :64]
    for first, second in ((w1, w2), (wide, torch.cat([w2, w2], 1)[:, :96])):
        _check(x, first, b1, second, b2, "silu", r)
    offset = torch.cat([w1.new_zeros(1), w1.flatten()])[1:].view(96, 64)
    for first, second in ((w1.T.contiguous().T, w2), (offset, w2)):
        OP(x, first, b1, second, b2, "silu", r)
        assert styleforge.last_path() != PATH


def test_the_same_bits_on_every_call_and_in_a_graph(force: Callable[..., None]) -> None:
    force()
    x, other = (random_matrix(256, 128) for _ in range(2))
    parameters = ffn_parameters(128, 512, 128)
    assert_same_bits(x, other, parameters)


def test_calls_that_follow_each_other_closely(force: Callable[..., None]) -> None:
    """A kernel starts while the one before it drains: what it reads of that one must be there."""
    force()
    parameters = ffn_parameters(128, 512, 128)
    a = b = random_matrix(256, 128)
    for _ in range(30):
        a = OP(a, *parameters, "relu")
        torch.cuda.synchronize()
    for _ in range(30):
        b = OP(b, *parameters, "relu")
    assert torch.equal(a, b)
    x = random_matrix(256, 128)
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
