"""The 16-bit matrix products under ``fused_ffn`` on sm_90: accuracy, epilogues, layouts, choice of path."""

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
HALF = (torch.float16, torch.bfloat16)
LARGE, WHOLE = "ffn:cuda:sm90:16bit", "ffn:cuda:sm90:16bit:one_launch"
BACKWARD, ATEN_BACKWARD = "ffn_backward:cuda:sm90:16bit+aten_matmul", "ffn_backward:cuda:aten_matmul"
ATEN = "ffn:cuda:aten_matmul"
# STYLEFORGE_GEMM_TUNE: product by product on persistent blocks; all in one launch, by wgmma and by mma.sync.
KERNELS = {"large": "small=1", "whole": "small=2", "registers": "one=2"}
PATHS = {"large": LARGE, "whole": WHOLE, "registers": WHOLE}

pytestmark = SM90


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets the path and how products are cut."""

    def apply(path: str, kernel: str = "") -> None:
        monkeypatch.setenv("STYLEFORGE_PATH", path)
        monkeypatch.setenv("STYLEFORGE_GEMM_TUNE", KERNELS.get(kernel, kernel))

    return apply


def _check(path: str, *args: Any) -> None:
    """Against float64 and PyTorch, over poisoned memory; what is kept for the backward as well."""
    x, w1, b1, w2 = args[:4]
    rows = x.numel() // x.shape[-1]
    reference, yardstick = ffn(*args), torch_ffn(*args)
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    result = OP(*args)
    assert styleforge.last_path() == path
    assert_as_accurate(result, yardstick, reference, factor=1.2)
    poison(2 * rows * max(w1.shape[0], w2.shape[0]), x.dtype, "cuda")
    again, hidden = FORWARD(*args, "ieee")
    assert styleforge.last_path() == path
    assert torch.equal(again, result)
    wide = x.double() @ w1.double().T + (0 if b1 is None else b1.double())
    assert_as_accurate(hidden, torch.nn.functional.linear(x, w1, b1), wide, factor=1.2)


# rows, embed, hidden, out
SIZES = {
    "one tile": (128, 64, 128, 128),
    "ragged": (197, 104, 328, 72),
    "one row": (1, 64, 128, 64),
    "few numbers": (70, 8, 16, 8),
    "right pieces beyond the end": (140, 72, 192, 200),
    "many tiles": (1500, 136, 520, 136),
    "long sums": (300, 256, 2056, 256),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_epilogues(
    size: str, kernel: str, dtype: torch.dtype, force: Callable[[str, str], None]
) -> None:
    force("sm90", kernel)
    rows, embed, hidden, out = SIZES[size]
    for activation in FFN_ACTIVATIONS:
        x, r = random_matrix(rows, embed, dtype=dtype), random_matrix(rows, out, dtype=dtype)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out, dtype)
        for parameters in ((w1, b1, w2, b2), (w1, None, w2, None)):
            for residual in (None, r):
                _check(PATHS[kernel], x, *parameters, activation, residual)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_that_fill_the_device(dtype: torch.dtype, force: Callable[[str, str], None]) -> None:
    """Several tiles a block, so that warpgroups take turns."""
    force("sm90", "large")
    shapes = ((8192, 512, 2048, 512), (5000, 1032, 1544, 776), (2048, 4096, 1024, 2048))
    for rows, embed, hidden, out in shapes:
        x, r = random_matrix(rows, embed, dtype=dtype), random_matrix(rows, out, dtype=dtype)
        _check(LARGE, x, *ffn_parameters(embed, hidden, out, dtype), "gelu", r)


@pytest.mark.parametrize("narrow", [0, 1, 200])
@pytest.mark.parametrize("columns", [192, 256])
def test_the_last_tiles_cut_up(columns: int, narrow: int, force: Callable[[str, str], None]) -> None:
    """They take another way through shared memory than whole ones: in blocks that had some of these, or none.

    A block gets one piece at most, however many are asked for. With 1 none: blocks have several whole tiles,
    of sums so short that one warpgroup may be tiles ahead of the other.
    """
    force("sm90", f"{KERNELS['large']},columns={columns},narrow={narrow}")
    dtype = torch.bfloat16
    shapes = ((4096, 64, 5 * columns, columns), (4096, 64, 10 * columns, columns), (8192, 512, 2048, 512))
    for rows, embed, hidden, out in shapes:
        x, r = random_matrix(rows, embed, dtype=dtype), random_matrix(rows, out, dtype=dtype)
        args: tuple[Any, ...] = (x, *ffn_parameters(embed, hidden, out, dtype), "gelu", r)
        _check(LARGE, *args)
        assert_same_bits_beside_copies(lambda args=args: OP(*args))


@pytest.mark.parametrize("part", range(8))
def test_random_shapes_and_cuts(part: int, force: Callable[[str, str], None]) -> None:
    draw = random.Random(part)
    for _ in range(25):
        kernel = draw.choice(tuple(KERNELS))
        most = 120 if kernel == "large" else 32
        rows, embed, out = draw.randint(1, 700), 8 * draw.randint(1, most), 8 * draw.randint(1, most)
        hidden = 8 * draw.randint(1, 200)
        if kernel == "whole":
            cut = f"parts={draw.choice((1, 2, 4, 8))},stages={draw.randint(1, 6)}"
        elif kernel == "registers":
            cut = f"parts={draw.choice((1, 2, 4, 8))},units={draw.randint(1, 2)}"
        else:
            cut = f"columns={draw.choice((192, 256))},narrow={draw.randint(1, 6)}"
            cut += f",stages={draw.randint(1, 6)},band={draw.randint(1, 9)}"
        force("sm90", f"{KERNELS[kernel]},{cut}")
        dtype = draw.choice(HALF)
        x, r = random_matrix(rows, embed, dtype=dtype), random_matrix(rows, out, dtype=dtype)
        w1, b1, w2, b2 = ffn_parameters(embed, hidden, out, dtype)
        parameters = (w1, draw.choice((None, b1)), w2, draw.choice((None, b2)))
        _check(PATHS[kernel], x, *parameters, draw.choice(FFN_ACTIVATIONS), draw.choice((None, r)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_every_value_through_the_epilogue(
    activation: str, kernel: str, dtype: torch.dtype, force: Callable[[str, str], None]
) -> None:
    """Identity matrices give every value on exactly; the result is rounded correctly but for near-ties."""
    force("sm90", kernel)
    width = 64
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).cuda()
    x = every[every.isfinite() & (every.abs() < 1e4)]
    padded = torch.nn.functional.pad(x, (0, -x.numel() % width)).view(-1, width)
    eye = torch.eye(width, dtype=dtype, device="cuda")
    result = OP(padded, eye, None, eye, None, activation).reshape(-1)[: x.numel()].double()
    assert styleforge.last_path() == PATHS[kernel]
    exact = ffn_activate(x.double(), activation)
    least = 1e-30 if dtype == torch.bfloat16 else torch.finfo(dtype).tiny
    exponent = torch.frexp(exact.abs().clamp(min=least)).exponent - 1
    unit = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent)
    assert ((result - exact).abs() / unit).max() < 0.6


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_infinity_stay_where_they_belong(
    kernel: str, dtype: torch.dtype, force: Callable[[str, str], None]
) -> None:
    """Also beyond widths that are no whole number of turns."""
    force("sm90", kernel)
    x = random_matrix(200, 64, dtype=dtype)
    w1, b1, w2, b2 = ffn_parameters(64, 136, 64, dtype)
    x[3, 5], x[4, 6], x[199, 5] = math.inf, math.nan, -math.inf
    w2[7, 7] = -math.inf
    for second in (w2, w2.abs()):  # of one sign: infinite hidden numbers give infinity, not NaN
        ours, theirs = OP(x, w1, b1, second, b2, "relu"), torch_ffn(x, w1, b1, second, b2, "relu")
        assert styleforge.last_path() == PATHS[kernel]
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(special(ours), special(theirs))


# --- layouts, streams, repetition -----------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_and_weights_of_any_strides(kernel: str, force: Callable[[str, str], None]) -> None:
    """What the copy engine takes is taken as it lies; the rest goes to cuBLAS, and says so."""
    force("sm90", kernel)
    dtype = torch.bfloat16
    w1, b1, w2, b2 = ffn_parameters(64, 96, 48, dtype)
    x, r = random_matrix(3, 50, 80, dtype=dtype)[..., :64], random_matrix(3, 50, 52, dtype=dtype)[..., :48]
    offset = torch.cat([w1.new_zeros(1), w1.flatten()])[1:].view(96, 64)
    wide = torch.cat([w1, w1], 1)[:, :64]
    variants = [
        (w1, w2, PATHS[kernel]),
        (wide, torch.cat([w2, w2], 1)[:, :96], PATHS[kernel]),
        (w1.T.contiguous().T, w2.T.contiguous().T, ATEN),
        (offset, w2, ATEN),
        (w1, torch.stack([w2, w2], 2)[..., 0], ATEN),
    ]
    for first, second, path in variants:
        _check(path, x, first, b1, second, b2, "silu", r)
    _check(ATEN, x, *ffn_parameters(64, 100, 48, dtype), "gelu", r)  # a width that is no multiple of 8
    _check(ATEN, random_matrix(9, 60, dtype=dtype), *ffn_parameters(60, 96, 48, dtype), "gelu", None)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_on_every_call_and_in_a_graph(kernel: str, force: Callable[[str, str], None]) -> None:
    force("sm90", kernel)
    dtype = torch.float16
    x, other = (random_matrix(700, 256, dtype=dtype) for _ in range(2))
    parameters = ffn_parameters(256, 1024, 256, dtype)
    assert_same_bits(x, other, parameters)


@pytest.mark.parametrize("kernel", KERNELS)
def test_calls_that_follow_each_other_closely(kernel: str, force: Callable[[str, str], None]) -> None:
    """A kernel starts while the one before it drains: what it reads of that one must be there."""
    force("sm90", kernel)
    dtype = torch.bfloat16
    parameters = ffn_parameters(128, 512, 128, dtype)
    a = b = random_matrix(512, 128, dtype=dtype)
    for _ in range(30):
        a = OP(a, *parameters, "relu", a).clamp(-4, 4)
        torch.cuda.synchronize()
    for _ in range(30):
        b = OP(b, *parameters, "relu", b).clamp(-4, 4)
    assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_weight_changed_in_place_is_noticed(kernel: str, force: Callable[[str, str], None]) -> None:
    """Also by the second product, whose weight is loaded before the first one has ended."""
    force("sm90", kernel)
    dtype = torch.bfloat16
    x, parameters = random_matrix(256, 128, dtype=dtype), ffn_parameters(128, 512, 128, dtype)
    for _ in range(10):
        for parameter in parameters:
            parameter.mul_(-1)
        _check(PATHS[kernel], x, *parameters, "gelu", None)


# --- gradients ------------------------------------------------------------------------------------


def _gradients(
    function: Callable[..., Tensor],
    given: list[Tensor],
    upstream: Tensor,
    activation: str,
    dtype: torch.dtype,
    wanted: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_(i in wanted) for i, t in enumerate(given)]
    y = function(*leaves, activation, None)
    return list(torch.autograd.grad(y, [leaves[i] for i in wanted], upstream.to(dtype)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
@pytest.mark.parametrize(
    "size", [(1, 64, 128, 64), (197, 104, 328, 72), (1500, 136, 520, 136), (4200, 72, 1288, 64)], ids=str
)
def test_gradients(
    size: tuple[int, ...], activation: str, dtype: torch.dtype, force: Callable[[str, str], None]
) -> None:
    force("sm90", "")
    rows, embed, hidden, out = size
    given = [random_matrix(rows, embed, dtype=dtype), *ffn_parameters(embed, hidden, out, dtype)]
    upstream = random_matrix(rows, out, dtype=dtype)
    poison(2 * rows * hidden, dtype, "cuda")
    ours = _gradients(OP, given, upstream, activation, dtype)
    assert styleforge.last_path() == BACKWARD
    theirs = _gradients(torch_ffn, given, upstream, activation, dtype)
    exact = _gradients(ffn, given, upstream, activation, torch.float64)
    for result, yardstick, reference in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(result, yardstick, reference, factor=1.2)
    for wanted in ((0,), (1,), (2,), (3,), (4,), (0, 2), (2, 3)):
        some = _gradients(OP, given, upstream, activation, dtype, wanted)
        for result, index in zip(some, wanted, strict=True):
            assert_as_accurate(result, theirs[index], exact[index], factor=1.2)


def test_gradients_where_the_kernel_does_not_fit(force: Callable[[str, str], None]) -> None:
    force("sm90", "")
    for sizes in ((50, 60, 100, 36), (50, 64, 128, 36)):
        rows, embed, hidden, out = sizes
        given = [
            random_matrix(rows, embed, dtype=torch.float16),
            *ffn_parameters(embed, hidden, out, torch.float16),
        ]
        upstream = random_matrix(rows, out, dtype=torch.float16)
        ours = _gradients(OP, given, upstream, "gelu", torch.float16)
        assert styleforge.last_path() == ATEN_BACKWARD
        theirs = _gradients(torch_ffn, given, upstream, "gelu", torch.float16)
        exact = _gradients(ffn, given, upstream, "gelu", torch.float64)
        for result, yardstick, reference in zip(ours, theirs, exact, strict=True):
            assert_as_accurate(result, yardstick, reference, factor=1.2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_infinite_weight_beside_rows_that_are_not_there(
    dtype: torch.dtype, force: Callable[[str, str], None]
) -> None:
    """Its products with the zeros beyond the last row are no part of a bias's gradient."""
    force("sm90", "")
    given = [random_matrix(197, 104, dtype=dtype), *ffn_parameters(104, 328, 72, dtype)]
    given[2] += 6  # where gelu's slope is positive
    given[3][3, 5] = math.inf
    upstream = random_matrix(197, 72, dtype=dtype).abs()
    ours = _gradients(OP, given, upstream, "gelu", dtype)
    assert styleforge.last_path() == BACKWARD
    theirs = _gradients(torch_ffn, given, upstream, "gelu", dtype)
    assert theirs[2].isposinf().sum() == 1
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(ours[2]), special(theirs[2]))


