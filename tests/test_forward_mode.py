"""Forward-mode differentiation, which no operator has: refused in every way it is asked for, never zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import styleforge
from styleforge.models._reflect_conv import reflect_conv2d

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
PICTURE, TOKENS = (1, 4, 8, 8), (2, 6, 8)

MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], str]] = {
    "norm": (lambda: styleforge.FusedInstanceNorm2d(4), PICTURE, "fused_instance_norm"),
    "conv": (
        lambda: styleforge.FusedConvInstanceNormReLU(4, 4),
        PICTURE,
        "fused_conv_instance_norm_relu",
    ),
    "ffn": (lambda: styleforge.FusedFFN(8, 16), TOKENS, "fused_ffn"),
    "attention": (lambda: styleforge.FusedAttention(8, 2), TOKENS, "fused_attention"),
    "attention v2": (lambda: styleforge.FusedAttention(8, 2, version=2), TOKENS, "fused_attention_v2"),
}


def _dual(function: Callable[[Tensor], Any], x: Tensor, tangent: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, tangent))


WAYS: dict[str, Callable[[Callable[[Tensor], Any], Tensor, Tensor], Any]] = {
    "jvp": lambda function, x, tangent: torch.func.jvp(function, (x,), (tangent,)),
    "jacfwd": lambda function, x, tangent: torch.func.jacfwd(function)(x),
    "dual numbers": _dual,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_it_is_refused(name: str, way: str, with_gradients: bool, device: str) -> None:
    make, sizes, operator = MODULES[name]
    module = make().eval().to(device)
    x, tangent = torch.randn(sizes, device=device), torch.randn(sizes, device=device)
    message = f"^{operator}: forward-mode differentiation is not supported"
    with torch.set_grad_enabled(with_gradients), pytest.raises(RuntimeError, match=message):
        WAYS[way](module, x, tangent)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_refuses_it(device: str) -> None:
    x = torch.randn(PICTURE, device=device)
    with pytest.raises(RuntimeError, match=r"^pad_upsample: forward-mode differentiation is not supported"):
        torch.func.jvp(lambda x: styleforge.ops.pad_upsample(x, 1), (x,), (x,))


@pytest.mark.parametrize("device", DEVICES)
def test_other_tensors_may_have_tangents(device: str) -> None:
    norm = styleforge.FusedInstanceNorm2d(4).eval().to(device)
    x, tangent = torch.randn(PICTURE, device=device), torch.randn(PICTURE, device=device)
    _, found = torch.func.jvp(lambda y: norm(x) * y, (x,), (tangent,))
    torch.testing.assert_close(found, norm(x) * tangent)


@pytest.mark.parametrize("device", DEVICES)
def test_the_last_layers_weight_has_it(device: str) -> None:
    """That convolution is not an operator's where PyTorch's has what ours has not."""
    x, weight = torch.randn(PICTURE, device=device), torch.randn(3, 4, 3, 3, device=device)
    tangent = torch.randn_like(weight)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    with torch.no_grad():
        _, found = torch.func.jvp(lambda w: reflect_conv2d(x, w, None), (weight,), (tangent,))
    torch.testing.assert_close(found, F.conv2d(padded, tangent), rtol=1e-3, atol=1e-3)
