"""Both gradients of a convolution: our kernels, cuDNN's elsewhere, and the convolution that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import styleforge
from _cuda import capture, no_synchronisation
from _reference import DEVICES, assert_as_accurate, tensor
from styleforge.ops import fused_conv_instance_norm_relu
from styleforge.ops._convolution import Convolution

OP = torch.ops.styleforge._convolution_backward
FORMATS = [torch.contiguous_format, torch.channels_last]
PREFIX = "convolution_backward:cuda:"

# batch, in_channels, out_channels, size, stride, padding: tiles that are full and that stand over, channels
# that fill a block and that do not, a block with one tile and one with several.
SHAPES = [
    (1, 128, 128, (64, 64), (1, 1), (1, 1)),
    (2, 64, 96, (37, 45), (1, 1), (1, 1)),
    (3, 40, 72, (5, 7), (1, 1), (1, 1)),
    (2, 64, 32, (18, 34), (1, 1), (0, 0)),
    (1, 8, 8, (3, 3), (1, 1), (0, 0)),
    (1, 72, 64, (9, 21), (1, 1), (2, 2)),
    (1, 64, 128, (64, 64), (2, 2), (1, 1)),
    (2, 72, 40, (31, 29), (2, 2), (1, 1)),
    (1, 32, 64, (66, 66), (2, 2), (0, 0)),
    (2, 16, 24, (12, 33), (2, 1), (1, 0)),
    (2, 16, 24, (12, 33), (1, 2), (0, 2)),
    (1, 8, 8, (4, 2), (1, 2), (1, 1)),
    (5, 320, 256, (16, 24), (1, 1), (1, 1)),
]


def _arguments(
    shape: tuple[Any, ...],
    dtype: torch.dtype,
    device: str,
    layout: str = "channels_last",
    weight_format: torch.memory_format = torch.channels_last,
) -> tuple[Any, ...]:
    """grad_output, input, weight, stride, padding."""
    n, ci, co, size, stride, padding = shape
    out = [(size[d] + 2 * padding[d] - 3) // stride[d] + 1 for d in range(2)]
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    weight = tensor(co, ci, 3, 3, scale=(9 * ci) ** -0.5, **given).contiguous(memory_format=weight_format)
    grad = tensor(n, co, *out, layout=layout, **given)
    return grad, tensor(n, ci, *size, layout=layout, **given), weight, stride, padding


def _aten(
    grad: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (True, True, False)
    )
    return found[0], found[1]


def _assert_accurate(arguments: tuple[Any, ...], found: tuple[Tensor, ...], factor: float = 1.2) -> None:
    grad, input, weight, *rest = arguments
    exact = _aten(grad.double(), input.double(), weight.double(), *rest)
    theirs = _aten(*arguments)
    for result, yardstick, reference in zip(found, theirs, exact, strict=True):
        assert_as_accurate(result, yardstick, reference, factor=factor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck(needs: tuple[bool, bool], memory_format: torch.memory_format, device: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    layout = "channels_last" if memory_format == torch.channels_last else "contiguous"
    for shape in ((2, 8, 16, (7, 9), (1, 1), (1, 1)), (1, 8, 8, (3, 3), (1, 1), (0, 0))):
        arguments = _arguments(shape, dtype, device, layout, memory_format)
        torch.library.opcheck(OP.default, (*arguments, *needs))
        results = OP(*arguments, *needs)
        for result, needed, like in zip(results, needs, arguments[1:3], strict=True):
            assert result.shape == (like.shape if needed else (0,))


def test_gradients_of_the_convolution() -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for stride, padding in (((1, 1), (1, 1)), ((2, 1), (0, 2))):

        def function(
            x: Tensor, w: Tensor, stride: tuple[int, int] = stride, padding: tuple[int, int] = padding
        ) -> Tensor:
            result: Tensor = Convolution.apply(x, w, stride, padding)  # type: ignore[no-untyped-call]
            return result

        torch.testing.assert_close(function(x, w), F.conv2d(x, w, None, stride, padding))
        assert torch.autograd.gradcheck(function, (x, w))
        assert torch.autograd.gradcheck(lambda x: function(x, w.detach()), (x,))
        assert torch.autograd.gradcheck(lambda w: function(x.detach(), w), (w,))


def test_double_backward_says_that_it_is_not_supported() -> None:
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    output: Tensor = Convolution.apply(x, w, (1, 1), (1, 1))  # type: ignore[no-untyped-call]
    (grad,) = torch.autograd.grad(output.sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        (x.sum() + grad.square().sum()).backward()


def test_vmap_over_both_operands() -> None:
    x, w = torch.randn(3, 2, 4, 6, 5), torch.randn(3, 4, 4, 3, 3)
    grads = torch.randn(3, 2, 4, 4, 3)
    found = torch.func.vmap(lambda g, x, w: OP(g, x, w, (1, 1), (0, 0), True, True))(grads, x, w)
    for i in range(3):
        expected = _aten(grads[i], x[i], w[i], (1, 1), (0, 0))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_accurate_as_pytorch(
    shape: tuple[Any, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory that results and workspace come from is full of NaNs; twice the same bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels of sm_90a")
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    arguments = _arguments(shape, dtype, "cuda")
    full_of_nans = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del full_of_nans
    found = OP(*arguments, True, True)
    # A convolution of fewer channels than half a chunk is not one of sm_90a; nor is one with a stride.
    own_input = shape[4] == (1, 1) and shape[2] >= 32
    assert styleforge.last_path() == f"{PREFIX}{'sm90' if own_input else 'aten'}+weight:sm90"
    _assert_accurate(arguments, found)
    for alone in ((True, False), (False, True)):
        for a, b, needed in zip(OP(*arguments, *alone), found, alone, strict=True):
            assert not needed or not (own_input or alone[1]) or torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sliced", "transposed", "offset", "expanded"]
)
@pytest.mark.parametrize("weight_format", FORMATS, ids=["nchw", "channels_last"])
def test_every_layout(
    weight_format: torch.memory_format, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(
        (2, 64, 40, (19, 23), (1, 1), (1, 1)), torch.float16, "cuda", layout, weight_format
    )
    for path in ("sm90", "aten_conv", ""):
        monkeypatch.setenv("STYLEFORGE_PATH", path)
        found = OP(*arguments, True, True)
        assert not path or path.startswith("sm90") or styleforge.last_path() == f"{PREFIX}aten+weight:aten"
        _assert_accurate(arguments, found)
        assert found[0].is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        assert found[1].stride() == arguments[2].stride()


@pytest.mark.cuda
@pytest.mark.parametrize("boxes", [1, 3])
@pytest.mark.parametrize("splits, stages", [(1, 2), (5, 3), (100, 8)])
def test_every_cut(boxes: int, splits: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels of sm_90a")
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    monkeypatch.setenv("STYLEFORGE_GRADIENT_TUNE", f"boxes={boxes},splits={splits},stages={stages}")
    arguments = _arguments((3, 64, 64, (40, 50), (1, 1), (1, 1)), torch.float16, "cuda")
    _assert_accurate(arguments, OP(*arguments, True, True))


@pytest.mark.cuda
def test_steps_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's, under autocast, in a graph and without a look at the host; none is left out."""
    x = torch.randn(2, 64, 40, 48, device="cuda").contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device="cuda") / 24
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def step(plain: bool = False) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.float16):
            if plain:
                wide = F.pad(leaves[0], (1, 1, 1, 1), mode="reflect")
                y = F.relu(F.instance_norm(F.conv2d(wide, leaves[1])))
            else:
                y = fused_conv_instance_norm_relu(*leaves, padding=1, padding_mode="reflect")
        return torch.autograd.grad(y, leaves, torch.ones_like(y) * y.detach())

    found = step()
    with no_synchronisation():
        step()
    graph, captured = capture(step)
    for _ in range(3):
        graph.replay()
    for a, b, c, leaf in zip(found, captured, step(plain=True), leaves, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32 and a.stride() == leaf.stride()
        torch.testing.assert_close(a, c, rtol=0.02, atol=0.02 * c.abs().max().item())


@pytest.mark.cuda
def test_nothing_in_nothing_out() -> None:
    for sizes in ((0, 16, 8, 8), (2, 16, 8, 8)):
        x = torch.randn(sizes, device="cuda", dtype=torch.float16)
        w = torch.randn(24, 16, 3, 3, device="cuda", dtype=torch.float16)
        grad_input, grad_weight = OP(x.new_zeros(sizes[0], 24, 6, 6), x, w, (1, 1), (0, 0), True, True)
        assert grad_input.shape == x.shape and not grad_input.any()
        assert grad_weight.shape == w.shape and not grad_weight.any()


@pytest.mark.cuda
def test_errors_name_the_argument() -> None:
    grad, x, w, stride, padding = _arguments((1, 8, 8, (6, 6), (1, 1), (1, 1)), torch.float16, "cuda")
    cases: list[tuple[str, tuple[Any, ...]]] = [
        (r"weight must have shape \[out_channels, 8, ", (grad, x, w[:, :4], stride, padding)),
        ("weight must have the dtype of input", (grad, x, w.float(), stride, padding)),
        (r"grad_output must have shape \[1, 8, 6, 6\]", (grad[:, :, 1:], x, w, stride, padding)),
        ("stride must be two integers >= 1", (grad, x, w, (0, 1), padding)),
        ("padding must be two integers >= 0", (grad, x, w, stride, (-1, 1))),
    ]
    for message, arguments in cases:
        with pytest.raises(RuntimeError, match=f"_convolution_backward: {message}"):
            OP(*arguments, True, True)
