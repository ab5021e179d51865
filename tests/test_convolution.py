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

FORWARD = torch.ops.styleforge._convolution
BACKWARD = torch.ops.styleforge._convolution_backward
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}
FORMATS = [torch.contiguous_format, torch.channels_last]
PREFIX = "convolution_backward:cuda:"
needs_sm90 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="kernels of sm_90a"
)

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


def _plain(
    input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], mode: str
) -> Tensor:
    wide = F.pad(input, (padding[1], padding[1], padding[0], padding[0]), mode=MODES[mode])
    return F.conv2d(wide, weight, None, stride)


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], mode: str
) -> tuple[Tensor, ...]:
    leaves = [input.detach().requires_grad_(), weight.detach().requires_grad_()]
    return torch.autograd.grad(_plain(*leaves, stride, padding, mode), leaves, grad)


def _assert_accurate(arguments: tuple[Any, ...], found: tuple[Tensor, ...], mode: str = "zeros") -> None:
    """The result and both gradients."""
    grad, input, weight, *rest = arguments
    wide = [t.double() for t in (grad, input, weight)]
    exact = (_plain(*wide[1:], *rest, mode), *_gradients(*wide, *rest, mode))
    theirs = (_plain(input, weight, *rest, mode), *_gradients(*arguments, mode))
    for result, yardstick, reference in zip(found, theirs, exact, strict=True):
        assert_as_accurate(result, yardstick, reference, factor=1.2)


