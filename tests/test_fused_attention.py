"""``fused_attention``, ``_v1`` and ``_v2``: accuracy, masks, layouts, gradients.

Registration, composite and errors: test_fused_attention_registration.py; what a server asks of it on a GPU:
test_fused_attention_cuda.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, seed
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import styleforge
from _reference import (
    DEVICES,
    FLOATS,
    MATRIX_LAYOUTS,
    assert_as_accurate,
    assert_as_accurate_together,
    attention,
    attention_parameters,
    attention_wavering,
    matmul_tf32,
    max_error,
    poison,
    random_configurations,
    random_mask,
    random_tensor,
    rms,
    rms_error,
    torch_attention,
)
from styleforge.ops import fused_attention, fused_attention_v1, fused_attention_v2

OP = torch.ops.styleforge.fused_attention
VERSIONS = {
    "auto": torch.ops.styleforge.fused_attention,
    "v1": torch.ops.styleforge.fused_attention_v1,
    "v2": torch.ops.styleforge.fused_attention_v2,
}
FORWARD = torch.ops.styleforge._fused_attention_forward
BACKWARD = torch.ops.styleforge._fused_attention_backward
HALF = (torch.float16, torch.bfloat16)
# Random configurations, over all dtypes and parts (which pytest-xdist can spread).
PARTS = 2
EASY = random_configurations(PARTS * len(FLOATS))
# Kernels of a device, by STYLEFORGE_PATH; the first of each is what the other tests take.
KERNELS = [
    ("cpu", "flash"),
    ("cpu", "math"),
    *(
        pytest.param("cuda", k, marks=pytest.mark.cuda)
        for k in ("flash", "cudnn", "efficient", "math", "sm90")
    ),
]


def _compare(*args: Any, op: Any = OP, precision: str = "ieee", **limits: Any) -> Tensor:
    """Runs the operator over poisoned memory and holds it against float64 and PyTorch. Returns its result."""
    input = args[0]
    reference = attention(*args)
    with matmul_tf32(precision == "tf32"):
        yardstick = torch_attention(*args)
    for count in (reference.numel(), 3 * reference.numel()):
        poison(count, input.dtype, input.device.type)
    result = op(*args, precision=precision)
    assert result.dtype == input.dtype and result.device == input.device
    assert result.is_contiguous()
    if input.dtype == torch.float64:
        limits = {"ulps": 8.0, **limits}  # the reference is rounded as well
    assert_as_accurate(result, yardstick, reference, **limits)
    return result


def _ulps(dtype: torch.dtype, count: int = 10**6) -> float | None:
    """What is allowed for on a few elements, where a ratio of errors is chance."""
    if dtype == torch.float64:
        return 8.0
    if dtype == torch.float32:
        return 4.0
    return 1.0 if count < 300 else 0.5


def _random_call(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    biases: str,
    layout: str,
    weight_layout: str,
    mask: str | None,
    is_causal: bool,
    scale: float | None,
    spread: float,
    dtype: torch.dtype,
    device: str,
) -> tuple[Any, ...]:
    """What the operator is called with, of whatever PyTorch's generator stands at."""
    embed = heads * head_dim
    x = random_tensor(batch, length, embed, dtype=dtype, device=device, layout=layout, scale=spread)
    parameters = attention_parameters(embed, dtype, device, biases, weight_layout)
    hidden = None if mask is None else random_mask(batch, length, mask, device)
    return (x, *parameters, heads, scale, is_causal, hidden)


