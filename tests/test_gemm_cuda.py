"""The float32 matrix products under ``fused_ffn`` on sm_90: accuracy against cuBLAS, shapes, choice of path.

The product alone is what ``_fused_ffn_forward`` keeps for the backward: the first one, before its bias.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import styleforge
from _gemm import SM90, assert_same_bits, ffn_parameters, random_matrix
from _reference import FFN_ACTIVATIONS, assert_as_accurate, ffn, poison, torch_ffn
from styleforge.bench.timing import peak_memory

OP = torch.ops.styleforge.fused_ffn
FORWARD = torch.ops.styleforge._fused_ffn_forward
OWN = {"ieee": "ffn:cuda:sm90:3xtf32", "tf32": "ffn:cuda:sm90:tf32"}
ATEN = "ffn:cuda:aten_matmul"
# STYLEFORGE_GEMM_TUNE: tiles of 64 rows with k cut up in a cluster, and persistent blocks of 128, also with
# weights prepared in pieces.
KERNELS = {
    "small 64": "small=2,columns=64",
    "small 32": "small=2,columns=32",
    "large": "small=1",
    "pieces": "small=1,memory=16,depth=64,room=4",
}

pytestmark = SM90


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets the path and how products are cut."""

    def apply(path: str, kernel: str = "") -> None:
        monkeypatch.setenv("STYLEFORGE_PATH", path)
        monkeypatch.setenv("STYLEFORGE_GEMM_TUNE", KERNELS.get(kernel, kernel))

    return apply


def _product(a: Tensor, b: Tensor, precision: str = "ieee") -> Tensor:
    """a b^T by our kernels, over poisoned memory."""
    poison(a.shape[0] * b.shape[0], a.dtype, "cuda")
    product: Tensor = FORWARD(a, b, None, b[:4, :1].expand(4, b.shape[0]), None, "relu", None, precision)[1]
    assert styleforge.last_path() == OWN[precision]
    return product


# --- accuracy -------------------------------------------------------------------------------------