def _run(arguments: tuple[Any, ...], mode: str = "zeros") -> tuple[Tensor, ...]:
    return FORWARD(*arguments[1:], mode), *BACKWARD(*arguments, mode, True, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck(
    needs: tuple[bool, bool], mode: str, memory_format: torch.memory_format, device: str
) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    layout = "channels_last" if memory_format == torch.channels_last else "contiguous"
    for shape in ((2, 8, 32, (7, 9), (1, 1), (1, 1)), (1, 8, 8, (3, 3), (1, 1), (0, 0))):
        arguments = _arguments(shape, dtype, device, layout, memory_format)
        torch.library.opcheck(FORWARD.default, (*arguments[1:], mode))
        torch.library.opcheck(BACKWARD.default, (*arguments, mode, *needs))
        results = BACKWARD(*arguments, mode, *needs)
        for result, needed, like in zip(results, needs, arguments[1:3], strict=True):
            assert result.shape == (like.shape if needed else (0,))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_convolution(mode: str) -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for stride, padding in (((1, 1), (1, 1)), ((2, 1), (0, 2))):

        def function(
            x: Tensor, w: Tensor, stride: tuple[int, int] = stride, padding: tuple[int, int] = padding
        ) -> Tensor:
            result: Tensor = Convolution.apply(x, w, stride, padding, mode)  # type: ignore[no-untyped-call]
            return result

        torch.testing.assert_close(function(x, w), _plain(x, w, stride, padding, mode))
        assert torch.autograd.gradcheck(function, (x, w))
        assert torch.autograd.gradcheck(lambda x: function(x, w.detach()), (x,))
        assert torch.autograd.gradcheck(lambda w: function(x.detach(), w), (w,))


def test_double_backward_says_that_it_is_not_supported() -> None:
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    output: Tensor = Convolution.apply(x, w, (1, 1), (1, 1), "zeros")  # type: ignore[no-untyped-call]
    (grad,) = torch.autograd.grad(output.sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        (x.sum() + grad.square().sum()).backward()


def test_vmap() -> None:
    x, w = torch.randn(3, 2, 4, 6, 5), torch.randn(3, 4, 4, 3, 3)
    grads = torch.randn(3, 2, 4, 6, 5)
    rest: Any = ((1, 1), (1, 1), "reflect")
    found = torch.func.vmap(lambda g, x, w: BACKWARD(g, x, w, *rest, True, True))(grads, x, w)
    forward = torch.func.vmap(lambda x, w: FORWARD(x, w, *rest))(x, w)
    of_one = torch.func.vmap(lambda x: FORWARD(x, w[0], *rest), in_dims=1)(x)
    for i in range(3):
        for a, b in zip(found, _gradients(grads[i], x[i], w[i], *rest), strict=True):
            torch.testing.assert_close(a[i], b)
        torch.testing.assert_close(forward[i], _plain(x[i], w[i], *rest))
    for i in range(2):
        torch.testing.assert_close(of_one[i], _plain(x[:, i], w[0], *rest))


@pytest.mark.cuda
@needs_sm90
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_accurate_as_pytorch(
    shape: tuple[Any, ...], mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory that results and workspace come from is full of NaNs; twice the same bits."""
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    arguments = _arguments(shape, dtype, "cuda")
    full_of_nans = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del full_of_nans
    FORWARD(*arguments[1:], mode)
    # A convolution of fewer channels than half a chunk is not one of sm_90a; nor is a gradient with a stride.
    assert styleforge.last_path() == f"convolution:cuda:{'sm90' if shape[1] >= 32 else 'aten'}"
    found = _run(arguments, mode)
    own_input = shape[4] == (1, 1) and shape[2] >= 32
    assert styleforge.last_path() == f"{PREFIX}{'sm90' if own_input else 'aten'}+weight:sm90"
    _assert_accurate(arguments, found, mode)
    for alone in ((True, False), (False, True)):
        again = BACKWARD(*arguments, mode, *alone)
        for a, b, needed, own in zip(again, found[1:], alone, (own_input, True), strict=True):
            assert not needed or not own or torch.equal(a, b)


@pytest.mark.cuda
@needs_sm90
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sliced", "transposed", "offset", "expanded"]
)
@pytest.mark.parametrize("weight_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_every_layout(
    mode: str, weight_format: torch.memory_format, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(
        (2, 64, 40, (19, 23), (1, 1), (1, 1)), torch.float16, "cuda", layout, weight_format
    )
    channels_last = layout == "channels_last"
    for path in ("sm90", "aten_conv", ""):
        monkeypatch.setenv("STYLEFORGE_PATH", path)
        found = _run(arguments, mode)
        assert path != "aten_conv" or styleforge.last_path() == f"{PREFIX}aten+weight:aten"
        _assert_accurate(arguments, found, mode)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert all(t.is_contiguous(memory_format=memory_format) for t in found[:2])
        assert found[2].stride() == arguments[2].stride()


@pytest.mark.cuda
@needs_sm90
@pytest.mark.parametrize("boxes", [1, 3])
@pytest.mark.parametrize("splits, stages, keep", [(1, 2, 0), (5, 3, 1), (100, 8, 0), (100, 8, 1)])
def test_every_cut(boxes: int, splits: int, stages: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    tune = f"boxes={boxes},splits={splits},stages={stages},keep={keep}"
    monkeypatch.setenv("STYLEFORGE_GRADIENT_TUNE", tune)
    arguments = _arguments((3, 64, 64, (40, 50), (1, 1), (1, 1)), torch.float16, "cuda")
    for mode in MODES:
        _assert_accurate(arguments, _run(arguments, mode), mode)


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
@pytest.mark.parametrize("mode", MODES)
def test_nothing_in_nothing_out(mode: str) -> None:
    x = torch.randn((0, 16, 8, 8), device="cuda", dtype=torch.float16)
    w = torch.randn(24, 16, 3, 3, device="cuda", dtype=torch.float16)
    y = FORWARD(x, w, (1, 1), (1, 1), mode)
    assert y.shape == (0, 24, 8, 8)
    grad_input, grad_weight = BACKWARD(y, x, w, (1, 1), (1, 1), mode, True, True)
    assert grad_input.shape == x.shape
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
        ("padding must be smaller than the input", (grad, x, w, stride, (6, 1))),
    ]
    for message, arguments in cases:
        with pytest.raises(RuntimeError, match=f"_convolution_backward: {message}"):
            BACKWARD(*arguments, "reflect", True, True)
        if "grad_output" not in message:
            with pytest.raises(RuntimeError, match=f"_convolution: {message}"):
                FORWARD(*arguments[1:], "reflect")
