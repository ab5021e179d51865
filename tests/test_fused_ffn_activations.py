"""The activations of ``fused_ffn`` alone, over their whole range; NaN and infinity; instruction sets.

mpmath, the reference for float64, comes with PyTorch (through sympy).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor

import styleforge
from _reference import DEVICES, FFN_ACTIVATIONS, FLOATS, ffn_activate, torch_ffn_activate

OP = torch.ops.styleforge.fused_ffn
BACKWARD = torch.ops.styleforge._fused_ffn_backward
HALF = (torch.float16, torch.bfloat16)


def _through(values: Tensor, activation: str) -> Tensor:
    """The activation of each value: identity matrices give every value on exactly."""
    width = 48
    padded = torch.nn.functional.pad(values, (0, -values.numel() % width)).view(-1, width)
    eye = torch.eye(width, dtype=values.dtype, device=values.device)
    return OP(padded, eye, None, eye, None, activation).reshape(-1)[: values.numel()]


def _whole_range(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Values over all that is not 0 or the value itself; all there are of 16 bits."""
    if dtype in HALF:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        return every[every.isfinite()].to(device)
    near = torch.linspace(-16, 16, 400_001, dtype=torch.float64)
    # Below 1e-30 the products of a value and its activation leave float32's range.
    small = torch.logspace(-30, 1, 50_001, dtype=torch.float64)
    return torch.cat([near, small, -small]).to(dtype).to(device)