def _inputs(kind: str, m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.float64)

    def lognormal(*sizes: int) -> Tensor:
        return (4 * normal(*sizes)).exp() * normal(*sizes).sign()

    if kind == "normal":
        a, b = normal(m, k), normal(n, k)
    elif kind == "uniform":
        a, b = normal(m, k).uniform_(), normal(n, k).uniform_()
    elif kind == "lognormal":
        a, b = lognormal(m, k), lognormal(n, k)
    else:  # the second half of every sum takes back all but 1e-4 of the first
        x, y = normal(m, k // 2), normal(n, k // 2)
        a, b = torch.cat([x, x], 1), torch.cat([y, -y + 1e-4 * normal(n, k // 2)], 1)
    return a.float(), b.float()


@pytest.mark.parametrize("k", [64, 128, 512, 1024, 4096, 16384])
@pytest.mark.parametrize("kind", ["normal", "uniform", "lognormal", "cancelling"])
def test_the_product_is_as_accurate_as_sgemm(kind: str, k: int, force: Callable[[str, str], None]) -> None:
    """Each error measured by what was added up there, sum of |a| |b|: sums of a few huge terms count no more.

    On so many rows and columns that cuBLAS adds up k in one go, as it does where the path is taken by itself.
    """
    force("sm90", "large")
    a, b = _inputs(kind, 2048, 2048, k)
    exact = a.double() @ b.double().T
    size = a.double().abs() @ b.double().abs().T

    def error(result: Tensor) -> float:
        return ((result.double() - exact) / size).pow(2).mean().sqrt().item()

    ours, theirs = error(_product(a, b)), error(a @ b.T)
    limit = 1.2 if k == 64 else 1.0
    assert ours <= limit * theirs, f"{ours:.3g} against SGEMM's {theirs:.3g}"


@pytest.mark.parametrize("k", [64, 128, 512, 1024, 2048])
@pytest.mark.parametrize("kind", ["normal", "uniform", "lognormal", "cancelling"])
@pytest.mark.parametrize("kernel", ["small 64", "small 32"])
def test_a_small_product_is_as_accurate_as_sgemm(
    kernel: str, kind: str, k: int, force: Callable[[str, str], None]
) -> None:
    """cuBLAS cuts up k on these, which leaves it with less to round: within a tenth of it."""
    force("sm90", kernel)
    ours = theirs = 0.0
    for _ in range(4):
        a, b = _inputs(kind, 256, 256, k)
        exact = a.double() @ b.double().T
        size = a.double().abs() @ b.double().abs().T
        ours += ((_product(a, b).double() - exact) / size).pow(2).mean().item()
        theirs += (((a @ b.T).double() - exact) / size).pow(2).mean().item()
    assert ours <= 1.1**2 * theirs, f"{math.sqrt(ours / 4):.3g} against SGEMM's {math.sqrt(theirs / 4):.3g}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_tf32_rounds_to_nearest(kernel: str, force: Callable[[str, str], None]) -> None:
    """Error of operands with 11 bits; and without any where they have no more."""
    force("sm90", kernel)
    a, b = random_matrix(300, 512), random_matrix(200, 512)
    exact = a.double() @ b.double().T
    error = (_product(a, b, "tf32").double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 3.2e-4
    a, b = (torch.randint(-8, 9, t.shape, device="cuda").float() for t in (a, b))
    for precision in ("tf32", "ieee"):
        assert torch.equal(_product(a, b, precision), a @ b.T)


# rows, embed, hidden, out
SIZES = {
    "one tile": (64, 32, 64, 32),
    "ragged": (197, 100, 332, 77),
    "one row": (1, 64, 128, 64),
    "odd output": (130, 36, 68, 33),
    "shorter than a stage": (70, 8, 4, 5),
    "many tiles": (1500, 132, 520, 132),
    "long sums": (90, 1028, 2052, 64),
}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_epilogues(
    size: str, kernel: str, precision: str, force: Callable[[str, str], None]
) -> None:
    force("sm90", kernel)
    rows, embed, hidden, out = SIZES[size]
    for activation in FFN_ACTIVATIONS:
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = ffn_parameters(embed, hidden, out)
        for biases, residual in ((False, None), (True, None), (False, r), (True, r)):
            parameters = (
                (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
                if biases
                else (fc1_weight, None, fc2_weight, None)
            )
            args = (x, *parameters, activation, residual)
            reference = ffn(*args)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.backends.cuda.matmul, "allow_tf32", precision == "tf32")
                yardstick = torch_ffn(*args)
            poison(rows * max(out, hidden), x.dtype, "cuda")
            result = OP(*args, precision)
            assert styleforge.last_path() == OWN[precision]
            # A small matrix may be cuBLAS's in float32 although TF32 is allowed: then what roundings give.
            assert_as_accurate(result, yardstick, reference, ulps=4.0 if precision == "ieee" else 8192.0)


@pytest.mark.parametrize("part", range(8))
def test_random_shapes_and_cuts(part: int, force: Callable[[str, str], None]) -> None:
    """Rows, widths and schedules at random; also outputs that are not whole vectors."""
    draw = random.Random(part)
    for _ in range(25):
        rows, out = draw.randint(1, 700), draw.randint(1, 300)
        embed, hidden = 4 * draw.randint(1, 200), 4 * draw.randint(1, 300)
        cluster, stages = draw.choice((1, 2, 4, 8)), draw.randint(1, 4)
        kernel = draw.choice(("small=1", "small=2,columns=32", "small=2,columns=64"))
        force("sm90", f"{kernel},cluster={cluster},stages={stages},band={draw.randint(1, 20)}")
        x, r = random_matrix(rows, embed), random_matrix(rows, out)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = ffn_parameters(embed, hidden, out)
        args = (
            x,
            fc1_weight,
            draw.choice((None, fc1_bias)),
            fc2_weight,
            draw.choice((None, fc2_bias)),
            draw.choice(FFN_ACTIVATIONS),
            draw.choice((None, r)),
        )
        poison(rows * max(out, hidden), x.dtype, "cuda")
        result = OP(*args)
        assert styleforge.last_path() == OWN["ieee"]
        assert_as_accurate(result, torch_ffn(*args), ffn(*args), ulps=4.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_infinity_stay_where_they_belong(kernel: str, force: Callable[[str, str], None]) -> None:
    force("sm90", kernel)
    a, b = random_matrix(200, 64), random_matrix(300, 64)
    a[3, 5], a[4, 6], a[5, 7], a[6, 5] = math.inf, math.nan, 3.4028e38, -math.inf
    b[7, 7] = -math.inf
    ours, theirs = _product(a, b), a @ b.T
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(ours), special(theirs))


# --- layouts and streams --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_and_weights_of_any_strides(kernel: str, force: Callable[[str, str], None]) -> None:
    """Also weights that the copy engine cannot take as they are, which are prepared first."""
    force("sm90", kernel)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = ffn_parameters(64, 96, 48)
    x = random_matrix(3, 50, 80)[..., :64]
    r = random_matrix(3, 50, 51)[..., :48]
    offset = torch.cat([fc1_weight.new_zeros(1), fc1_weight.flatten()])[1:].view(96, 64)
    variants = [
        (fc1_weight, fc2_weight),
        (fc1_weight.T.contiguous().T, fc2_weight.T.contiguous().T),
        (offset, torch.cat([fc2_weight, fc2_weight], 1)[:, :96]),
        (fc1_weight, torch.stack([fc2_weight, fc2_weight], 2)[..., 0]),
    ]
    reference = ffn(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, "silu", r)
    yardstick = torch_ffn(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, "silu", r)
    for w1, w2 in variants:
        result = OP(x, w1, fc1_bias, w2, fc2_bias, "silu", r)
        assert styleforge.last_path() == OWN["ieee"]
        assert_as_accurate(result, yardstick, reference)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_on_every_call_and_in_a_graph(
    kernel: str, precision: str, force: Callable[[str, str], None]
) -> None:
    force("sm90", kernel)
    x, parameters = random_matrix(700, 256), ffn_parameters(256, 1024, 256)
    kept, _ = FORWARD(x, *parameters, "gelu", x, precision)
    assert torch.equal(kept, OP(x, *parameters, "gelu", x, precision))
    assert_same_bits(x, random_matrix(700, 256), parameters, precision)


def test_calls_that_follow_each_other_closely(force: Callable[[str, str], None]) -> None:
    """A kernel starts while the one before it drains: what it reads of that one must be there."""
    force("sm90", "")
    parameters = ffn_parameters(128, 512, 128)
    x = random_matrix(256, 128)
    reference, fast = x.double(), x
    for _ in range(12):
        fast = OP(fast, *parameters, "gelu", fast)
        fast = fast / fast.norm() * 256
        reference = ffn(reference, *(p.double() for p in parameters), "gelu", reference)
        reference = reference / reference.norm() * 256
    chained = x
    for _ in range(12):
        chained = OP(chained, *parameters, "gelu", chained)
        chained = chained / chained.norm() * 256
    assert torch.equal(chained, fast)
    assert (fast.double() - reference).norm() / reference.norm() < 1e-5
    a, b = x, x
    for _ in range(20):  # without anything between
        a = OP(a, *parameters, "relu")
        torch.cuda.synchronize()
    for _ in range(20):
        b = OP(b, *parameters, "relu")
    assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_weight_changed_in_place_is_noticed(kernel: str, force: Callable[[str, str], None]) -> None:
    force("sm90", kernel)
    x, parameters = random_matrix(256, 128), ffn_parameters(128, 512, 128)
    before = OP(x, *parameters)
    for parameter in parameters:
        parameter.mul_(2)
    after = OP(x, *parameters)
    assert not torch.equal(before, after)
    assert_as_accurate(after, torch_ffn(x, *parameters), ffn(x, *parameters))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_gradients(activation: str, kernel: str, force: Callable[[str, str], None]) -> None:
    force("sm90", kernel)
    given = [random_matrix(2, 96, 64), *ffn_parameters(64, 256, 64)]
    upstream = random_matrix(2, 96, 64)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        y = function(*leaves, activation, leaves[0])
        return list(torch.autograd.grad(y, leaves, upstream.to(dtype)))

    ours = gradients(OP, torch.float32)
    theirs, exact = gradients(torch_ffn, torch.float32), gradients(ffn, torch.float64)
    for result, yardstick, reference in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(result, yardstick, reference, ulps=4.0)


@pytest.mark.parametrize(("rows", "embed", "hidden"), [(8192, 512, 2048), (2048, 4096, 11008)])
def test_inference_takes_no_more_memory_than_plain_layers(rows: int, embed: int, hidden: int) -> None:
    """The second: weights that, prepared, are several times the activations."""
    x, parameters = random_matrix(rows, embed), ffn_parameters(embed, hidden, embed)
    ours, theirs = (peak_memory(partial(function, x, *parameters, "gelu")) for function in (OP, torch_ffn))
    assert styleforge.last_path() == OWN["ieee"]
    assert ours <= theirs, f"{ours >> 20} MB against {theirs >> 20}"


def test_weights_in_pieces_give_what_they_give_whole(force: Callable[[str, str], None]) -> None:
    """Columns alone do not touch the sums; sums in pieces are rounded once more a piece."""
    x, r, parameters = random_matrix(700, 512), random_matrix(700, 516), ffn_parameters(512, 1300, 516)
    force("sm90", "large")
    whole, kept = FORWARD(x, *parameters, "gelu", r, "ieee")
    force("sm90", "small=1,memory=16,room=6,depth=4096")
    assert all(
        torch.equal(a, b)
        for a, b in zip(FORWARD(x, *parameters, "gelu", r, "ieee"), (whole, kept), strict=True)
    )
    force("sm90", "small=1,memory=16,room=6,depth=96")
    result, first = FORWARD(x, *parameters, "gelu", r, "ieee")
    assert torch.equal(first, kept)
    assert not torch.equal(result, whole), "sums were not cut"
    assert (result - whole).norm() < 1e-6 * whole.norm()


# --- which path -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "embed", "hidden", "dtype", "precision", "path"),
    [
        (8192, 512, 2048, torch.float32, "ieee", OWN["ieee"]),
        (256, 128, 512, torch.float32, "ieee", OWN["ieee"] + ":one_launch"),
        (1024, 128, 512, torch.float32, "ieee", OWN["ieee"] + ":one_launch"),
        (8192, 128, 512, torch.float32, "ieee", OWN["ieee"]),
        (256, 128, 512, torch.float32, "tf32", OWN["ieee"] + ":one_launch"),  # no slower
        (8192, 512, 2048, torch.float32, "tf32", OWN["tf32"]),
        (8192, 128, 512, torch.float32, "tf32", ATEN),  # cuBLAS is faster
        (1, 128, 512, torch.float32, "ieee", ATEN),  # a few rows
        (256, 32, 512, torch.float32, "ieee", ATEN),  # short sums
        (256, 130, 512, torch.float32, "ieee", ATEN),  # rows that the copy engine does not take
        (256, 128, 514, torch.float32, "ieee", ATEN),
        (256, 512, 2048, torch.bfloat16, "ieee", ATEN),
        (256, 128, 512, torch.float64, "ieee", ATEN),
    ],
)
def test_the_path_follows_from_the_call(
    rows: int, embed: int, hidden: int, dtype: torch.dtype, precision: str, path: str
) -> None:
    x, parameters = (
        random_matrix(rows, embed).to(dtype),
        [p.to(dtype) for p in ffn_parameters(embed, hidden, embed)],
    )
    OP(x, *parameters, "gelu", None, precision)
    assert styleforge.last_path() == path


def test_a_path_can_be_forced(force: Callable[[str, str], None]) -> None:
    x, parameters = random_matrix(4, 32), ffn_parameters(32, 64, 32)
    for path, expected in (("", ATEN), ("sm90", OWN["ieee"]), ("aten", ATEN)):
        force(path, "")
        OP(x, *parameters)
        assert styleforge.last_path() == expected
    force("sm90", "")
    OP(random_matrix(4, 33), *ffn_parameters(33, 64, 32))  # what it cannot take is not lost
    assert styleforge.last_path() == ATEN
    OP(torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(4, 32), *parameters)  # not aligned to 16 bytes
    assert styleforge.last_path() == ATEN