def _hold(op: Any, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the operator and compares; its result, PyTorch's and that of float64."""
    x, *parameters, heads, scale, _, _ = given
    dtype, device = x.dtype, x.device.type
    reference, yardstick = attention(*given), torch_attention(*given)
    poison(reference.numel(), dtype, device)
    result = op(*given)
    assert result.dtype == dtype and result.is_contiguous()
    # Terms that cancel leave their rounding behind: values are averaged before they are projected.
    terms = rms(torch.einsum("nse,oe->nso", x.double().abs(), parameters[0].double().abs()))
    ulps = _ulps(dtype, result.numel())
    if dtype == torch.float64:  # the reference is rounded as well; on the GPU PyTorch's is it, to the bit
        ulps = 512.0 if device == "cuda" else 8.0 + _largest_score(x, *parameters[:2], heads, scale)
    assert_as_accurate(
        result,
        yardstick,
        reference,
        scale=max(rms(reference), terms / 8),
        ulps=ulps,
        wavering=attention_wavering(*given[:4], *given[5:]),
    )
    return result, yardstick, reference


def _largest_score(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, scale: float | None) -> float:
    """In float64; its rounding error is what a softmax makes of it, so many units of every weight."""
    qkv = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    query, key = qkv.unflatten(2, (3, heads, -1)).unbind(2)[:2]
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key)
    return scores.abs().max().item() * (query.shape[3] ** -0.5 if scale is None else scale)


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations_are_as_accurate_as_pytorch(part: int, dtype: torch.dtype, device: str) -> None:
    """Each of them alone, and all together, where luck averages out, without any floor."""
    errors: list[tuple[float, float]] = []

    @seed(PARTS * FLOATS.index(dtype) + part)  # other examples in each part, the same on each run
    @EASY
    @given(
        batch=st.integers(1, 5),
        length=st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 200))),
        heads=st.integers(1, 5),
        head_dim=st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 96, 128, 255, 256))),
        biases=st.sampled_from(("none", "first", "second", "both")),
        layout=st.sampled_from((*MATRIX_LAYOUTS, "rows")),
        weight_layout=st.sampled_from(MATRIX_LAYOUTS),
        mask=st.sampled_from((None, "some", "left", "dead")),
        is_causal=st.booleans(),
        scale=st.sampled_from((None, None, 0.01, 1.0)),
        spread=st.sampled_from((1.0, 0.05, 3.0)),
        version=st.sampled_from(tuple(VERSIONS)),
        data_seed=st.integers(0, 2**31 - 1),
    )
    def check(
        batch: int,
        length: int,
        heads: int,
        head_dim: int,
        biases: str,
        layout: str,
        weight_layout: str,
        mask: str | None,
        is_causal: bool,
        scale: float | None,
        spread: float,
        version: str,
        data_seed: int,
    ) -> None:
        if heads * head_dim > 512:
            heads = 1
        torch.manual_seed(data_seed)
        given = _random_call(
            batch,
            length,
            heads,
            head_dim,
            biases,
            layout,
            weight_layout,
            mask,
            is_causal,
            scale,
            spread,
            dtype,
            device,
        )
        result, yardstick, reference = _hold(VERSIONS[version], given)
        size = rms(reference)
        if size > 0 and dtype != torch.float64:  # in float64 PyTorch's error against itself is often none
            errors.append((rms_error(result, reference) / size, rms_error(yardstick, reference) / size))

    check()
    if len(errors) >= 20:
        # On the GPU PyTorch takes plain products where its kernel does not fit; ours takes the kernel.
        assert_as_accurate_together(errors, dtype, factor=1.2 if device == "cpu" else 1.5)


