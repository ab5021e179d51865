"""``fused_attention``: what PyTorch's machinery sees of it, the composite, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import styleforge  # noqa: F401 (the operators)
from _reference import DEVICES, FLOATS, attention_parameters, random_mask, random_tensor, torch_attention

NAMES = ["fused_attention", "fused_attention_v1", "fused_attention_v2"]
OP = torch.ops.styleforge.fused_attention
FORWARD = torch.ops.styleforge._fused_attention_forward
BACKWARD = torch.ops.styleforge._fused_attention_backward
NEEDS = [(True,) * 5, (False, True, False, False, True), (False, False, False, True, False), (False,) * 5]


def _op(name: str) -> Any:
    return getattr(torch.ops.styleforge, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema(name: str) -> None:
    assert str(_op(name).default._schema) == (
        f"styleforge::{name}(Tensor input, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, "
        "Tensor? out_bias, int num_heads, float? scale=None, bool is_causal=False, "
        'Tensor? key_padding_mask=None, str precision="ieee") -> Tensor'
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, layout: str, requires_grad: bool, device: str) -> None:
    """PyTorch's own checks: schema, autograd registration, fake, AOT dispatch, static and dynamic."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.requires_grad_(requires_grad)

    x = leaf(random_tensor(2, 5, 12, device=device, layout=layout))
    parameters = [leaf(p) for p in attention_parameters(12, device=device, layout=layout)]
    without = [leaf(p) for p in attention_parameters(12, device=device, biases="none")]
    mask = random_mask(2, 5, "some", device)
    for args in (
        (x, *parameters, 3),
        (x, *without, 2, 0.3, True, mask),
        (x, *parameters, 4, None, False, mask),
    ):
        for dynamic in (False, True):
            utils = ("test_schema", "test_autograd_registration", "test_faketensor")
            utils += ("test_aot_dispatch_dynamic",) if dynamic else ("test_aot_dispatch_static",)
            torch.library.opcheck(_op(name).default, args, test_utils=utils)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck_of_the_pair_underneath(layout: str, dtype: torch.dtype, device: str) -> None:
    x, grad = (random_tensor(2, 5, 12, dtype=dtype, device=device, layout=layout) for _ in range(2))
    for biases, is_causal, mask, version in (("none", False, None, 0), ("both", True, "some", 2)):
        hidden = None if mask is None else random_mask(2, 5, mask, device)
        parameters = attention_parameters(12, dtype, device, biases)
        rest = (3, 0.4, is_causal, hidden, "ieee")
        torch.library.opcheck(FORWARD.default, (x, *parameters, *rest, version))
        _, *kept = FORWARD(x, *parameters, *rest, version)
        for needs in NEEDS:
            args = (grad, x, *kept, parameters[0], parameters[2], *rest, *needs)
            torch.library.opcheck(BACKWARD.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "rows"])
def test_fakes_have_the_strides(layout: str, device: str) -> None:
    for sizes in ((2, 7, 12), (1, 1, 12), (0, 7, 12), (3, 1, 12)):
        x = random_tensor(*sizes, device=device, layout=layout)
        args = (
            x,
            *attention_parameters(12, device=device),
            3,
            None,
            True,
            random_mask(*sizes[:2], device=device),
        )
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in args]
        result, fake = OP(*args), OP(*fakes)
        assert fake.shape == result.shape and fake.stride() == result.stride()
        for real, fake in zip(FORWARD(*args, "ieee", 1), FORWARD(*fakes, "ieee", 1), strict=True):
            assert fake.shape == real.shape and fake.stride() == real.stride() and fake.dtype == real.dtype


