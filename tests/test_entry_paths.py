"""What the ways into the operators need beyond the conformance matrix (``test_conformance.py``)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from _reference import (
    DEVICES,
    attention,
    conv_instance_norm,
    dense_strides,
    ffn,
    instance_norm,
    max_error,
    tensor,
    tf32,
)

NORM = torch.ops.styleforge.fused_instance_norm
CONV = torch.ops.styleforge.fused_conv_instance_norm_relu
FFN = torch.ops.styleforge.fused_ffn
ATTENTION = torch.ops.styleforge.fused_attention
OPERATORS = ["norm", "conv", "ffn", "attention"]


class Norm(nn.Module):
    """The first operator with everything it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.styleforge.fused_instance_norm(x, self.weight, self.bias, 1e-5, "silu", 0.01, x)

    def reference(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.weight, self.bias, 1e-5, "silu", 0.01, x)


class Conv(nn.Module):
    """The second operator with everything it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        self.bias = nn.Parameter(torch.randn(4))
        self.norm_weight = nn.Parameter(torch.rand(4) + 0.5)
        self.norm_bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.styleforge.fused_conv_instance_norm_relu(
            x,
            self.weight,
            self.bias,
            self.norm_weight,
            self.norm_bias,
            [1, 1],
            [1, 1],
            "reflect",
            1,
            1e-5,
            "leaky_relu",
            0.2,
            x,
            "ieee",
        )

    def reference(self, x: Tensor) -> Tensor:
        given = (self.weight, self.bias, self.norm_weight, self.norm_bias)
        return conv_instance_norm(x, *given, (1, 1), (1, 1), "reflect", 1, 1e-5, "leaky_relu", 0.2, x)


class Ffn(nn.Module):
    """The third operator with everything it takes, over the channels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.randn(10, 4) / 2)
        self.fc1_bias = nn.Parameter(torch.randn(10))
        self.fc2_weight = nn.Parameter(torch.randn(4, 10) / 3)
        self.fc2_bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        y = torch.ops.styleforge.fused_ffn(
            rows, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, "gelu", rows, "ieee"
        ).permute(0, 3, 1, 2)
        if x.is_contiguous(memory_format=torch.channels_last):
            return y
        return y.contiguous()

    def reference(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        given = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return ffn(rows, *given, "gelu", rows).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """The fourth operator with everything it takes, over the pixels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_weight = nn.Parameter(torch.randn(12, 4) / 2)
        self.qkv_bias = nn.Parameter(torch.randn(12))
        self.out_weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.out_bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        hidden = pixels[:, :, 0] > 1
        y = torch.ops.styleforge.fused_attention(
            pixels,
            self.qkv_weight,
            self.qkv_bias,
            self.out_weight,
            self.out_bias,
            2,
            0.4,
            True,
            hidden,
            "ieee",
        )
        y = y.transpose(1, 2).reshape(x.shape)
        if x.is_contiguous(memory_format=torch.channels_last):
            return y.contiguous(memory_format=torch.channels_last)
        return y.contiguous()

    def reference(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        given = (self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias)
        y = attention(pixels, *given, 2, 0.4, True, pixels[:, :, 0] > 1)
        return y.transpose(1, 2).reshape(x.shape)


MODULES: dict[str, type[nn.Module]] = {"norm": Norm, "conv": Conv, "ffn": Ffn, "attention": Attention}


def _module(operator: str, device: str = "cpu") -> Any:
    return MODULES[operator]().to(device)


def _close(result: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert result.shape == expected.shape
    assert max_error(result, expected.detach().double().cpu()) < tolerance


@pytest.fixture(autouse=True)
def _fresh_compiler_without_tf32() -> Iterator[None]:
    torch._dynamo.reset()
    with tf32(False):
        yield


# --- eager modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_eager_with_every_grad_mode(operator: str, device: str) -> None:
    module = _module(operator, device)
    x = tensor(2, 4, 7, 6, device=device)
    expected = module.reference(x)
    with_gradient = module(x)
    assert with_gradient.requires_grad
    with torch.no_grad():
        without = module(x)
        assert not without.requires_grad
    with torch.inference_mode():
        inferred = module(x)
        assert inferred.is_inference()
    for result in (with_gradient, without, inferred):
        _close(result, expected)
        assert result.stride() == dense_strides(result.shape, x)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_parameter_that_needs_no_gradient_gets_none(operator: str) -> None:
    module = _module(operator).requires_grad_(False)
    x = tensor(1, 4, 5, 5)
    assert not module(x).requires_grad
    assert module(x.requires_grad_()).requires_grad


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compile_static_shapes_in_both_formats(operator: str, device: str) -> None:
    module = _module(operator, device)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    for layout in ("contiguous", "channels_last", "transposed", "sliced"):
        x = tensor(2, 4, 7, 6, device=device, layout=layout)
        with torch.no_grad():
            result = compiled(x)
        _close(result, module.reference(x))
        assert result.stride() == dense_strides(result.shape, x)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_compiled_call_fails_with_the_operators_own_text(operator: str) -> None:
    call, message = {
        "norm": (NORM, r"weight must have shape \[4\] or \[2, 4\], got \[5\]"),
        "conv": (
            lambda x, w: CONV(x, torch.ones(4, 4, 1, 1), norm_weight=w),
            r"norm_weight must have shape \[4\] or \[2, 4\], got \[5\]",
        ),
        "ffn": (
            lambda x, w: FFN(x, torch.ones(4, 3), w, torch.ones(3, 4), None),
            r"fc1_bias must have shape \[4\], got \[5\]",
        ),
        "attention": (
            lambda x, w: ATTENTION(x[0], torch.ones(9, 3), w, torch.ones(3, 3), None, 1),
            r"qkv_bias must have shape \[9\], got \[5\]",
        ),
    }[operator]
    function = torch.compile(lambda x, w: call(x, w), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=message):
        function(torch.ones(2, 4, 3, 3), torch.ones(5))


# --- AOTInductor --------------------------------------------------------------------------------------


def _dynamic_sizes() -> dict[str, Any]:
    from torch.export import Dim

    return {
        "x": {
            0: Dim("batch", min=1, max=64),
            2: Dim("height", min=4, max=512),
            3: Dim("width", min=4, max=512),
        }
    }


@pytest.mark.parametrize("device", DEVICES)
def test_aotinductor_package(device: str, tmp_path: Path) -> None:
    """All operators in one package, loaded again; sizes other than the one it was made with."""

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.ffn, self.attention = Norm(), Conv(), Ffn(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.ffn(self.norm(self.conv(x) + 1)))

    module = All().eval().to(device)
    with torch.no_grad():
        program = torch.export.export(
            module, (tensor(2, 4, 8, 6, device=device),), dynamic_shapes=_dynamic_sizes(), strict=False
        )
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "module.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for sizes in ((2, 4, 8, 6), (1, 4, 5, 9), (3, 4, 21, 30)):
            x = tensor(*sizes, device=device)
            _close(loaded(x), module(x))


# --- functorch ------------------------------------------------------------------------------------


def _loop(
    function: Callable[..., Tensor], in_dims: tuple[int | None, ...], args: tuple[Tensor | None, ...]
) -> Tensor:
    sizes = [a.shape[d] for a, d in zip(args, in_dims, strict=True) if a is not None and d is not None]
    return torch.stack(
        [
            function(
                *(a if d is None or a is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
            )
            for i in range(sizes[0])
        ]
    )


VMAP_NORM = {
    "input": ((0, None, None, None), ((3, 2, 4, 5, 6), (4,), (4,), (2, 4, 5, 6))),
    "input, inner dimension": ((3, None, None, None), ((2, 4, 5, 3, 6), (4,), (4,), (2, 4, 5, 6))),
    "all of them": ((0, 0, 0, 0), ((3, 2, 4, 5, 6), (3, 4), (3, 4), (3, 2, 4, 5, 6))),
    "parameters [C]": ((None, 0, 1, None), ((2, 4, 5, 6), (3, 4), (4, 3), (2, 4, 5, 6))),
    "parameters [N, C]": ((0, 1, 2, 4), ((3, 2, 4, 5, 6), (2, 3, 4), (2, 4, 3), (2, 4, 5, 6, 3))),
    "[N, C] not vmapped": ((0, None, None, None), ((3, 2, 4, 5, 6), (2, 4), (2, 4), (2, 4, 5, 6))),
    "residual only": ((None, None, None, 1), ((2, 4, 5, 6), (4,), (4,), (2, 3, 4, 5, 6))),
    "weight only": ((None, 0, None, None), ((2, 4, 5, 6), (3, 4), (4,), (2, 4, 5, 6))),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VMAP_NORM)
def test_vmap_of_the_norm_is_a_loop(case: str, device: str) -> None:
    in_dims, sizes = VMAP_NORM[case]
    args = tuple(torch.randn(s, device=device) for s in sizes)

    def function(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return NORM(x, w, b, 1e-5, "tanh", 0.01, r)

    expected = _loop(function, in_dims, args)
    torch.testing.assert_close(torch.vmap(function, in_dims)(*args), expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(torch.vmap(function, in_dims), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5)


VMAP_CONV = {
    "input": ((0, None, None, None, None), ((3, 2, 4, 5, 6), (4, 4, 3, 3), (4,), (4,), (2, 4, 5, 6))),
    "weight": ((None, 1, None, None, None), ((2, 4, 5, 6), (4, 3, 4, 3, 3), (4,), (4,), (2, 4, 5, 6))),
    "input and weight": (
        (1, 0, 0, 0, 0),
        ((2, 3, 4, 5, 6), (3, 4, 4, 3, 3), (3, 4), (3, 4), (3, 2, 4, 5, 6)),
    ),
    "norm parameters": ((None, None, 0, 1, None), ((2, 4, 5, 6), (4, 4, 3, 3), (3, 4), (4, 3), (2, 4, 5, 6))),
    "[N, C]": ((0, None, 0, None, 0), ((3, 2, 4, 5, 6), (4, 4, 3, 3), (3, 2, 4), (2, 4), (3, 2, 4, 5, 6))),
    "residual": ((None, None, None, None, 0), ((2, 4, 5, 6), (4, 4, 3, 3), (4,), (4,), (3, 2, 4, 5, 6))),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VMAP_CONV)
def test_vmap_of_the_convolution_is_a_loop(case: str, device: str) -> None:
    in_dims, sizes = VMAP_CONV[case]
    args = tuple(torch.randn(s, device=device) for s in sizes)

    def function(x: Tensor, w: Tensor, nw: Tensor, nb: Tensor, r: Tensor) -> Tensor:
        return CONV(x, w, None, nw, nb, [1, 1], [1, 1], "reflect", 1, 1e-5, "silu", 0.01, r)

    expected = _loop(function, in_dims, args)
    torch.testing.assert_close(torch.vmap(function, in_dims)(*args), expected, rtol=1e-4, atol=1e-4)


VMAP_FFN = {
    "input": ((0, None, None, None, None, None), ((3, 2, 5), (7, 5), (7,), (4, 7), (4,), (2, 4))),
    "input, inner dimension": (
        (2, None, None, None, None, None),
        ((2, 5, 3), (7, 5), (7,), (4, 7), (4,), (2, 4)),
    ),
    "input of one dimension": ((1, None, None, None, None, 0), ((5, 3), (7, 5), (7,), (4, 7), (4,), (3, 4))),
    "residual": ((None, None, None, None, None, 1), ((2, 5), (7, 5), (7,), (4, 7), (4,), (2, 3, 4))),
    "first layer": ((None, 0, 1, None, None, None), ((2, 5), (3, 7, 5), (7, 3), (4, 7), (4,), (2, 4))),
    "second layer": ((None, None, None, 1, 0, None), ((2, 5), (7, 5), (7,), (4, 3, 7), (3, 4), (2, 4))),
    "all of them": ((0, 0, 0, 0, 0, 0), ((3, 2, 5), (3, 7, 5), (3, 7), (3, 4, 7), (3, 4), (3, 2, 4))),
}


def _ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, r: Tensor) -> Tensor:
    return FFN(x, w1, b1, w2, b2, "gelu", r)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VMAP_FFN)
def test_vmap_of_the_ffn_is_a_loop(case: str, device: str) -> None:
    in_dims, sizes = VMAP_FFN[case]
    args = tuple(torch.randn(s, device=device) for s in sizes)
    expected = _loop(_ffn, in_dims, args)
    torch.testing.assert_close(torch.vmap(_ffn, in_dims)(*args), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(torch.vmap(_ffn, in_dims), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VMAP_FFN)
@pytest.mark.parametrize("wanted", [(0,), (0, 1, 2, 3, 4, 5), (1, 4)], ids=str)
def test_per_sample_gradients_of_the_ffn(wanted: tuple[int, ...], case: str, device: str) -> None:
    """vmap(grad) against a loop of autograd, whichever arguments are vmapped and differentiated."""
    in_dims, sizes = VMAP_FFN[case]
    args = tuple(torch.randn(s, device=device) for s in sizes)

    def loss(*args: Tensor) -> Tensor:
        return _ffn(*args).square().sum()

    results = torch.vmap(torch.func.grad(loss, argnums=wanted), in_dims)(*args)
    for i in range(3):
        leaves = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        leaves = [leaf.detach().clone().requires_grad_(k in wanted) for k, leaf in enumerate(leaves)]
        loss(*leaves).backward()
        for result, k in zip(results, wanted, strict=True):
            torch.testing.assert_close(result[i], leaves[k].grad, rtol=1e-4, atol=1e-4)


VMAP_ATTENTION = {
    "input": ((0, None, None, None, None, None), ((3, 2, 5, 6), (18, 6), (18,), (6, 6), (6,), (2, 5))),
    "input, inner dimension": (
        (2, None, None, None, None, None),
        ((2, 5, 3, 6), (18, 6), (18,), (6, 6), (6,), (2, 5)),
    ),
    "mask": ((None, None, None, None, None, 1), ((2, 5, 6), (18, 6), (18,), (6, 6), (6,), (2, 3, 5))),
    "input and mask": (
        (1, None, None, None, None, 2),
        ((2, 3, 5, 6), (18, 6), (18,), (6, 6), (6,), (2, 5, 3)),
    ),
    "first weights": ((None, 0, 1, None, None, None), ((2, 5, 6), (3, 18, 6), (18, 3), (6, 6), (6,), (2, 5))),
    "second weights": (
        (None, None, None, 1, 0, None),
        ((2, 5, 6), (18, 6), (18,), (6, 3, 6), (3, 6), (2, 5)),
    ),
    "all of them": (
        (0, 0, 0, 0, 0, 0),
        ((3, 2, 5, 6), (3, 18, 6), (3, 18), (3, 6, 6), (3, 6), (3, 2, 5)),
    ),
}


def _attention(x: Tensor, w: Tensor, b: Tensor, ow: Tensor, ob: Tensor, hidden: Tensor) -> Tensor:
    return ATTENTION(x, w, b, ow, ob, 2, None, True, hidden)


def _attention_arguments(sizes: tuple[Any, ...], device: str) -> tuple[Tensor, ...]:
    args = [torch.randn(s, device=device) for s in sizes]
    return (*args[:5], args[5] > 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VMAP_ATTENTION)
def test_vmap_of_attention_is_a_loop(case: str, device: str) -> None:
    in_dims, sizes = VMAP_ATTENTION[case]
    args = _attention_arguments(sizes, device)
    expected = _loop(_attention, in_dims, args)
    torch.testing.assert_close(torch.vmap(_attention, in_dims)(*args), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(torch.vmap(_attention, in_dims), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-4, atol=1e-4)
    if in_dims[0] == 0 and in_dims[1] is None:  # also with every default left out
        bare = torch.vmap(lambda x: ATTENTION(x, *args[1:5], 2))(args[0])
        torch.testing.assert_close(bare[1], ATTENTION(args[0][1], *args[1:5], 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VMAP_ATTENTION)
@pytest.mark.parametrize("wanted", [(0,), (0, 1, 2, 3, 4), (1, 4)], ids=str)
def test_per_sample_gradients_of_attention(wanted: tuple[int, ...], case: str, device: str) -> None:
    """vmap(grad) against a loop of autograd, whichever arguments are vmapped and differentiated."""
    in_dims, sizes = VMAP_ATTENTION[case]
    args = _attention_arguments(sizes, device)

    def loss(*args: Tensor) -> Tensor:
        return _attention(*args).square().sum()

    results = torch.vmap(torch.func.grad(loss, argnums=wanted), in_dims)(*args)
    for i in range(3):
        leaves = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        leaves = [leaf.detach().clone().requires_grad_(k in wanted) for k, leaf in enumerate(leaves)]
        loss(*leaves).backward()
        for result, k in zip(results, wanted, strict=True):
            right = leaves[k].grad
            atol = 2e-5 * max(5.0, right.abs().max().item())
            torch.testing.assert_close(result[i], right, rtol=1e-4, atol=atol)


def test_vmap_of_vmap() -> None:
    x = torch.randn(2, 3, 1, 4, 5, 6)
    expected = torch.stack([torch.stack([NORM(b) for b in a]) for a in x])
    torch.testing.assert_close(torch.vmap(torch.vmap(NORM))(x), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_func_grad(activation: str, device: str) -> None:
    """torch.func.grad and vmap(grad) (per-sample gradients) against autograd."""
    x = torch.randn(3, 2, 4, 5, 6, device=device)
    w, b = torch.rand(4, device=device) + 0.5, torch.rand(4, device=device)
    r = torch.randn_like(x)

    def loss(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return NORM(x, w, b, 1e-5, activation, 0.01, r).square().sum()

    expected = []
    for i in range(3):
        leaves = [t.clone().requires_grad_() for t in (x[i], w, b, r[i])]
        expected.append(torch.autograd.grad(loss(*leaves), leaves))
    one = torch.func.grad(loss, argnums=(0, 1, 2, 3))(x[0], w, b, r[0])
    for result, autograd in zip(one, expected[0], strict=True):
        torch.testing.assert_close(result, autograd, rtol=1e-4, atol=1e-4)
    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims=(0, None, None, 0))(
        x, w, b, r
    )
    for k, result in enumerate(per_sample):
        torch.testing.assert_close(result, torch.stack([e[k] for e in expected]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operator", ["norm", "convolution", "ffn", "attention"])
def test_jacobians(operator: str, batch: int, device: str) -> None:
    """jacrev: gradients of the result vmapped over what the forward saved only once."""
    scale, shift = torch.rand(4, device=device) + 0.5, torch.rand(4, device=device)
    kernel = torch.randn(4, 4, 3, 3, device=device)
    picture = torch.randn(batch, 4, 4, 3, device=device) * torch.arange(1, 5, device=device)[:, None, None]
    tokens = torch.randn(batch, 3, 4, device=device)
    parameters = [torch.randn(12, 4, device=device), torch.randn(4, 12, device=device)]
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "norm": (lambda x: NORM(x, scale, shift, 1e-5, "silu", 0.01, x), picture),
        "convolution": (lambda x: CONV(x, kernel, None, scale, shift, padding=[1, 1]), picture),
        "ffn": (lambda x: FFN(x, parameters[0], None, parameters[1], None), tokens),
        "attention": (
            lambda x: ATTENTION(x, parameters[0], None, parameters[1][:, :4].contiguous(), None, 2),
            tokens,
        ),
    }
    function, given = functions[operator]
    jacobian = torch.func.jacrev(function)(given)
    leaf = given.clone().requires_grad_()
    result = function(leaf)
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in result.flatten()]
    expected = torch.stack(rows).reshape(jacobian.shape)
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-4)


def test_func_grad_of_the_convolution() -> None:
    x, w = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    bias = torch.randn(4)

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return CONV(x, w, bias, padding=[1, 1], activation="silu").square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for result, autograd in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, w, bias), expected, strict=True):
        torch.testing.assert_close(result, autograd, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_functional_call_and_checkpointing(operator: str) -> None:
    from torch.utils.checkpoint import checkpoint

    module = _module(operator)
    x = tensor(2, 4, 6, 5)
    module(x).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    checkpoint(module, x, use_reentrant=False).square().sum().backward()
    for a, p in zip(expected, module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a)
    doubled = {k: 2 * v.detach() for k, v in module.named_parameters()}
    result = torch.func.functional_call(module, doubled, (x,))
    module.load_state_dict(doubled)
    torch.testing.assert_close(result, module(x))


# --- autocast -------------------------------------------------------------------------------------

AUTOCAST = [
    ("cpu", torch.bfloat16),
    ("cpu", torch.float16),
    pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
]


@pytest.mark.parametrize(("device", "dtype"), AUTOCAST)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast_of_the_convolution(layout: str, device: str, dtype: torch.dtype) -> None:
    """Computes in half precision; parameters and their gradients stay in float32."""
    module = _module("conv", device)
    x = tensor(2, 4, 9, 8, device=device, layout=layout).requires_grad_()
    with torch.autocast(device, dtype):
        result = module(x)
        with torch.no_grad():
            inferred = module(x)
    assert result.dtype == inferred.dtype == dtype
    assert result.stride() == dense_strides(result.shape, x)
    _close(result, module.reference(x), 60 * torch.finfo(dtype).eps)
    _close(inferred, module.reference(x), 60 * torch.finfo(dtype).eps)
    result.float().square().mean().backward()
    ours = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    module.reference(x).square().mean().backward()
    for a, b in zip(ours, [x.grad, *(p.grad for p in module.parameters())], strict=True):
        assert a is not None and b is not None and a.dtype == torch.float32
        assert max_error(a, b.double().cpu()) < 60 * torch.finfo(dtype).eps * max(b.abs().max().item(), 0.1)


@pytest.mark.parametrize(("device", "dtype"), AUTOCAST)
@pytest.mark.parametrize("operator", ["ffn", "attention"])
def test_autocast_of_matrix_products(operator: str, device: str, dtype: torch.dtype) -> None:
    """As the convolution's: computes in half precision, parameters and their gradients stay in float32."""
    module = _module(operator, device)
    x = tensor(2, 4, 9, 8, device=device).requires_grad_()
    with torch.autocast(device, dtype):
        result = module(x)
        with torch.no_grad():
            inferred = module(x)
    assert result.dtype == inferred.dtype == dtype
    expected = module.reference(x)
    for y in (result, inferred):
        _close(y, expected, 4 * torch.finfo(dtype).eps * expected.abs().max().item())
    result.float().square().mean().backward()
    ours = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    module.reference(x).square().mean().backward()
    for a, b in zip(ours, [x.grad, *(p.grad for p in module.parameters())], strict=True):
        assert a is not None and b is not None and a.dtype == torch.float32
        assert max_error(a, b.double().cpu()) < 8 * torch.finfo(dtype).eps * max(b.abs().max().item(), 0.1)


@pytest.mark.parametrize(("device", "dtype"), AUTOCAST)
def test_autocast_of_the_norm_keeps_the_dtype(device: str, dtype: torch.dtype) -> None:
    """As PyTorch's own: a norm runs in the dtype of its input, also with float32 parameters."""
    module = _module("norm", device)
    for given in (torch.float32, dtype):
        x = tensor(2, 4, 9, 8, device=device, dtype=given)
        with torch.autocast(device, dtype):
            result = module(x)
        assert result.dtype == given
        _close(result, module.reference(x), 2e-5 if given == torch.float32 else 20 * torch.finfo(dtype).eps)
    x = tensor(2, 4, 9, 8, device=device, dtype=dtype)
    r = tensor(2, 4, 9, 8, device=device)
    with torch.autocast(device, dtype):
        result = NORM(x, residual=r)  # residual in float32: brought to the input's dtype
    assert result.dtype == dtype
    _close(result, instance_norm(x, residual=r), 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("device", "dtype"), AUTOCAST)
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_under_compile(operator: str, device: str, dtype: torch.dtype) -> None:
    module = _module(operator, device)
    x = tensor(2, 4, 9, 8, device=device)

    def function(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return module(x)

    expected = function(x)
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)
    result.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_float64_alone(device: str) -> None:
    x, w = (
        tensor(1, 2, 6, 6, dtype=torch.float64, device=device),
        torch.randn(3, 2, 3, 3, dtype=torch.float64),
    )
    with torch.autocast(device, torch.bfloat16):
        assert NORM(x).dtype == torch.float64
        assert CONV(x, w.to(device)).dtype == torch.float64
        assert FFN(x, x[0, 0], None, x[0, 1], None).dtype == torch.float64
        attended = ATTENTION(x[0], x[0].reshape(18, 4)[:, :1].expand(18, 6), None, x[0, 0], None, 2)
        assert attended.dtype == torch.float64


# --- from C++'s and other threads' side -----------------------------------------------------------


def test_threads_call_at_the_same_time() -> None:
    from concurrent.futures import ThreadPoolExecutor

    module = _module("conv").requires_grad_(False)
    inputs = [tensor(1, 4, 16, 16) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(module, inputs * 4))
    for i, result in enumerate(results):
        assert torch.equal(result, module(inputs[i % 8]))


def test_the_operators_need_only_the_library(tmp_path: Path) -> None:
    """``torch.ops.load_library`` alone, without the Python package, runs a scripted module."""
    module = torch.jit.script(nn.Sequential(Conv(), Ffn(), Attention()).eval().requires_grad_(False))
    module.save(tmp_path / "module.pt")
    x = tensor(1, 4, 6, 6)
    torch.save({"x": x, "y": module(x)}, tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "data = torch.load(sys.argv[3])\n"
        "y = torch.jit.load(sys.argv[2])(data['x'])\n"
        "assert 'styleforge' not in sys.modules\n"
        "assert torch.allclose(y, data['y'])\n"
    )
    library = styleforge._library.library_path
    assert library is not None
    command = [
        sys.executable,
        "-c",
        code,
        str(library),
        str(tmp_path / "module.pt"),
        str(tmp_path / "data.pt"),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