# Of random calls with scores up to 300 and more, those where PyTorch on one CPU was 2 to 5 times as accurate,
# by the one or two queries that decide between two keys.
NEAR_TIES = [
    (torch.bfloat16, 3, 43, 1, 256, "first", "expanded", "transposed", "dead", True, "v2", 111723051),
    (torch.float16, 1, 127, 1, 256, "both", "rows", "transposed", "some", True, "v2", 2139317240),
    (torch.float16, 2, 11, 4, 29, "first", "expanded", "contiguous", "some", False, "auto", 370729951),
    (torch.float16, 3, 21, 3, 35, "both", "sliced", "contiguous", "dead", False, "v2", 166119825),
    (torch.float32, 3, 11, 5, 96, "first", "expanded", "contiguous", "some", True, "auto", 1400401397),
    (torch.float32, 1, 36, 2, 255, "first", "transposed", "transposed", "some", False, "v2", 1301632945),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", NEAR_TIES, ids=lambda case: f"{case[0]}-{case[-1]}")
def test_large_scores(case: tuple[Any, ...], device: str) -> None:
    dtype, *sizes, mask, is_causal, version, data_seed = case
    torch.manual_seed(data_seed)
    _hold(VERSIONS[version], _random_call(*sizes, mask, is_causal, 1.0, 3.0, dtype, device))


def test_how_much_a_result_wavers() -> None:
    """Against a try: the queries and keys of an identity matrix are the rows of the weights."""
    embed, heads, unit = 24, 3, 1e-6
    x, hidden = torch.eye(embed, dtype=torch.float64)[None], random_mask(1, embed)
    weight, out_weight = (
        torch.randn(n * embed, embed, dtype=torch.float64) * f for n, f in ((3, 1.5), (1, 0.2))
    )
    for is_causal, mask in itertools.product((False, True), (None, hidden)):
        rest: Any = (None, out_weight, None, heads, 1.0, is_causal, mask)
        expected, squares = attention(x, weight, *rest), torch.zeros(1, embed, embed, dtype=torch.float64)
        for _ in range(200):
            changed = weight.clone()
            changed[: 2 * embed] *= 1 + unit * torch.randn(2 * embed, embed, dtype=torch.float64)
            squares += (attention(x, changed, *rest) - expected) ** 2 / 200
        found = attention_wavering(x, weight, None, out_weight, heads, 1.0, is_causal, mask)
        assert 0.75 < rms(found) / (rms(squares.sqrt()) / unit) < 1.5  # a query's scores do not change alone


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 40, 65, 80, 96, 160, 255, 256])
def test_lengths_and_head_sizes(head_dim: int, version: str, device: str) -> None:
    for length in (1, 17, 333, 1025) if device == "cuda" or head_dim in (8, 80, 256) else (1, 17, 333):
        for dtype in FLOATS:
            x = random_tensor(2, length, 2 * head_dim, dtype=dtype, device=device)
            parameters = attention_parameters(2 * head_dim, dtype, device)
            count = x.numel()
            for is_causal in (False, True):
                args = (x, *parameters, 2, None, is_causal)
                _compare(*args, op=VERSIONS[version], ulps=_ulps(dtype, count))
            if length == 333:
                _compare(
                    *args, random_mask(2, length, "some", device), op=VERSIONS[version], ulps=_ulps(dtype)
                )


# The seed's own tests: batch, length, embed_dim, heads, bias; float32, within 1e-4.
SEED_GRID = list(
    itertools.product((1, 2, 4, 8, 16), (64, 128, 256, 512), (128, 256, 512), (1, 2, 4, 8), (True, False))
)


def _seed_case(batch: int, length: int, embed: int, heads: int, bias: bool, device: str) -> None:
    x = random_tensor(batch, length, embed, device=device)
    args = (x, *attention_parameters(embed, device=device, biases="both" if bias else "none"), heads)
    if embed // heads > 256:
        with pytest.raises(
            RuntimeError, match="embed_dim / num_heads must be at most 256, got 512 / 1 = 512"
        ):
            OP(*args)
        return
    reference, yardstick = attention(*args), torch_attention(*args)
    for op in VERSIONS.values():
        result = op(*args)
        assert max_error(result, reference) < 1e-4
        assert_as_accurate(result, yardstick, reference, ulps=2.0)
        assert torch.equal(op(*args), result)


