"""The attention kernels of ``fused_attention`` on sm_90: accuracy, masks, tails, choice of path.

The forward ones are for float32, those of the gradients for all dtypes.

What a head computes is the second result of ``_fused_attention_forward``, beside the projected input that it
is made of; PyTorch's ``scaled_dot_product_attention`` on the same numbers is the yardstick.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import styleforge
from _reference import (
    assert_as_accurate,
    assert_as_accurate_together,
    attention_parameters,
    max_error,
    poison,
    random_mask,
    random_tensor,
    rms,
    rms_error,
)

FORWARD = torch.ops.styleforge._fused_attention_forward
BACKWARD = torch.ops.styleforge._fused_attention_backward
OP = torch.ops.styleforge.fused_attention
VERSION_2 = torch.ops.styleforge.fused_attention_v2
OWN = "attention:v2:cuda:sm90:3xtf32"
PRODUCTS = "+products:sm90:3xtf32"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="kernels of sm_90"
    ),
]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)


def _attend(
    x: Tensor,
    heads: int,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [3, N, heads, S, D]; what the heads make of them, [N, S, embed]; the logsumexp."""
    batch, length, embed = x.shape
    for count in (x.numel(), 3 * x.numel(), batch * heads * length):
        poison(count, x.dtype, "cuda")
    _, qkv, result, logsumexp = FORWARD(
        x, *attention_parameters(embed, x.dtype, "cuda"), heads, scale, is_causal, mask, "ieee", 2
    )
    assert styleforge.last_path().split("+")[0] == OWN
    packed = qkv.view(batch, length, 3, heads, embed // heads).permute(2, 0, 3, 1, 4)
    return packed, result, logsumexp


def _expected(
    packed: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Result and logsumexp in float64, and how large what is added up to a score is; no key, no weight."""
    q, k, v = packed.double()
    length, head_dim = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    hidden = torch.zeros(q.shape[0], 1, length, length, dtype=torch.bool, device="cuda")
    if mask is not None:
        hidden = hidden | mask[:, None, None, :]
    if is_causal:
        hidden = hidden | torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    terms = q.abs() @ k.abs().transpose(-1, -2) * (head_dim**-0.5 if scale is None else abs(scale))
    return _merge(scores.softmax(-1).nan_to_num(0) @ v), scores.logsumexp(-1), terms.amax(-1)


def _merge(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _yardstick(packed: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = packed
    seen = None if mask is None else ~mask[:, None, None, :]
    if seen is not None and is_causal:
        seen = seen & torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device="cuda").tril()
    result = F.scaled_dot_product_attention(q, k, v, seen, is_causal=is_causal and seen is None, scale=scale)
    return _merge(result).nan_to_num(0)


def _check(
    x: Tensor,
    heads: int,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    factor: float = 1.5,
) -> tuple[float, float]:
    """Holds one case against float64. Returns the RMS errors of ours and of PyTorch's."""
    packed, result, logsumexp = _attend(x, heads, is_causal, mask, scale)
    expected, expected_logsumexp, terms = _expected(packed, is_causal, mask, scale)
    yardstick = _yardstick(packed, is_causal, mask, scale)
    # With a few products in a sum PyTorch's units round them once, and 3xTF32 three times.
    few = x.shape[-1] // (3 * heads) < 8
    assert_as_accurate(result, yardstick, expected, factor=factor, ulps=4.0 if few else None)
    seen = expected_logsumexp.isfinite()
    assert torch.equal(logsumexp.isposinf(), ~seen)  # which the backward takes for "no weight"
    error = (logsumexp.double() - expected_logsumexp)[seen].abs()
    assert (error <= 2e-6 * (2 + terms + expected_logsumexp.abs())[seen]).all()
    return rms_error(result, expected), rms_error(yardstick, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "some", "left", "dead"])
@pytest.mark.parametrize("head_dim", [1, 8, 20, 32, 33, 40, 64, 65, 80, 96, 126, 128, 129, 160, 255, 256])
def test_head_sizes_lengths_and_masks(head_dim: int, mask: str | None, is_causal: bool) -> None:
    """Lengths around the tiles of 64 keys, the 64 queries of a warpgroup and the 128 of a block."""
    for length in (1, 2, 17, 63, 64, 65, 127, 128, 129, 191, 193, 333):
        hidden = None if mask is None else random_mask(2, length, mask, "cuda")
        _check(random_tensor(2, length, 3 * head_dim, device="cuda"), 3, is_causal, hidden)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim"),
    [(2, 1025, 4, 64), (1, 4096, 2, 128), (1, 3000, 3, 48), (1, 2050, 2, 256)],
)
def test_long_sequences(batch: int, length: int, heads: int, head_dim: int, is_causal: bool) -> None:
    x = random_tensor(batch, length, heads * head_dim, device="cuda")
    ours, theirs = _check(x, heads, is_causal)
    assert ours <= theirs
    _check(x, heads, is_causal, random_mask(batch, length, "some", "cuda"))