def _units(error: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Errors in units in the last place of the exact result.

    At least of the smallest normal number; of 1e-30 for bfloat16, since oneDNN flushes what is smaller.
    """
    info = torch.finfo(dtype)
    least = 1e-30 if dtype == torch.bfloat16 else info.tiny
    exponent = torch.frexp(exact.abs().clamp(min=least)).exponent - 1
    return error.abs() / torch.ldexp(torch.full_like(exact, info.eps), exponent)


def _check_gelu(x: Tensor, result: Tensor) -> None:
    """float32: Phi to half a unit of 1, and results to a few units even where they are 1e-30.

    On the GPU an exponential and a reciprocal are instructions of up to two units and one.
    """
    wide = x.double()
    exact = ffn_activate(wide, "gelu")
    error = result.double() - exact
    # What is left of one rounding at 1 in Phi, and the rounding of the product.
    assert (error.abs() <= 2**-24 * (wide.abs() + exact.abs())).all()
    units = _units(error, exact, torch.float32)
    assert units[wide >= 0].max() < 2
    assert units[wide < 0].max() < (10 if x.is_cuda else 8)
    assert units.square().mean().sqrt() < 1


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_in_float32_over_the_whole_range(device: str) -> None:
    x = _whole_range(torch.float32, device)
    _check_gelu(x, _through(x, "gelu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_every_16_bit_value(activation: str, dtype: torch.dtype, device: str) -> None:
    """Correctly rounded, or the neighbour where the exact result lies next to the middle of the two."""
    x = _whole_range(dtype, device)
    x = x[x.abs() < 1e4]
    exact = ffn_activate(x.double(), activation)
    units = _units(_through(x, activation).double() - exact, exact, dtype)
    assert units.max() < 0.6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_other_activations_in_float32_over_the_whole_range(activation: str, device: str) -> None:
    x = _whole_range(torch.float32, device)
    exact = ffn_activate(x.double(), activation)
    error = (_through(x, activation).double() - exact).abs()
    assert (
        error <= 4 * torch.finfo(torch.float32).eps * torch.maximum(exact.abs(), x.double().abs() / 8)
    ).all()
    right = x > 0
    assert _units(error[right], exact[right], torch.float32).max() < 4


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_in_float64_over_the_whole_range(device: str) -> None:
    """Against mpmath: to a few units of double also where erf's formula has nothing left."""
    x = torch.cat([torch.linspace(-37, 9, 2301, dtype=torch.float64), torch.randn(700, dtype=torch.float64)])
    x = x[x != 0]
    result = _through(x.to(device), "gelu").cpu()
    with mpmath.workdps(40):
        errors, phi_errors = [], []
        for value, got in zip(x.tolist(), result.tolist(), strict=True):
            phi = mpmath.erfc(-mpmath.mpf(value) / mpmath.sqrt(2)) / 2
            exact = value * phi
            errors.append(float(abs(got - exact) / abs(exact)))
            phi_errors.append(float(abs(mpmath.mpf(got) / value - phi)))
    assert max(errors) < 16 * torch.finfo(torch.float64).eps
    assert max(phi_errors) <= 2**-52


CAPABILITY = """
import sys, torch
torch.ops.load_library(sys.argv[1])
values = torch.load(sys.argv[2])
eye = torch.eye(values.shape[1])
results = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for activation in ("gelu", "gelu_tanh", "relu", "silu"):
        one = eye.to(dtype)
        x = values.to(dtype)
        y = torch.ops.styleforge.fused_ffn(x, one, None, one, None, activation)
        h = torch.ops.styleforge._fused_ffn_forward(x, one, None, one, None, activation, None, "ieee")[1]
        needs = (True, False, False, False, False)
        g = torch.ops.styleforge._fused_ffn_backward(
            torch.ones_like(x), x, h, one, None, one, activation, "ieee", *needs
        )[0]
        results[str(dtype), activation] = (y, g)
torch.save(results, sys.argv[3])
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    """The same kernels compiled for less: as accurate, in a process of its own, which chooses once."""
    values = _whole_range(torch.float32)
    values = values[: values.numel() // 48 * 48].view(-1, 48)
    torch.save(values, tmp_path / "values.pt")
    library = styleforge._library.library_path
    command = [sys.executable, "-c", CAPABILITY, str(library)]
    command += [str(tmp_path / "values.pt"), str(tmp_path / "results.pt")]
    environment = {**os.environ, "STYLEFORGE_CPU_CAPABILITY": capability}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "must be baseline, avx2 or avx512 and supported" in finished.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert finished.returncode == 0, finished.stderr
    results = torch.load(tmp_path / "results.pt")
    _check_gelu(values, results["torch.float32", "gelu"][0])
    for dtype in (torch.float32, *HALF):
        for activation in FFN_ACTIVATIONS:
            x = values.to(dtype).double().requires_grad_()
            exact = ffn_activate(x, activation)
            (slope,) = torch.autograd.grad(exact.sum(), x)
            slope = torch.where(x == 0, 0.5 if activation != "relu" else 0.0, slope)
            y, g = results[str(dtype), activation]
            tolerance = (
                6 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
            )
            for got, wanted in ((y, exact.detach()), (g, slope)):
                assert ((got.double() - wanted).abs() <= tolerance * wanted.abs().clamp(min=0.2)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_nan_and_infinity_as_in_pytorch(activation: str, dtype: torch.dtype, device: str) -> None:
    """Each in a row of its own. For +inf PyTorch's gelu has NaN in vectors and inf in single elements."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 60000.0, -60000.0, 0.0], dtype=dtype)
    for width in (1, 8, 37):
        x = torch.full((8, 1), 1.0, dtype=dtype) * special[:, None]
        one, row = torch.ones(width, 1, dtype=dtype), torch.ones(1, width, dtype=dtype)
        result = OP(x.to(device), one.to(device), None, (row / width).to(device), None, activation).cpu()[
            :, 0
        ]
        expected = torch_ffn_activate(special.double(), activation).to(dtype)
        expected[1] = math.inf
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isposinf(), expected.isposinf())
        finite = expected.isfinite()
        torch.testing.assert_close(result[finite], expected[finite], rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_gradients_that_are_not_finite_as_in_pytorch(activation: str, dtype: torch.dtype) -> None:
    """Above all relu's: what is cut off has the gradient 0, whatever comes from behind."""
    hidden = torch.tensor([1.0, -2.0, 0.0, 0.5, math.nan, -30.0, 3.0], dtype=dtype)
    for value in (math.inf, -math.inf, math.nan):
        for width in (1, 40):
            x = hidden.repeat(width).requires_grad_()
            grad = torch.full_like(x, value)
            (expected,) = torch.autograd.grad(torch_ffn_activate(x, activation), x, grad)
            one = torch.ones(1, 1, dtype=dtype)
            weight = torch.ones(x.numel(), 1, dtype=dtype)
            needs = (False, False, True, False, False)
            gradients = BACKWARD(
                grad[:1, None], one, x.detach()[None], weight, None, weight.T, activation, "ieee", *needs
            )
            assert torch.equal(gradients[2].isnan(), expected.isnan())
            assert torch.equal(gradients[2].isinf(), expected.isinf())
            assert torch.equal(gradients[2] == 0, expected == 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_relu_stops_infinite_gradients_as_in_pytorch(dtype: torch.dtype, device: str) -> None:
    """Those that overflowed, say, under a gradient scaler."""
    torch.manual_seed(0)
    given = [torch.randn(s, device=device).to(dtype) for s in ((40, 16), (64, 16), (64,), (8, 64), (8,))]
    upstream = torch.ones(40, 8, device=device, dtype=dtype)
    upstream[7, 3] = math.inf

    def gradients(own: bool) -> tuple[Tensor, ...]:
        x, w1, b1, w2, b2 = leaves = [t.clone().requires_grad_() for t in given]
        linear = torch.nn.functional.linear
        y = OP(*leaves, "relu") if own else linear(linear(x, w1, b1).relu(), w2, b2)
        return torch.autograd.grad(y, leaves, upstream)

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(special(ours), special(theirs))
