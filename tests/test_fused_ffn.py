"""``fused_ffn``: accuracy, layouts, gradients, registration, errors.

Its activations alone, over their whole range: test_fused_ffn_activations.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, seed
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import styleforge
from _reference import (
    DEVICES,
    FFN_ACTIVATIONS,
    FLOATS,
    MATRIX_LAYOUTS,
    assert_as_accurate,
    assert_as_accurate_together,
    ffn,
    matmul_tf32,
    max_error,
    poison,
    random_configurations,
    random_tensor,
    rms,
    rms_error,
    torch_ffn,
)
from styleforge.ops import fused_ffn

OP = torch.ops.styleforge.fused_ffn
FORWARD = torch.ops.styleforge._fused_ffn_forward
BACKWARD = torch.ops.styleforge._fused_ffn_backward
# Random configurations, over all dtypes and parts (which pytest-xdist can spread).
PARTS = 2
EASY = random_configurations(PARTS * len(FLOATS))
HALF = (torch.float16, torch.bfloat16)


def _parameters(
    embed: int,
    hidden: int,
    out: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    biases: str = "both",
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """fc1_weight, fc1_bias, fc2_weight, fc2_bias, of the size that keeps the variance."""
    given: dict[str, Any] = dict(dtype=dtype, device=device, layout=layout)
    return (
        random_tensor(hidden, embed, scale=max(embed, 1) ** -0.5, **given),
        random_tensor(hidden, scale=0.5, **given) if biases in ("first", "both") else None,
        random_tensor(out, hidden, scale=max(hidden, 1) ** -0.5, **given),
        random_tensor(out, scale=0.5, **given) if biases in ("second", "both") else None,
    )


def _compare(*args: Any, precision: str = "ieee", **limits: float) -> Tensor:
    """Runs the operator over poisoned memory and holds it against float64 and PyTorch. Returns its result."""
    input = args[0]
    reference = ffn(*args)
    with matmul_tf32(precision == "tf32"):
        yardstick = torch_ffn(*args)
    for count in (reference.numel(), input[..., :1].numel() * args[1].shape[0]):
        poison(count, input.dtype, input.device.type)
    result = OP(*args, precision=precision)
    assert result.dtype == input.dtype and result.device == input.device
    assert result.is_contiguous()
    if input.dtype == torch.float64:
        limits = {"ulps": 8.0, **limits}  # the reference is rounded as well
    assert_as_accurate(result, yardstick, reference, **limits)
    return result


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
        leading=st.lists(st.integers(1, 9), max_size=3),
        embed=st.integers(1, 90),
        hidden=st.integers(1, 140),
        out=st.integers(1, 90),
        biases=st.sampled_from(("none", "first", "second", "both")),
        layout=st.sampled_from((*MATRIX_LAYOUTS, "rows")),
        weight_layout=st.sampled_from(MATRIX_LAYOUTS),
        residual=st.sampled_from((None, *MATRIX_LAYOUTS, "rows")),
        activation=st.sampled_from(FFN_ACTIVATIONS),
        spread=st.sampled_from((1.0, 0.05, 5.0)),
        data_seed=st.integers(0, 2**31 - 1),
    )
    def check(
        leading: list[int],
        embed: int,
        hidden: int,
        out: int,
        biases: str,
        layout: str,
        weight_layout: str,
        residual: str | None,
        activation: str,
        spread: float,
        data_seed: int,
    ) -> None:
        torch.manual_seed(data_seed)
        x = random_tensor(*leading, embed, dtype=dtype, device=device, layout=layout, scale=spread)
        parameters = _parameters(embed, hidden, out, dtype, device, biases, weight_layout)
        r = random_tensor(*leading, out, dtype=dtype, device=device, layout=residual) if residual else None
        args = (x, *parameters, activation, r)
        reference, yardstick = ffn(*args), torch_ffn(*args)
        # Terms that cancel leave their rounding behind: their size is what counts on a few elements.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
        parts = [t for t in (fc2_bias, r) if t is not None]
        scale = rms(ffn(x, fc1_weight, fc1_bias, fc2_weight, None, activation)) + sum(rms(t) for t in parts)
        scale = max(scale, rms(ffn(x.abs(), fc1_weight.abs(), None, fc2_weight.abs(), None, "relu")) / 4)
        poison(reference.numel(), dtype, device)
        result = OP(*args)
        assert result.dtype == dtype and result.is_contiguous()
        # On a few elements the ratio is chance: what a sum of so many terms, and in half precision each
        # stage, loses is allowed for. All of them together, below, have no such allowance.
        ulps = None
        if dtype == torch.float64:
            ulps = 8.0
        elif dtype == torch.float32:
            ulps = max(2.0, (embed + hidden) ** 0.5 / 2)
        elif result.numel() < 64:
            ulps = 1.0
        assert_as_accurate(result, yardstick, reference, scale=scale, ulps=ulps)
        size = rms(reference)
        if size > 0 and dtype != torch.float64:  # in float64 PyTorch's error against itself is often none
            errors.append((rms_error(result, reference) / size, rms_error(yardstick, reference) / size))

    check()
    if len(errors) >= 20:
        assert_as_accurate_together(errors, dtype, factor=1.2)


# rows, embed, hidden, out
SIZES = {
    "vectors": (96, 64, 256, 64),
    "odd": (37, 65, 129, 33),
    "one row": (1, 128, 512, 128),
    "narrow": (50, 3, 5, 2),
    "one column": (20, 1, 1, 1),
    "a few rows of many": (5, 200, 1000, 100),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, activation: str, dtype: torch.dtype, device: str) -> None:
    rows, embed, hidden, out = SIZES[size]
    few = 4.0 if rows * out < 100 else None  # too few elements for a ratio of errors
    for biases in ("none", "both"):
        for residual in (False, True):
            x = random_tensor(rows, embed, dtype=dtype, device=device)
            parameters = _parameters(embed, hidden, out, dtype, device, biases)
            r = random_tensor(rows, out, dtype=dtype, device=device) if residual else None
            limits = {"ulps": few if dtype not in HALF else 1.0} if few else {}
            _compare(x, *parameters, activation, r, **limits)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    "sizes",
    [
        (8, 1024, 512, 2048),
        (4, 2048, 768, 3072),
        (2, 1000, 1024, 4096),
        (1, 256, 128, 512),
        (3, 77, 100, 401),
    ],
    ids=str,
)
def test_large_networks(sizes: tuple[int, int, int, int], precision: str, dtype: torch.dtype) -> None:
    batch, length, embed, hidden = sizes
    x = random_tensor(batch, length, embed, dtype=dtype, device="cuda")
    r = random_tensor(batch, length, embed, dtype=dtype, device="cuda")
    parameters = _parameters(embed, hidden, embed, dtype, "cuda")
    for residual in (None, r):
        _compare(x, *parameters, "gelu", residual, precision=precision)
        assert styleforge.last_path().startswith("ffn:cuda:")


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [*MATRIX_LAYOUTS, "rows"])
@pytest.mark.parametrize("leading", [(), (7,), (3, 4), (2, 3, 2, 2), (1, 5), (5, 1)], ids=str)
def test_any_leading_dimensions_and_strides(leading: tuple[int, ...], layout: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given: dict[str, Any] = dict(dtype=dtype, device=device, layout=layout)
        x, r = random_tensor(*leading, 12, **given), random_tensor(*leading, 9, **given)
        for residual in (None, r):
            for biases in ("none", "both"):
                parameters = _parameters(12, 20, 9, dtype, device, biases, layout.replace("rows", "sliced"))
                result = _compare(x, *parameters, "silu", residual, ulps=4.0 if dtype.itemsize > 2 else 1.0)
                assert result.shape == (*leading, 9)
    mode = FakeTensorMode()
    fakes = [None if t is None else mode.from_tensor(t) for t in (x, *parameters, r)]
    fake = OP(*fakes[:5], "gelu", fakes[5])
    assert fake.shape == result.shape and fake.stride() == result.stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("leading", "embed", "hidden", "out"),
    [
        ((0,), 4, 6, 5),
        ((2, 0, 3), 4, 6, 5),
        ((3,), 0, 6, 5),
        ((3,), 4, 0, 5),
        ((3,), 4, 6, 0),
        ((0,), 0, 0, 0),
    ],
    ids=str,
)
def test_empty_dimensions(
    leading: tuple[int, ...], embed: int, hidden: int, out: int, dtype: torch.dtype, device: str
) -> None:
    """No rows give no rows; no embedding and no hidden width leave the biases."""
    x = random_tensor(*leading, embed, dtype=dtype, device=device)
    r = random_tensor(*leading, out, dtype=dtype, device=device)
    for biases in ("none", "first", "second", "both"):
        for residual in (None, r):
            parameters = _parameters(embed, hidden, out, dtype, device, biases)
            args = [x, *parameters, "gelu", residual]
            poison(r.numel(), dtype, device)
            result = OP(*args)
            assert result.shape == (*leading, out) and result.is_contiguous()
            assert max_error(result, ffn(*args).cpu()) <= 4 * torch.finfo(dtype).eps * 4
            leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in args]
            OP(*leaves).sum().backward()
            exact = [t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for t in args]
            ffn(*exact).sum().backward()
            for ours, theirs in zip(leaves, exact, strict=True):
                if isinstance(ours, Tensor):
                    assert ours.grad is not None and ours.grad.shape == ours.shape
                    wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
                    assert max_error(ours.grad, wanted.cpu()) <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device: str) -> None:
    given = [
        random_tensor(4, 8, device=device),
        *_parameters(8, 16, 8, device=device),
        random_tensor(4, 8, device=device),
    ]
    before = [t.clone() for t in given if t is not None]
    OP(*given[:5], "gelu", given[5])
    leaves = [t.requires_grad_() for t in given if t is not None]
    OP(*leaves[:5], "gelu", leaves[5]).sum().backward()
    for now, then in zip(leaves, before, strict=True):
        assert torch.equal(now, then)


def test_python_function_is_the_operator() -> None:
    x, r, parameters = random_tensor(3, 8), random_tensor(3, 6), _parameters(8, 16, 6)
    expected = OP(x, *parameters, "silu", r)
    assert torch.equal(fused_ffn(x, *parameters, activation="silu", residual=r, precision="tf32"), expected)
    assert torch.equal(fused_ffn(x, *parameters), OP(x, *parameters))
    compiled = torch.compile(
        lambda x: fused_ffn(x, *parameters, precision="tf32"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), OP(x, *parameters))


def test_last_path() -> None:
    x, parameters = random_tensor(3, 8).requires_grad_(), _parameters(8, 16, 6)
    y = OP(x, *parameters)
    assert styleforge.last_path() == "ffn:cpu:aten_matmul"
    y.sum().backward()
    assert styleforge.last_path() == "ffn_backward:cpu:aten_matmul"


@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
@pytest.mark.parametrize("biases", ["both", "first", "second", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_hidden_units_in_rows(activation: str, biases: str, residual: bool) -> None:
    """The sizes of which the CPU's first product is written transposed, and their neighbours."""
    parameters = _parameters(512, 1030, 77, biases=biases)
    for rows, path in ((64, ":transposed"), (320, ":transposed"), (63, ""), (576, "")):
        r = random_tensor(2, rows // 2, 77) if residual and rows % 2 == 0 else None
        x = random_tensor(2, rows // 2, 512) if rows % 2 == 0 else random_tensor(rows, 512)
        _compare(x, *parameters, activation, r)
        assert styleforge.last_path() == "ffn:cpu:aten_matmul" + path


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_hidden_units_in_rows_of_any_layout(layout: str) -> None:
    parameters = _parameters(512, 1024, 64, layout=layout)
    _compare(
        random_tensor(128, 512, layout=layout), *parameters, "gelu", random_tensor(128, 64, layout=layout)
    )
    assert styleforge.last_path() == "ffn:cpu:aten_matmul:transposed"
    with torch.enable_grad():
        OP(random_tensor(128, 512).requires_grad_(), *parameters)  # hidden units that are kept lie as ever
    assert styleforge.last_path() == "ffn:cpu:aten_matmul"


# --- precision on CUDA ----------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("way", ["no_grad", "grad", "function in inference mode"])
def test_precision_counts_and_not_the_flag(way: str, flag: bool) -> None:
    x = random_tensor(512, 1024, device="cuda")
    parameters = _parameters(1024, 2048, 1024, device="cuda")
    x.requires_grad_(way == "grad")
    errors = {}
    with matmul_tf32(flag):
        for precision in ("ieee", "tf32"):
            if way == "function in inference mode":
                with torch.inference_mode():
                    y = fused_ffn(x, *parameters, precision=precision)
            else:
                with torch.set_grad_enabled(way == "grad"):
                    y = OP(x, *parameters, precision=precision)
            assert torch.backends.cuda.matmul.allow_tf32 == flag
            errors[precision] = [rms_error(y, ffn(x.detach(), *parameters))]
            if way == "grad":
                (grad,) = torch.autograd.grad(y.square().sum(), x)
                exact = x.detach().double().requires_grad_()
                (wanted,) = torch.autograd.grad(ffn(exact, *parameters).square().sum(), exact)
                errors[precision].append(rms_error(grad, wanted))
    for ieee, tf32 in zip(errors["ieee"], errors["tf32"], strict=True):
        assert ieee * 30 < tf32


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
@pytest.mark.parametrize("biases", ["none", "first", "second", "both"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(with_residual: bool, biases: str, activation: str, device: str) -> None:
    for layout in ("contiguous", "transposed"):
        given: dict[str, Any] = dict(dtype=torch.float64, device=device, layout=layout)
        x = random_tensor(2, 3, 5, **given).requires_grad_()
        parameters = [
            None if p is None else p.requires_grad_()
            for p in _parameters(5, 7, 4, torch.float64, device, biases, layout)
        ]
        r = random_tensor(2, 3, 4, **given).requires_grad_() if with_residual else None

        def function(x: Tensor, *rest: Any, activation: str = activation) -> Tensor:
            return OP(x, *rest[:4], activation, rest[4])

        assert torch.autograd.gradcheck(function, (x, *parameters, r), nondet_tol=0.0)


def _gradients(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    function(*leaves).backward(grad)
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


def _check_gradients(
    rows: tuple[int, ...], embed: int, hidden: int, activation: str, dtype: torch.dtype, device: str
) -> None:
    x = random_tensor(*rows, embed, dtype=dtype, device=device)
    parameters = _parameters(embed, hidden, embed, dtype, device)
    r = random_tensor(*rows, embed, dtype=dtype, device=device)
    grad = random_tensor(*rows, embed, dtype=dtype, device=device)
    inputs = [x, *(p for p in parameters if p is not None), r]

    def call(function: Any) -> Any:
        return lambda x, w1, b1, w2, b2, r: function(x, w1, b1, w2, b2, activation, r)

    poison(math.prod(rows) * hidden, dtype, device)
    results = _gradients(call(OP), inputs, grad)
    yardsticks = _gradients(call(torch_ffn), inputs, grad)
    references = _gradients(call(ffn), [t.double() for t in inputs], grad.double())
    for leaf, result, yardstick, reference in zip(inputs, results, yardsticks, references, strict=True):
        assert result.dtype == leaf.dtype and result.shape == leaf.shape
        assert_as_accurate(result, yardstick, reference, ulps=2.0 if dtype not in HALF else 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("rows", "embed", "hidden"), [((40, 3), 48, 160), ((63,), 37, 111)], ids=str)
def test_gradients_are_as_accurate_as_pytorchs(
    rows: tuple[int, ...], embed: int, hidden: int, activation: str, dtype: torch.dtype, device: str
) -> None:
    _check_gradients(rows, embed, hidden, activation, dtype, device)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("rows", "embed", "hidden"), [((8, 512), 512, 2048), ((3, 333), 300, 1001)], ids=str)
def test_gradients_of_large_networks(
    rows: tuple[int, ...], embed: int, hidden: int, dtype: torch.dtype
) -> None:
    _check_gradients(rows, embed, hidden, "gelu", dtype, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradients_of_relu(dtype: torch.dtype, device: str) -> None:
    """Values on the grid of small integers: everything is exact, the kink at 0 included."""
    x = torch.randint(-2, 3, (6, 5, 8), device=device).to(dtype)
    w1, w2 = (torch.randint(-1, 2, s, device=device).to(dtype) for s in ((12, 8), (4, 12)))
    b1, b2 = (torch.randint(-1, 2, s, device=device).to(dtype) for s in ((12,), (4,)))
    grad = torch.randint(-1, 2, (6, 5, 4), device=device).to(dtype)
    inputs = [x, w1, b1, w2, b2]
    ours = _gradients(lambda *a: OP(*a, "relu"), inputs, grad)
    theirs = _gradients(lambda *a: torch_ffn(*a, "relu"), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_only_where_asked(device: str) -> None:
    """And none of the others' products is computed."""
    for wanted in range(6):
        inputs = [random_tensor(4, 8, device=device), *_parameters(8, 16, 6, device=device)]
        inputs.append(random_tensor(4, 6, device=device))
        given = [t for t in inputs if t is not None]
        given[wanted].requires_grad_()
        OP(*given[:5], "gelu", given[5]).square().sum().backward()
        assert [i for i, t in enumerate(given) if t.grad is not None] == [wanted]
        exact = [t.detach().double().requires_grad_(i == wanted) for i, t in enumerate(given)]
        ffn(*exact[:5], "gelu", exact[5]).square().sum().backward()
        torch.testing.assert_close(given[wanted].grad.double(), exact[wanted].grad, rtol=1e-4, atol=1e-5)
    x = random_tensor(4, 8, device=device)
    w1, b1, w2, _ = _parameters(8, 16, 6, device=device)
    _, hidden = FORWARD(x, w1, b1, w2, None, "gelu", None, "ieee")
    for mask in range(32):
        needs = [bool(mask >> i & 1) for i in range(5)]
        gradients = BACKWARD(torch.ones(4, 6, device=device), x, hidden, w1, b1, w2, "gelu", "ieee", *needs)
        sizes = [x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]]
        assert [g.shape for g in gradients] == [
            s if n else torch.Size([0]) for s, n in zip(sizes, needs, strict=True)
        ]


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_and_non_contiguous_gradients(device: str) -> None:
    x, parameters = random_tensor(4, 3, 8, device=device), _parameters(8, 16, 6, device=device)
    for grad in (
        torch.ones((), device=device).expand(4, 3, 6),
        *(random_tensor(4, 3, 6, device=device, layout=layout) for layout in (*MATRIX_LAYOUTS, "rows")),
    ):
        inputs = [x, *(p for p in parameters if p is not None)]
        ours = _gradients(lambda *a: OP(*a), inputs, grad)
        exact = _gradients(lambda *a: ffn(*a), [t.double() for t in inputs], grad.double())
        for a, b in zip(ours, exact, strict=True):
            assert max_error(a, b.cpu()) < 2e-5


def test_what_is_kept_for_the_backward() -> None:
    """The input, the parameters and one tensor of the hidden width: PyTorch's layers keep two."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x, parameters = (
        random_tensor(10, 8).requires_grad_(),
        [p.requires_grad_() for p in _parameters(8, 16, 6) if p is not None],
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        OP(x, *parameters)
    assert sorted(kept) == sorted([(10, 8), (10, 16), (16, 8), (16,), (6, 16)])


def test_a_parameter_changed_before_the_backward_is_noticed() -> None:
    x, parameters = random_tensor(4, 8).requires_grad_(), _parameters(8, 16, 6)
    y = OP(x, *parameters)
    assert parameters[1] is not None
    parameters[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_says_that_it_is_not_supported(device: str) -> None:
    """Also where a part of the loss does not need it: a gradient penalty must not vanish without a word."""
    x, parameters = random_tensor(3, 8, device=device).requires_grad_(), _parameters(8, 16, 6, device=device)
    (grad,) = torch.autograd.grad(OP(x, *parameters).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_ffn: double backward is not supported"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(OP(x, *parameters).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_ffn: double backward is not supported"):
        (x.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_on_every_call(device: str) -> None:
    x, parameters = random_tensor(300, 64, device=device), _parameters(64, 256, 64, device=device)
    first = OP(x, *parameters, "gelu", x)
    kept, _ = FORWARD(x, *parameters, "gelu", x, "ieee")
    for _ in range(3):
        poison(x.numel(), x.dtype, device)
        assert torch.equal(OP(x, *parameters, "gelu", x), first)
    assert torch.equal(kept, first)


# --- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout: str, requires_grad: bool, device: str) -> None:
    """PyTorch's own checks: schema, autograd registration, fake, AOT dispatch, static and dynamic."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.requires_grad_(requires_grad)

    x, r = (leaf(random_tensor(2, 3, n, device=device, layout=layout)) for n in (5, 4))
    parameters = [leaf(p) for p in _parameters(5, 7, 4, device=device, layout=layout)]
    without = [leaf(p) for p in _parameters(5, 7, 4, device=device, biases="none")]
    single = leaf(random_tensor(5, device=device))
    for args in ((x, *parameters, "gelu", r), (x, *without, "silu"), (single, *parameters)):
        for dynamic in (False, True):
            utils = ("test_schema", "test_autograd_registration", "test_faketensor")
            utils += ("test_aot_dispatch_dynamic",) if dynamic else ("test_aot_dispatch_static",)
            torch.library.opcheck(OP.default, args, test_utils=utils)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck_of_the_pair_underneath(layout: str, dtype: torch.dtype, device: str) -> None:
    given: dict[str, Any] = dict(dtype=dtype, device=device, layout=layout)
    x, r, grad = (
        random_tensor(2, 3, 5, **given),
        random_tensor(2, 3, 4, **given),
        random_tensor(2, 3, 4, **given),
    )
    for biases, residual in (("none", None), ("both", r)):
        w1, b1, w2, b2 = _parameters(5, 7, 4, dtype, device, biases)
        forward = (x, w1, b1, w2, b2, "gelu", residual, "ieee")
        torch.library.opcheck(FORWARD.default, forward)
        _, hidden = FORWARD(*forward)
        for needs in ((True,) * 5, (False, True, False, False, True), (False, False, False, True, False)):
            torch.library.opcheck(BACKWARD.default, (grad, x, hidden, w1, b1, w2, "gelu", "ieee", *needs))


# --- CUDA without the CUDA library -----------------------------------------------------------------


@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
@pytest.mark.parametrize("biases", ["none", "both"])
@pytest.mark.parametrize("leading", [(3, 2), (), (0,)], ids=str)
def test_the_composite_is_the_operator(leading: tuple[int, ...], biases: str, activation: str) -> None:
    """Its kernels, called here with CPU tensors: results, what is kept, gradients and their shapes."""
    from styleforge.ops import _fallback

    x, r = random_tensor(*leading, 5, layout="sliced"), random_tensor(*leading, 4)
    w1, b1, w2, b2 = _parameters(5, 7, 4, biases=biases)
    forward = (x, w1, b1, w2, b2, activation, r, "ieee")
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_fallback._ffn(*forward), OP(*forward), **close)
    output, hidden = FORWARD(*forward)
    for ours, theirs in zip(_fallback._ffn_forward(*forward), (output, hidden), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        assert ours.stride() == theirs.stride()
    grad = random_tensor(*leading, 4, layout="rows") if leading else random_tensor(4)
    for needs in ((True,) * 5, (True, False, True, False, False), (False, True, False, True, True)):
        backward = (grad, x, hidden, w1, b1, w2, activation, "ieee", *needs)
        for ours, theirs in zip(_fallback._ffn_backward(*backward), BACKWARD(*backward), strict=True):
            torch.testing.assert_close(ours, theirs, **close)
            assert ours.stride() == theirs.stride()


# --- errors ---------------------------------------------------------------------------------------


def _x(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes, dtype=dtype)


def _with(**changed: Any) -> dict[str, Any]:
    """A call that is right, but for what is given."""
    call = {
        "input": _x(2, 3, 5),
        "fc1_weight": _x(7, 5),
        "fc1_bias": _x(7),
        "fc2_weight": _x(4, 7),
        "fc2_bias": _x(4),
    }
    return {**call, **changed}


def _as_half(**changed: Any) -> dict[str, Any]:
    return {**{k: v.half() for k, v in _with().items()}, **changed}


# arguments, message after "fused_ffn: "
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": (_with(input=torch.tensor(1.0)), "input must have shape [..., embed_dim], got []"),
    "integer": (
        _with(input=_x(2, 5, dtype=torch.int32)),
        "input must be float32, float16, bfloat16 or float64, got int32",
    ),
    "complex": (
        _with(input=_x(2, 5, dtype=torch.complex64)),
        "input must be float32, float16, bfloat16 or float64, got complex64",
    ),
    "activation": (
        _with(activation="tanh"),
        'activation must be one of gelu, gelu_tanh, relu, silu, got "tanh"',
    ),
    "precision": (_with(precision="high"), 'precision must be one of ieee, tf32, got "high"'),
    "fc1_weight width": (
        _with(fc1_weight=_x(7, 6)),
        "fc1_weight must have shape [hidden, 5], got [7, 6]",
    ),
    "fc1_weight rank": (_with(fc1_weight=_x(5)), "fc1_weight must have shape [hidden, 5], got [5]"),
    "fc1_weight dtype": (
        _with(fc1_weight=_x(7, 5, dtype=torch.float64)),
        "fc1_weight must have the dtype of input, float32, got float64",
    ),
    "fc1_bias shape": (_with(fc1_bias=_x(5)), "fc1_bias must have shape [7], got [5]"),
    "fc1_bias rank": (_with(fc1_bias=_x(1, 7)), "fc1_bias must have shape [7], got [1, 7]"),
    "fc1_bias dtype": (
        _as_half(fc1_bias=_x(7)),
        "fc1_bias must have the dtype of input, float16, got float32",
    ),
    "fc2_weight width": (_with(fc2_weight=_x(4, 6)), "fc2_weight must have shape [out, 7], got [4, 6]"),
    "fc2_weight rank": (_with(fc2_weight=_x(4, 7, 1)), "fc2_weight must have shape [out, 7], got [4, 7, 1]"),
    "fc2_weight dtype": (
        _as_half(fc2_weight=_x(4, 7, dtype=torch.bfloat16)),
        "fc2_weight must have the dtype of input, float16, got bfloat16",
    ),
    "fc2_bias shape": (_with(fc2_bias=_x(7)), "fc2_bias must have shape [4], got [7]"),
    "fc2_bias dtype": (
        _with(fc2_bias=_x(4, dtype=torch.int64)),
        "fc2_bias must have the dtype of input, float32, got int64",
    ),
    "residual shape": (
        _with(residual=_x(2, 3, 5)),
        "residual must have shape [2, 3, 4], got [2, 3, 5]",
    ),
    "residual broadcast": (_with(residual=_x(3, 4)), "residual must have shape [2, 3, 4], got [3, 4]"),
    "residual dtype": (
        _as_half(residual=_x(2, 3, 4)),
        "residual must have the dtype of input, float16, got float32",
    ),
}


def _to(value: Any, device: str, grad: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device)
    return moved.requires_grad_() if grad and moved.dtype.is_floating_point else moved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["plain", "grad", "fake"])
@pytest.mark.parametrize("case", ERRORS)
def test_each_error_is_one_line_that_names_the_argument(case: str, way: str, device: str) -> None:
    kwargs, message = ERRORS[case]
    kwargs = {k: _to(v, device, way == "grad") for k, v in kwargs.items()}
    if way == "fake":
        mode = FakeTensorMode()
        kwargs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with pytest.raises(RuntimeError) as caught:
        OP(**kwargs)
    assert str(caught.value).splitlines()[0] == f"fused_ffn: {message}"


# what replaces an argument of the backward, message after "_fused_ffn_backward: "
MATRICES = "input, fc1_weight and fc2_weight must be [..., embed_dim] and matrices, got "
BACKWARD_ERRORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no rank": ({"input": torch.tensor(1.0)}, f"{MATRICES}[], [7, 5] and [4, 7]"),
    "fc1_weight rank": ({"fc1_weight": _x(5)}, f"{MATRICES}[2, 3, 5], [5] and [4, 7]"),
    "fc1_weight width": ({"fc1_weight": _x(7, 6)}, "fc1_weight must have shape [7, 5], got [7, 6]"),
    "fc1_bias": ({"fc1_bias": _x(1)}, "fc1_bias must have shape [7], got [1]"),
    "fc2_weight": ({"fc2_weight": _x(4, 6)}, "fc2_weight must have shape [4, 7], got [4, 6]"),
    "fc2_weight dtype": (
        {"fc2_weight": _x(4, 7).double()},
        "fc2_weight must have the dtype of input, float32, got float64",
    ),
}


@pytest.mark.parametrize("case", BACKWARD_ERRORS)
def test_the_backward_checks_what_it_reads(case: str) -> None:
    changed, message = BACKWARD_ERRORS[case]
    call = {
        "grad_output": _x(2, 3, 4),
        "input": _x(2, 3, 5),
        "hidden": _x(2, 3, 7),
        "fc1_weight": _x(7, 5),
        "fc1_bias": _x(7),
        "fc2_weight": _x(4, 7),
        **changed,
    }
    with pytest.raises(RuntimeError) as caught:
        BACKWARD(*call.values(), "gelu", "ieee", *(True,) * 5)
    assert str(caught.value).splitlines()[0] == f"_fused_ffn_backward: {message}"


ARGUMENTS = ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "residual"]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_meta_tensor_beside_a_real_one_is_refused(argument: str) -> None:
    call = _with(residual=_x(2, 3, 4))
    call[argument] = call[argument].to("meta")
    with pytest.raises(RuntimeError, match=f"{argument} must be on the device of input, cpu, got"):
        OP(**call)


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("way", ["plain", "grad"])
def test_tensors_on_two_devices_are_refused(way: str, argument: str) -> None:
    for here, there, name, other in (("cuda", "cpu", "cuda:0", "cpu"), ("cpu", "cuda", "cpu", "cuda:0")):
        call = {k: v.to(here) for k, v in _with(residual=_x(2, 3, 4)).items()}
        call[argument] = call[argument].to(there)
        call["input"] = call["input"].requires_grad_(way == "grad")
        with pytest.raises(RuntimeError) as caught:
            OP(**call)
        expected = f"fused_ffn: {argument} must be on the device of input, {name}, got {other}"
        assert str(caught.value).splitlines()[0] == expected


@pytest.mark.cuda
def test_an_error_leaves_cuda_usable() -> None:
    x, parameters = random_tensor(3, 8, device="cuda"), _parameters(8, 16, 6, device="cuda")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            OP(x[:, :5], *parameters)
    torch.testing.assert_close(OP(x, *parameters), torch_ffn(x, *parameters))