def test_gradients_have_the_same_bits(force: Callable[[str, str], None]) -> None:
    force("sm90", "")
    given = [random_matrix(1000, 256, dtype=torch.bfloat16), *ffn_parameters(256, 1024, 256, torch.bfloat16)]
    upstream = random_matrix(1000, 256, dtype=torch.bfloat16)
    first = _gradients(OP, given, upstream, "gelu", torch.bfloat16)
    for _ in range(3):
        poison(2 * 1000 * 1024, torch.bfloat16, "cuda")
        again = _gradients(OP, given, upstream, "gelu", torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# --- which path -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("rows", "embed", "hidden", "path"),
    [
        (8192, 512, 2048, LARGE),
        (8192, 1024, 4096, LARGE),
        (2048, 4096, 11008, LARGE),  # its last round in narrow tiles
        (8192, 128, 512, ATEN),  # blocks without work
        (256, 128, 512, WHOLE),
        (197, 192, 768, WHOLE),
        (256, 512, 2048, ATEN),  # too wide for one launch, too little for all multiprocessors
        (8192, 516, 2048, ATEN),  # rows that the copy engine does not take
        (256, 128, 516, ATEN),
    ],
)
def test_the_path_follows_from_the_call(
    rows: int, embed: int, hidden: int, path: str, dtype: torch.dtype
) -> None:
    OP(random_matrix(rows, embed, dtype=dtype), *ffn_parameters(embed, hidden, embed, dtype))
    assert styleforge.last_path() == path


def test_a_path_can_be_forced(force: Callable[[str, str], None]) -> None:
    dtype = torch.bfloat16
    x, parameters = random_matrix(256, 128, dtype=dtype), ffn_parameters(128, 512, 128, dtype)
    for path, kernel, expected in (
        ("", "", WHOLE),
        ("sm90", "large", LARGE),
        ("sm90", "whole", WHOLE),
        ("aten", "", ATEN),
    ):
        force(path, kernel)
        OP(x, *parameters)
        assert styleforge.last_path() == expected