# --- CUDA without the CUDA library -----------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "some", "dead"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("biases", ["none", "both"])
@pytest.mark.parametrize("sizes", [(2, 9, 12), (1, 1, 12), (0, 3, 12)], ids=str)
def test_the_composite_is_the_operator(
    sizes: tuple[int, ...], biases: str, is_causal: bool, mask: str | None
) -> None:
    """Its kernels, called here with CPU tensors: results, what is kept, gradients and their shapes."""
    from styleforge.ops import _fallback

    x = random_tensor(*sizes, layout="sliced")
    hidden = random_mask(*sizes[:2], mask) if mask and sizes[0] else None
    parameters = attention_parameters(12, biases=biases)
    given = (x, *parameters, 3, 0.4, is_causal, hidden, "ieee")
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_fallback._attention(*given), OP(*given), **close)
    theirs, ours = FORWARD(*given, 0), _fallback._attention_forward(*given, 0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    for a, b in zip(ours[:3], theirs[:3], strict=True):  # the composite looks at no logsumexp
        torch.testing.assert_close(a, b, **close)
    grad = random_tensor(*sizes, layout="rows")
    for needs in NEEDS:
        rest = (parameters[0], parameters[2], *given[5:], *needs)
        expected = BACKWARD(grad, x, *theirs[1:], *rest)
        for a, b in zip(_fallback._attention_backward(grad, x, *ours[1:], *rest), expected, strict=True):
            torch.testing.assert_close(a, b, **close)
            assert a.stride() == b.stride()


# --- errors ---------------------------------------------------------------------------------------


def _x(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes, dtype=dtype)


def _with(**changed: Any) -> dict[str, Any]:
    """A call that is right, but for what is given."""
    call = {
        "input": _x(2, 5, 6),
        "qkv_weight": _x(18, 6),
        "qkv_bias": _x(18),
        "out_weight": _x(6, 6),
        "out_bias": _x(6),
        "num_heads": 3,
    }
    return {**call, **changed}


def _as_half(**changed: Any) -> dict[str, Any]:
    return {**{k: v.half() if isinstance(v, Tensor) else v for k, v in _with().items()}, **changed}


# arguments, message after "fused_attention: "
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 2": (
        _with(input=_x(5, 6)),
        "input must have shape [N, S, embed_dim], embed_dim > 0, got [5, 6]",
    ),
    "rank 4": (
        _with(input=_x(1, 2, 5, 6)),
        "input must have shape [N, S, embed_dim], embed_dim > 0, got [1, 2, 5, 6]",
    ),
    "no width": (
        _with(input=_x(2, 5, 0)),
        "input must have shape [N, S, embed_dim], embed_dim > 0, got [2, 5, 0]",
    ),
    "integer": (
        _with(input=_x(2, 5, 6, dtype=torch.int32)),
        "input must be float32, float16, bfloat16 or float64, got int32",
    ),
    "complex": (
        _with(input=_x(2, 5, 6, dtype=torch.complex64)),
        "input must be float32, float16, bfloat16 or float64, got complex64",
    ),
    "precision": (_with(precision="high"), 'precision must be one of ieee, tf32, got "high"'),
    "heads that do not divide": (_with(num_heads=4), "num_heads must divide embed_dim, 6, got 4"),
    "no heads": (_with(num_heads=0), "num_heads must divide embed_dim, 6, got 0"),
    "negative heads": (_with(num_heads=-2), "num_heads must divide embed_dim, 6, got -2"),
    "wide heads": (
        _with(input=_x(2, 5, 514), num_heads=2),
        "embed_dim / num_heads must be at most 256, got 514 / 2 = 257; take more heads",
    ),
    "qkv_weight shape": (_with(qkv_weight=_x(6, 6)), "qkv_weight must have shape [18, 6], got [6, 6]"),
    "qkv_weight transposed": (_with(qkv_weight=_x(6, 18)), "qkv_weight must have shape [18, 6], got [6, 18]"),
    "qkv_weight rank": (_with(qkv_weight=_x(18)), "qkv_weight must have shape [18, 6], got [18]"),
    "qkv_weight dtype": (
        _with(qkv_weight=_x(18, 6, dtype=torch.float64)),
        "qkv_weight must have the dtype of input, float32, got float64",
    ),
    "qkv_bias shape": (_with(qkv_bias=_x(6)), "qkv_bias must have shape [18], got [6]"),
    "qkv_bias rank": (_with(qkv_bias=_x(3, 6)), "qkv_bias must have shape [18], got [3, 6]"),
    "qkv_bias dtype": (
        _as_half(qkv_bias=_x(18)),
        "qkv_bias must have the dtype of input, float16, got float32",
    ),
    "out_weight shape": (_with(out_weight=_x(5, 6)), "out_weight must have shape [6, 6], got [5, 6]"),
    "out_weight dtype": (
        _as_half(out_weight=_x(6, 6, dtype=torch.bfloat16)),
        "out_weight must have the dtype of input, float16, got bfloat16",
    ),
    "out_bias shape": (_with(out_bias=_x(18)), "out_bias must have shape [6], got [18]"),
    "out_bias dtype": (
        _with(out_bias=_x(6, dtype=torch.int64)),
        "out_bias must have the dtype of input, float32, got int64",
    ),
    "mask dtype": (
        _with(key_padding_mask=_x(2, 5)),
        "key_padding_mask must be bool (true: the key takes no part), got float32",
    ),
    "mask shape": (
        _with(key_padding_mask=_x(5, 2, dtype=torch.bool)),
        "key_padding_mask must have shape [2, 5], got [5, 2]",
    ),
    "mask rank": (
        _with(key_padding_mask=_x(5, dtype=torch.bool)),
        "key_padding_mask must have shape [2, 5], got [5]",
    ),
}