@pytest.mark.parametrize("index", range(0, len(SEED_GRID), 37))
def test_the_seeds_correctness_grid_in_samples(index: int) -> None:
    batch, *rest = SEED_GRID[index]
    _seed_case(min(batch, 4), *rest, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("length", [64, 128, 256, 512])
@pytest.mark.parametrize("embed", [128, 256, 512])
def test_the_seeds_correctness_grid(embed: int, length: int) -> None:
    for case in SEED_GRID:
        if case[1:3] == (length, embed):
            _seed_case(*case, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "embed", "heads"),
    [(8, 1024, 1024, 16), (1, 4096, 512, 4), (3, 2000, 320, 4), (2, 1500, 300, 5), (1, 1024, 1024, 4)],
)
def test_long_sequences(
    batch: int, length: int, embed: int, heads: int, is_causal: bool, precision: str, dtype: torch.dtype
) -> None:
    x = random_tensor(batch, length, embed, dtype=dtype, device="cuda")
    parameters = attention_parameters(embed, dtype, "cuda")
    _compare(x, *parameters, heads, None, is_causal, precision=precision)
    assert styleforge.last_path().startswith("attention:v2:cuda:")
    if precision == "ieee":
        _compare(x, *parameters, heads, None, is_causal, random_mask(batch, length, "some", "cuda"))


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "kernel"), KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kernel(dtype: torch.dtype, device: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a device has, whichever it would choose: results and gradients, with and without masks."""
    monkeypatch.setenv("STYLEFORGE_PATH", kernel)
    taken = set()
    for length, heads, head_dim in ((17, 3, 8), (130, 2, 40), (65, 2, 13)):
        for is_causal, mask in itertools.product((False, True), (None, "some", "dead")):
            hidden = None if mask is None else random_mask(3, length, mask, device)
            x = random_tensor(3, length, heads * head_dim, dtype=dtype, device=device)
            parameters = attention_parameters(heads * head_dim, dtype, device)
            args = (x, *parameters, heads, None, is_causal, hidden)
            _compare(*args, ulps=_ulps(dtype))
            taken.add(styleforge.last_path().split("+")[0].split(":")[3])
            _check_gradients(*args)
    if device == "cpu" or kernel == "math" or (kernel == "efficient" and dtype != torch.float64):
        assert taken == {kernel}
    elif kernel == "sm90":
        ours = dtype == torch.float32 and torch.cuda.get_device_capability()[0] == 9
        assert (taken == {kernel}) == ours
    elif dtype in HALF:
        assert kernel in taken


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_query_that_sees_nothing_gets_the_bias(version: str, dtype: torch.dtype, device: str) -> None:
    x = random_tensor(3, 9, 12, dtype=dtype, device=device)
    parameters = attention_parameters(12, dtype, device)
    mask = torch.zeros(3, 9, dtype=torch.bool, device=device)
    mask[0] = True  # nothing to see in this sample
    mask[1, :4] = True  # nor, where no later token counts, for the first four of this one
    for is_causal in (False, True):
        y = VERSIONS[version](x, *parameters, 3, None, is_causal, mask)
        assert torch.equal(y[0], parameters[3].expand(9, 12))
        assert torch.equal(y[1, :4], parameters[3].expand(4, 12)) == is_causal
        assert torch.isfinite(y).all()
        without = VERSIONS[version](x, *parameters[:3], None, 3, None, is_causal, mask)
        assert not without[0].any()
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        VERSIONS[version](*leaves, 3, None, is_causal, mask).float().square().sum().backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
        assert not leaves[0].grad[0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_hidden_has_no_influence(dtype: torch.dtype, device: str) -> None:
    """Also where it is infinite or not a number, for causal masks; hidden keys count through their scores."""
    x = random_tensor(2, 40, 16, dtype=dtype, device=device)
    parameters = attention_parameters(16, dtype, device)
    mask = torch.zeros(2, 40, dtype=torch.bool, device=device)
    mask[:, 30:] = True
    first = OP(x, *parameters, 2, None, False, mask)
    causal = OP(x, *parameters, 2, None, True)
    x[:, 30:] = 100 * torch.rand_like(x[:, 30:])
    assert torch.equal(OP(x, *parameters, 2, None, False, mask)[:, :30], first[:, :30])
    assert torch.equal(OP(x, *parameters, 2, None, True)[:, :30], causal[:, :30])
    y = x.clone()
    y[1] = float("nan")
    assert torch.equal(OP(y, *parameters, 2)[0], OP(x, *parameters, 2)[0])
    assert OP(y, *parameters, 2)[1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_masks_of_any_strides(layout: str, device: str) -> None:
    x, parameters = random_tensor(3, 20, 16, device=device), attention_parameters(16, device=device)
    mask = random_tensor(3, 20, device=device, layout=layout) > 0
    dense = mask.contiguous()
    for is_causal in (False, True):
        expected = OP(x, *parameters, 2, None, is_causal, dense)
        assert torch.equal(OP(x, *parameters, 2, None, is_causal, mask), expected)
    nothing = torch.zeros(3, 20, dtype=torch.bool, device=device)
    torch.testing.assert_close(OP(x, *parameters, 2, key_padding_mask=nothing), OP(x, *parameters, 2))


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [*MATRIX_LAYOUTS, "rows"])
@pytest.mark.parametrize("sizes", [(3, 7, 12), (1, 5, 12), (5, 1, 12), (2, 40, 24)], ids=str)
def test_any_strides(sizes: tuple[int, ...], layout: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = random_tensor(*sizes, dtype=dtype, device=device, layout=layout)
        for biases in ("none", "both"):
            weight_layout = layout.replace("rows", "sliced")
            parameters = attention_parameters(sizes[2], dtype, device, biases, weight_layout)
            result = _compare(x, *parameters, 3, ulps=_ulps(dtype, x.numel()))
            assert result.shape == sizes and result.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [(0, 5, 12), (3, 0, 12), (0, 0, 12)], ids=str)
def test_empty_batches_and_sequences(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = random_tensor(*sizes, dtype=dtype, device=device)
    for biases, mask in itertools.product(("none", "both"), (None, torch.ones(sizes[:2]).bool().to(device))):
        parameters = attention_parameters(12, dtype, device, biases)
        result = OP(x, *parameters, 3, None, True, mask)
        assert result.shape == sizes and result.is_contiguous()
        assert styleforge.last_path() == f"attention:v1:{device}:none"
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, *parameters)]
        OP(*leaves, 3, None, True, mask).sum().backward()
        for leaf in leaves:
            if leaf is not None:
                assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device: str) -> None:
    mask = random_mask(2, 9, "some", device)
    given = [random_tensor(2, 9, 12, device=device), *attention_parameters(12, device=device)]
    before = [t.clone() for t in (*given, mask)]
    OP(*given, 3, None, True, mask)
    leaves = [t.requires_grad_() for t in given]
    OP(*leaves, 3, None, True, mask).sum().backward()
    for now, then in zip((*leaves, mask), before, strict=True):
        assert torch.equal(now, then)


def test_python_functions_are_the_operators() -> None:
    x, parameters, mask = random_tensor(2, 9, 12), attention_parameters(12), random_mask(2, 9, "some")
    for function, op in (
        (fused_attention, VERSIONS["auto"]),
        (fused_attention_v1, VERSIONS["v1"]),
        (fused_attention_v2, VERSIONS["v2"]),
    ):
        expected = op(x, *parameters, 3, 0.2, True, mask)
        options: dict[str, Any] = dict(scale=0.2, is_causal=True, key_padding_mask=mask, precision="tf32")
        assert torch.equal(function(x, *parameters, 3, **options), expected)
        assert styleforge.last_path().split(":")[1] == ("v2" if op is VERSIONS["v2"] else "v1")
        assert torch.equal(function(x, *parameters, 3), op(x, *parameters, 3))


def test_last_path() -> None:
    for length, version in ((16, "v1"), (600, "v2")):
        x, parameters = random_tensor(1, length, 8).requires_grad_(), attention_parameters(8)
        y = OP(x, *parameters, 2)
        assert styleforge.last_path() == f"attention:{version}:cpu:flash"
        y.sum().backward()
        assert styleforge.last_path() == "attention_backward:cpu:flash"


# --- precision and limits on CUDA -------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("way", ["no_grad", "grad", "function in inference mode"])
def test_precision_counts_and_not_the_flag(way: str, flag: bool) -> None:
    x, parameters = random_tensor(2, 256, 1024, device="cuda"), attention_parameters(1024, device="cuda")
    x.requires_grad_(way == "grad")
    errors = {}
    with matmul_tf32(flag):
        for precision in ("ieee", "tf32"):
            if way == "function in inference mode":
                with torch.inference_mode():
                    y = fused_attention(x, *parameters, 16, precision=precision)
            else:
                with torch.set_grad_enabled(way == "grad"):
                    y = OP(x, *parameters, 16, precision=precision)
            assert torch.backends.cuda.matmul.allow_tf32 == flag
            errors[precision] = [rms_error(y, attention(x.detach(), *parameters, 16))]
            if way == "grad":
                (grad,) = torch.autograd.grad(y.square().sum(), x)
                exact = x.detach().double().requires_grad_()
                wide = [p.double() for p in parameters]
                (wanted,) = torch.autograd.grad(attention(exact, *wide, 16).square().sum(), exact)
                errors[precision].append(rms_error(grad, wanted))
    for ieee, tf32 in zip(errors["ieee"], errors["tf32"], strict=True):
        assert ieee * 30 < tf32


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_samples_than_a_grid_is_high(dtype: torch.dtype) -> None:
    batch = 65535 + 40
    x = random_tensor(batch, 4, 16, dtype=dtype, device="cuda")
    parameters = attention_parameters(16, dtype, "cuda")
    mask = random_mask(batch, 4, "some", "cuda")
    for hidden in (None, mask):
        _compare(x, *parameters, 2, None, False, hidden, ulps=_ulps(dtype))
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's; its cuDNN kernel fails
            _check_gradients(x, *parameters, 2, None, False, hidden)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("biases", ["none", "first", "second", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "some", "dead"])
def test_gradcheck(mask: str | None, is_causal: bool, biases: str, version: str, device: str) -> None:
    layout = "transposed" if is_causal else "contiguous"
    x = random_tensor(2, 5, 6, dtype=torch.float64, device=device, layout=layout).requires_grad_()
    parameters = [
        None if p is None else p.requires_grad_()
        for p in attention_parameters(6, torch.float64, device, biases, layout)
    ]
    hidden = None if mask is None else random_mask(2, 5, mask, device)

    def function(x: Tensor, *parameters: Any) -> Tensor:
        return VERSIONS[version](x, *parameters, 2, 0.7, is_causal, hidden)

    assert torch.autograd.gradcheck(function, (x, *parameters), nondet_tol=0.0)


def _gradients(function: Any, inputs: list[Tensor], rest: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    function(*leaves, *rest).backward(grad)
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


def _check_gradients(*args: Any, **limits: Any) -> None:
    """Input, two weights and their biases, then the rest of the arguments."""
    inputs, rest = list(args[:5]), args[5:]
    dtype, device = inputs[0].dtype, inputs[0].device.type
    grad = random_tensor(*inputs[0].shape, dtype=dtype, device=device)
    for count in (1, 3):
        poison(count * grad.numel(), dtype, device)
    results = _gradients(OP, inputs, rest, grad)
    yardsticks = _gradients(torch_attention, inputs, rest, grad)
    references = _gradients(attention, [t.double() for t in inputs], rest, grad.double())
    for leaf, result, yardstick, reference in zip(inputs, results, yardsticks, references, strict=True):
        assert result.dtype == leaf.dtype and result.shape == leaf.shape
        assert_as_accurate(result, yardstick, reference, **{"ulps": _ulps(dtype), **limits})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "some", "left"])
@pytest.mark.parametrize(
    ("batch", "length", "embed", "heads"), [(3, 40, 48, 4), (2, 77, 39, 3), (1, 200, 256, 1)], ids=str
)
def test_gradients_are_as_accurate_as_pytorchs(
    batch: int,
    length: int,
    embed: int,
    heads: int,
    mask: str | None,
    is_causal: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    x = random_tensor(batch, length, embed, dtype=dtype, device=device)
    hidden = None if mask is None else random_mask(batch, length, mask, device)
    _check_gradients(x, *attention_parameters(embed, dtype, device), heads, None, is_causal, hidden)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "embed", "heads"), [(8, 1024, 1024, 16), (1, 2048, 512, 2), (3, 777, 300, 5)]
)
def test_gradients_of_long_sequences(
    batch: int, length: int, embed: int, heads: int, is_causal: bool, dtype: torch.dtype
) -> None:
    x = random_tensor(batch, length, embed, dtype=dtype, device="cuda")
    _check_gradients(x, *attention_parameters(embed, dtype, "cuda"), heads, None, is_causal)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_only_where_asked(device: str) -> None:
    """And none of the others' products is computed."""
    for wanted in range(5):
        given = [random_tensor(2, 6, 8, device=device), *attention_parameters(8, device=device)]
        given[wanted].requires_grad_()
        OP(*given, 2).square().sum().backward()
        assert [i for i, t in enumerate(given) if t.grad is not None] == [wanted]
        exact = [t.detach().double().requires_grad_(i == wanted) for i, t in enumerate(given)]
        attention(*exact, 2).square().sum().backward()
        right = exact[wanted].grad
        atol = 1e-5 * max(1.0, right.abs().max().item())
        torch.testing.assert_close(given[wanted].grad.double(), right, rtol=1e-4, atol=atol)
    x = random_tensor(2, 6, 8, device=device)
    w, b, ow, ob = attention_parameters(8, device=device)
    _, *kept = FORWARD(x, w, b, ow, ob, 2, None, False, None, "ieee", 0)
    for mask in range(32):
        needs = [bool(mask >> i & 1) for i in range(5)]
        gradients = BACKWARD(torch.ones_like(x), x, *kept, w, ow, 2, None, False, None, "ieee", *needs)
        sizes = [x.shape, w.shape, b.shape, ow.shape, ob.shape]
        assert [g.shape for g in gradients] == [
            s if n else torch.Size([0]) for s, n in zip(sizes, needs, strict=True)
        ]


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_and_non_contiguous_gradients(device: str) -> None:
    inputs = [random_tensor(2, 6, 8, device=device), *attention_parameters(8, device=device)]
    for grad in (
        torch.ones((), device=device).expand(2, 6, 8),
        *(random_tensor(2, 6, 8, device=device, layout=layout) for layout in (*MATRIX_LAYOUTS, "rows")),
    ):
        ours = _gradients(OP, inputs, (2,), grad)
        exact = _gradients(attention, [t.double() for t in inputs], (2,), grad.double())
        for a, b in zip(ours, exact, strict=True):
            assert max_error(a, b.cpu()) < 2e-5


def test_what_is_kept_for_the_backward() -> None:
    """The input, two weights, QKV, the heads' results and a number for each head and token; no scores."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x = random_tensor(2, 50, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        OP(x, *attention_parameters(8), 2)
    assert sorted(kept) == sorted([(2, 50, 8), (24, 8), (8, 8), (2, 50, 24), (2, 50, 8), (2, 2, 50)])


def test_a_parameter_changed_before_the_backward_is_noticed() -> None:
    x, parameters = random_tensor(2, 6, 8).requires_grad_(), attention_parameters(8)
    y = OP(x, *parameters, 2)
    parameters[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", VERSIONS)
def test_double_backward_says_that_it_is_not_supported(version: str, device: str) -> None:
    """Also where a part of the loss does not need it: a gradient penalty must not vanish without a word."""
    op = VERSIONS[version]
    message = f"fused_attention{'' if version == 'auto' else '_' + version}: double backward is not supported"
    x, parameters = (
        random_tensor(2, 6, 8, device=device).requires_grad_(),
        attention_parameters(8, device=device),
    )
    (grad,) = torch.autograd.grad(op(x, *parameters, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(op(x, *parameters, 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        (x.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_on_every_call(masked: bool, dtype: torch.dtype, device: str) -> None:
    for length, heads in ((130, 4), (1100, 1)):
        x = random_tensor(4, length, 64, dtype=dtype, device=device)
        mask = random_mask(4, length, "some", device) if masked else None
        inputs, rest = [x, *attention_parameters(64, dtype, device)], (heads, None, False, mask)
        first, gradients = OP(*inputs, *rest), _gradients(OP, inputs, rest, x)
        assert torch.equal(FORWARD(*inputs, *rest, "ieee", 0)[0], first)
        for _ in range(3):
            poison(x.numel(), x.dtype, device)
            assert torch.equal(OP(*inputs, *rest), first)
            again = _gradients(OP, inputs, rest, x)
            assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