def test_no_less_accurate_than_pytorch_on_all_kinds_of_numbers() -> None:
    """Scores that are close and far apart, of one sign and of both, tokens of different size."""
    pairs = []
    for head_dim, heads in itertools.product((32, 64, 128, 256), (1, 2)):
        x = random_tensor(1, 700, heads * head_dim, device="cuda")
        spread = (torch.randn(700, 1, device="cuda") / 2).exp()
        for numbers in (x, 2 * x, 0.01 * x, x.abs(), x + 10, x * spread):
            for is_causal in (False, True):
                pairs.append(_check(numbers, heads, is_causal, factor=3.0))
    assert_as_accurate_together(pairs, torch.float32, factor=1.0)


@pytest.mark.parametrize("scale", [1.0, 0.02, -0.25, 0.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_scale(scale: float, is_causal: bool) -> None:
    for head_dim in (24, 128, 200):
        x = random_tensor(2, 200, 2 * head_dim, device="cuda")
        _check(x, 2, is_causal, None, scale)
        _check(x, 2, is_causal, random_mask(2, 200, "dead", "cuda"), scale)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_scores_far_from_zero(head_dim: int) -> None:
    """Powers of e overflow float32 from 89 on; only differences from the greatest score may be raised."""
    x = random_tensor(1, 300, head_dim, device="cuda")
    packed, result, logsumexp = _attend(40 * x, 1)
    assert logsumexp.max() > 1000
    expected, *_ = _expected(packed, False, None, None)
    # A few queries that two keys are equally near to make up the error.
    ours = rms_error(result, expected)
    assert ours <= 4 * rms_error(_yardstick(packed, False, None, None), expected) + 1e-6 * rms(expected)


def test_turns_and_their_absence_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which the warpgroups come to the tensor cores is a matter of time alone."""
    for head_dim, is_causal in itertools.product((32, 64, 128), (False, True)):
        x = random_tensor(2, 600, 2 * head_dim, device="cuda")
        parameters = attention_parameters(2 * head_dim, x.dtype, "cuda")
        results = []
        for tune in ("turns=2", "turns=1"):
            monkeypatch.setenv("STYLEFORGE_ATTENTION_TUNE", tune)
            results.append(FORWARD(x, *parameters, 2, None, is_causal, None, "ieee", 2))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_a_query_does_not_depend_on_the_queries_and_samples_beside_it() -> None:
    for head_dim in (32, 64, 128, 256):
        x = random_tensor(3, 400, 2 * head_dim, device="cuda")
        parameters = attention_parameters(2 * head_dim, x.dtype, "cuda")
        whole = FORWARD(x, *parameters, 2, None, True, None, "ieee", 2)[2]
        part = FORWARD(x[1:2, :130].contiguous(), *parameters, 2, None, True, None, "ieee", 2)[2]
        torch.testing.assert_close(part[0], whole[1, :130], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_nan_stays_in_its_sample_and_behind_its_token(head_dim: int) -> None:
    x = random_tensor(2, 300, head_dim, device="cuda")
    parameters = attention_parameters(head_dim, x.dtype, "cuda")
    clean = FORWARD(x, *parameters, 1, None, True, None, "ieee", 2)[2]
    x[1, 200] = math.nan
    result = FORWARD(x, *parameters, 1, None, True, None, "ieee", 2)[2]
    assert torch.equal(result[0], clean[0]) and torch.equal(result[1, :192], clean[1, :192])
    assert result[1, 200:].isnan().all()


def test_what_they_do_not_take_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    half = random_tensor(1, 600, 128, dtype=torch.float16, device="cuda")
    OP(half, *attention_parameters(128, half.dtype, "cuda"), 2)
    assert "sm90" not in styleforge.last_path()
    x = random_tensor(1, 600, 128, device="cuda")
    parameters = attention_parameters(128, x.dtype, "cuda")
    OP(x, *parameters, 2)
    assert styleforge.last_path() == OWN + PRODUCTS
    monkeypatch.setenv("STYLEFORGE_PATH", "efficient")
    OP(x, *parameters, 2)
    assert styleforge.last_path() == "attention:v2:cuda:efficient"


def test_wide_heads_by_default_where_they_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of the multiprocessors, in rows that are read in vectors; else it is ATen's kernel."""
    monkeypatch.setenv("STYLEFORGE_PATH", "")
    blocks = torch.cuda.get_device_properties(0).multi_processor_count // 2
    for batch, head_dim, own in ((blocks, 160, False), (blocks + 1, 160, True), (blocks + 1, 161, False)):
        x = random_tensor(batch, 128, head_dim, device="cuda")
        VERSION_2(x, *attention_parameters(head_dim, x.dtype, "cuda"), 1)
        assert styleforge.last_path().startswith(OWN if own else "attention:v2:cuda:efficient")


# --- gradients ------------------------------------------------------------------------------------

OWN_BACKWARD = {
    torch.float32: "attention_backward:cuda:sm90:3xtf32",
    torch.float16: "attention_backward:cuda:sm90:16bit",
    torch.bfloat16: "attention_backward:cuda:sm90:16bit",
}
# What rounding leaves where all that is summed up cancels, of the largest of the three gradients.
FLOORS = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_CASES = [
    *((torch.float32, head_dim) for head_dim in (4, 20, 32, 48, 64)),
    *((dtype, head_dim) for dtype in (torch.float16, torch.bfloat16) for head_dim in (8, 40, 64, 72, 128)),
]


def _gradients(
    x: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    grad: Tensor,
    heads: int,
    is_causal: bool,
    mask: Tensor | None,
    scale: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The projected input, and what the backward operator gives for q, k and v of it.

    That operator multiplies them by the weights: here by ones and zeros, that leave one of the three.
    """
    embed = x.shape[2]
    _, qkv, attention, logsumexp = FORWARD(x, *parameters, heads, scale, is_causal, mask, "ieee", 2)
    one = torch.eye(embed, dtype=x.dtype, device="cuda")
    gradients = []
    for which in range(3):
        pick = torch.zeros(3, embed, embed, dtype=x.dtype, device="cuda")
        pick[which] = one
        poison(3 * x.numel(), x.dtype, "cuda")
        rest = (heads, scale, is_causal, mask, "ieee", True, False, False, False, False)
        gradients.append(BACKWARD(grad, x, qkv, attention, logsumexp, pick.flatten(0, 1), one, *rest)[0])
    return qkv, gradients


def _expected_gradients(
    qkv: Tensor, grad: Tensor, heads: int, is_causal: bool, mask: Tensor | None, scale: float | None = None
) -> list[Tensor]:
    leaf = qkv.double().requires_grad_()
    batch, length, width = qkv.shape
    q, k, v = leaf.view(batch, length, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros(batch, 1, length, length, dtype=torch.bool, device="cuda")
    if mask is not None:
        hidden = hidden | mask[:, None, None, :]
    if is_causal:
        hidden = hidden | torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    powers = (scores - scores.detach().amax(-1, keepdim=True)).exp().masked_fill(hidden, 0)
    weights = powers / powers.sum(-1, keepdim=True).clamp_min(1e-300)
    (result,) = torch.autograd.grad(_merge(weights @ v), leaf, grad.double())
    return list(result.chunk(3, -1))


def _check_gradients(
    monkeypatch: pytest.MonkeyPatch,
    x: Tensor,
    heads: int,
    is_causal: bool,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    parameters = attention_parameters(x.shape[2], x.dtype, "cuda")
    grad = torch.randn_like(x)
    args = (x, parameters, grad, heads, is_causal, mask, scale)
    qkv, ours = _gradients(*args)
    assert styleforge.last_path() == OWN_BACKWARD[x.dtype]
    with monkeypatch.context() as patch:
        patch.setenv("STYLEFORGE_PATH", "efficient")
        their_qkv, theirs = _gradients(*args)
    expected = _expected_gradients(qkv, grad, heads, is_causal, mask, scale)
    their_expected = _expected_gradients(their_qkv, grad, heads, is_causal, mask, scale)
    for name, a, b, e, f in zip("qkv", ours, theirs, expected, their_expected, strict=True):
        assert a.isfinite().all(), name
        # A query that sees one key alone has no gradient: what is left are roundings of what cancels.
        floor = FLOORS[x.dtype] * max(rms(t) for t in expected)
        assert rms_error(a, e) <= 1.5 * rms_error(b, f) + floor, name
        assert max_error(a, e) <= 3 * max_error(b, f) + 20 * floor, name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "some", "left", "dead"])
@pytest.mark.parametrize(("dtype", "head_dim"), GRADIENT_CASES, ids=str)
def test_gradients(
    dtype: torch.dtype, head_dim: int, mask: str | None, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (1, 17, 64, 65, 127, 129, 200, 333):
        hidden = None if mask is None else random_mask(2, length, mask, "cuda")
        x = random_tensor(2, length, 3 * head_dim, dtype=dtype, device="cuda")
        _check_gradients(monkeypatch, x, 3, is_causal, hidden)


@pytest.mark.parametrize("dtype", OWN_BACKWARD, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.25, 0.0])
def test_gradients_with_any_scale(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_tensor(1, 300, 128, dtype=dtype, device="cuda")
    _check_gradients(monkeypatch, x, 2, False, None, scale)
    _check_gradients(monkeypatch, x, 2, True, random_mask(1, 300, "some", "cuda"), scale)


@pytest.mark.parametrize("dtype", OWN_BACKWARD, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_a_long_sequence(
    is_causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_gradients(monkeypatch, random_tensor(1, 3001, 128, dtype=dtype, device="cuda"), 2, is_causal)


@pytest.mark.parametrize("dtype", OWN_BACKWARD, ids=str)
def test_gradients_have_the_same_bits_on_every_run(dtype: torch.dtype) -> None:
    x = random_tensor(2, 500, 128, dtype=dtype, device="cuda")
    parameters = attention_parameters(128, x.dtype, "cuda")
    grad = torch.randn_like(x)
    first = _gradients(x, parameters, grad, 2, True, None)[1]
    for _ in range(10):
        for a, b in zip(_gradients(x, parameters, grad, 2, True, None)[1], first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", OWN_BACKWARD, ids=str)
def test_gradients_by_default(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads up to 64, in 16 bits 128, whose rows the kernels can read; behind either forward."""
    monkeypatch.setenv("STYLEFORGE_PATH", "")
    for length, heads, head_dim, own in (
        (1030, 2, 64, True),
        (70, 4, 32, True),
        (70, 2, 13, False),
        (70, 2, 80, dtype != torch.float32),
        (70, 2, 136, False),
    ):
        embed = heads * head_dim
        x = random_tensor(2, length, embed, dtype=dtype, device="cuda").requires_grad_()
        OP(x, *attention_parameters(embed, dtype, "cuda"), heads).sum().backward()
        assert (styleforge.last_path() == OWN_BACKWARD[dtype]) == own


@pytest.mark.parametrize("dtype", OWN_BACKWARD, ids=str)
def test_gradients_do_not_mix_samples(dtype: torch.dtype) -> None:
    """What the copy engine fetches beyond the last token of a sample is not the next sample's."""
    x = random_tensor(3, 77, 128, dtype=dtype, device="cuda")
    parameters = attention_parameters(128, dtype, "cuda")
    grad = torch.randn_like(x)
    clean = _gradients(x, parameters, grad, 2, False, None)[1]
    x[1], grad[2] = math.nan, math.inf
    for a, b in zip(_gradients(x, parameters, grad, 2, False, None)[1], clean, strict=True):
        assert torch.equal(a[0], b[0]) and not a[1].isfinite().any()