def _to(value: Any, device: str, grad: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device)
    return moved.requires_grad_() if grad and moved.dtype.is_floating_point else moved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["plain", "grad", "fake"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ERRORS)
def test_each_error_is_one_line_that_names_the_argument(case: str, name: str, way: str, device: str) -> None:
    kwargs, message = ERRORS[case]
    kwargs = {k: _to(v, device, way == "grad") for k, v in kwargs.items()}
    if way == "fake":
        mode = FakeTensorMode()
        kwargs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with pytest.raises(RuntimeError) as caught:
        _op(name)(**kwargs)
    assert str(caught.value).splitlines()[0] == f"{name}: {message}"


# what replaces an argument of the backward, message after "_fused_attention_backward: "
BACKWARD_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 2": ({"input": _x(5, 6)}, "input must have shape [N, S, embed_dim], got [5, 6]"),
    "no heads": ({"num_heads": 0}, "num_heads must divide embed_dim, 6, got 0"),
    "logsumexp shape": ({"logsumexp": _x(1)}, "logsumexp must have shape [2, 3, 5], got [1]"),
    "logsumexp dtype": ({"logsumexp": _x(2, 3, 5).double()}, "logsumexp must be float32, got float64"),
    "qkv_weight": ({"qkv_weight": _x(6, 6)}, "qkv_weight must have shape [18, 6], got [6, 6]"),
    "out_weight": ({"out_weight": _x(5, 6)}, "out_weight must have shape [6, 6], got [5, 6]"),
    "mask": (
        {"key_padding_mask": _x(2, 9, dtype=torch.bool)},
        "key_padding_mask must have shape [2, 5], got [2, 9]",
    ),
}


@pytest.mark.parametrize("case", BACKWARD_ERRORS)
def test_the_backward_checks_what_it_reads(case: str) -> None:
    changed, message = BACKWARD_ERRORS[case]
    call = {
        "grad_output": _x(2, 5, 6),
        "input": _x(2, 5, 6),
        "qkv": _x(2, 5, 18),
        "attention": _x(2, 5, 6),
        "logsumexp": _x(2, 3, 5),
        "qkv_weight": _x(18, 6),
        "out_weight": _x(6, 6),
        "num_heads": 3,
        "scale": None,
        "is_causal": False,
        "key_padding_mask": None,
        **changed,
    }
    with pytest.raises(RuntimeError) as caught:
        BACKWARD(*call.values(), "ieee", *(True,) * 5)
    assert str(caught.value).splitlines()[0] == f"_fused_attention_backward: {message}"


ARGUMENTS = ["qkv_weight", "qkv_bias", "out_weight", "out_bias", "key_padding_mask"]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_meta_tensor_beside_a_real_one_is_refused(argument: str) -> None:
    call = _with(key_padding_mask=_x(2, 5, dtype=torch.bool))
    call[argument] = call[argument].to("meta")
    with pytest.raises(RuntimeError, match=f"{argument} must be on the device of input, cpu, got"):
        OP(**call)


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("way", ["plain", "grad"])
def test_tensors_on_two_devices_are_refused(way: str, argument: str) -> None:
    for here, there, name, other in (("cuda", "cpu", "cuda:0", "cpu"), ("cpu", "cuda", "cpu", "cuda:0")):
        call = {k: _to(v, here) for k, v in _with(key_padding_mask=_x(2, 5, dtype=torch.bool)).items()}
        call[argument] = call[argument].to(there)
        call["input"] = call["input"].requires_grad_(way == "grad")
        with pytest.raises(RuntimeError) as caught:
            OP(**call)
        expected = f"fused_attention: {argument} must be on the device of input, {name}, got {other}"
        assert str(caught.value).splitlines()[0] == expected


@pytest.mark.cuda
def test_an_error_leaves_cuda_usable() -> None:
    x, parameters = random_tensor(2, 5, 12, device="cuda"), attention_parameters(12, device="cuda")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            OP(x, *parameters, 5)
    torch.testing.assert_close(OP(x, *parameters, 3), torch_attention(x, *parameters, 3))
