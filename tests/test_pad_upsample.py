"""Padding and nearest upsampling as one operator, and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from _reference import dense_strides
from styleforge.ops import pad_upsample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
FORMATS = [torch.contiguous_format, torch.channels_last]
CASES = [
    ("zeros", (1, 2), 1),
    ("zeros", (0, 0), 2),
    ("reflect", (1, 1), 1),
    ("reflect", (4, 0), 2),
    ("reflect", (5, 6), 1),  # as wide as can be: the pictures below have 6 x 7 pixels
    ("replicate", (0, 3), 1),
    ("replicate", (9, 2), 2),
]


def plain(x: Tensor, padding: tuple[int, int], mode: str, upsample: int) -> Tensor:
    if upsample == 2:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    sides = (padding[1], padding[1], padding[0], padding[0])
    return F.pad(x, sides, mode="constant" if mode == "zeros" else mode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode, padding, upsample", CASES)
def test_result_and_gradient(
    mode: str,
    padding: tuple[int, int],
    upsample: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: str,
) -> None:
    x = torch.randn(2, 3, 6, 7, device=device, dtype=dtype).to(memory_format=memory_format)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    result = pad_upsample(ours, padding, padding_mode=mode, upsample=upsample)
    reference = plain(exact, padding, mode, upsample)
    torch.testing.assert_close(result.double(), reference, rtol=0, atol=0)
    grad = torch.randn_like(result)
    (got,) = torch.autograd.grad(result, ours, grad)
    (expected,) = torch.autograd.grad(reference, exact, grad.double())
    tolerance = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    again = torch.autograd.grad(pad_upsample(ours, padding, padding_mode=mode, upsample=upsample), ours, grad)
    assert torch.equal(got, again[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [(0, 0), (1, 0)])
def test_any_strides_give_a_dense_result(padding: tuple[int, int], device: str) -> None:
    x = torch.randn(3, 2, 7, 6, device=device)
    for given in (x.permute(1, 0, 3, 2), x.permute(1, 2, 3, 0), x[:, :, 1:, 1:], x[:1].expand(3, 2, 7, 6)):
        result = pad_upsample(given, padding)
        assert torch.equal(result, plain(given, padding, "zeros", 1))
        assert result.stride() == dense_strides(result.shape, given)
        torch.library.opcheck(
            torch.ops.styleforge._pad_upsample.default, (given, padding), test_utils="test_faketensor"
        )


@pytest.mark.parametrize("mode, padding, upsample", CASES)
def test_gradcheck_and_vmap(mode: str, padding: tuple[int, int], upsample: int) -> None:
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return pad_upsample(x, padding, padding_mode=mode, upsample=upsample)

    assert torch.autograd.gradcheck(function, (x,))
    many = torch.randn(2, 4, 3, 6, 7)
    expected = torch.stack([function(one) for one in many.unbind(1)])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=1)(many), expected)
    gradients = torch.func.vmap(torch.func.grad(lambda x: function(x).square().sum()), in_dims=1)(many)
    by_plain = torch.func.vmap(
        torch.func.grad(lambda x: plain(x, padding, mode, upsample).square().sum()), in_dims=1
    )
    torch.testing.assert_close(gradients, by_plain(many))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("device", DEVICES)
def test_no_algorithm_that_is_not_repeatable(mode: str, device: str) -> None:
    """Where PyTorch's own padding refuses."""
    x = torch.randn(1, 4, 9, 9, device=device, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        pad_upsample(x, 2, padding_mode=mode).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad is not None and x.grad.sum().item() == pytest.approx(4 * 13 * 13)


def test_double_backward_says_that_it_is_not_supported() -> None:
    x = torch.randn(1, 2, 4, 5).requires_grad_()
    (grad,) = torch.autograd.grad(pad_upsample(x, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pad_upsample: double backward is not supported"):
        grad.sum().backward()
