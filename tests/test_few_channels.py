"""Differentiable convolutions of pictures, by the columns of their kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from _reference import assert_as_accurate
from styleforge.models._reflect_conv import reflect_conv2d
from styleforge.ops import _few_channels as few_channels
from styleforge.ops import fused_conv_instance_norm_relu
from styleforge.ops._few_channels import FewInputChannels, ReflectConv2d

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
FORMATS = [torch.contiguous_format, torch.channels_last]
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}
UNFOLD = torch.ops.styleforge._unfold_columns.default


def padded(x: Tensor, padding: tuple[int, int], mode: str) -> Tensor:
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=MODES[mode])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "channels, kernel_width, padding", [(3, 9, (4, 4)), (1, 5, (0, 2)), (4, 1, (1, 0)), (2, 6, (3, 1))]
)
def test_columns_as_channels(
    channels: int,
    kernel_width: int,
    padding: tuple[int, int],
    mode: str,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    device: str,
) -> None:
    x = torch.randn(2, channels, 11, 13, device=device, dtype=dtype).to(memory_format=memory_format)
    for input in (x, x[:, :, 1:, 2:]):
        result = UNFOLD(input, kernel_width, padding, mode)
        wide = padded(input.double(), padding, mode)
        width = wide.shape[3] - kernel_width + 1
        full = 16 // dtype.itemsize
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.shape == (2, -(-channels * kernel_width // full) * full, wide.shape[2], width)
        for j in range(kernel_width):
            part = result[:, j * channels : (j + 1) * channels].double()
            assert torch.equal(part, wide[:, :, :, j : j + width])
        assert not result[:, kernel_width * channels :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_columns_of_an_empty_picture(device: str) -> None:
    for sizes in ((2, 3, 0, 8), (2, 3, 8, 0), (0, 3, 8, 8)):
        x = torch.empty(sizes, device=device)
        result = UNFOLD(x, 3, (2, 2), "zeros")
        assert result.shape == (sizes[0], 12, sizes[2] + 4, sizes[3] + 2)
        assert not result.any()
        if x.shape[0] > 0:
            with pytest.raises(RuntimeError, match=r"non-?empty|non-zero"):
                UNFOLD(x, 3, (2, 2), "replicate")


@pytest.mark.parametrize("major", [7, 8, 9])
def test_gradients_by_column_are_for_tensor_cores_of_8_0(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below, the kernel has nothing in it."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    with FakeTensorMode():
        grad, input, weight = (
            torch.empty(sizes, dtype=torch.float16, device="cuda")
            for sizes in ((2, 32, 8, 8), (2, 32, 16, 8), (32, 32, 9, 1))
        )
    assert few_channels._takes_column_gradient(grad, input, weight) == (major >= 8)


@pytest.mark.parametrize("batch", [0, 1, 65535, 65536])
def test_gradients_by_column_are_for_what_a_grid_holds(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    with FakeTensorMode():
        grad, input, weight = (
            torch.empty(sizes, dtype=torch.float16, device="cuda")
            for sizes in ((batch, 32, 8, 8), (batch, 32, 16, 8), (32, 32, 9, 1))
        )
    assert few_channels._takes_column_gradient(grad, input, weight) == (0 < batch <= 65535)


@pytest.mark.cuda
def test_no_picture_trains() -> None:
    x = torch.empty(0, 3, 16, 16, device="cuda", dtype=torch.float16, requires_grad=True)
    w = torch.randn(32, 3, 9, 9, device="cuda", dtype=torch.float16, requires_grad=True)
    fused_conv_instance_norm_relu(x, w, padding=4).sum().backward()
    assert w.grad is not None and not w.grad.any()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size, padding", [((5, 5), (2, 2)), ((3, 6), (0, 1)), ((4, 5), (1, 3))])
def test_gradients_of_few_input_channels(size: tuple[int, int], padding: tuple[int, int], mode: str) -> None:
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, *size, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = FewInputChannels.apply(x, w, padding, mode)  # type: ignore[no-untyped-call]
        return result

    torch.testing.assert_close(function(x, w), F.conv2d(padded(x, padding, mode), w))
    assert torch.autograd.gradcheck(function, (x, w))


@pytest.mark.parametrize("size", [(5, 5), (3, 7), (1, 5)])
def test_gradients_of_few_output_channels(size: tuple[int, int]) -> None:
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ReflectConv2d.apply, (x, w, b))
    assert torch.autograd.gradcheck(ReflectConv2d.apply, (x, w, None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("sizes", [(1, 5, 3), (2, 40, 64), (3, 21, 65), (1, 100, 200)], ids=str)
def test_column_gradient(sizes: tuple[int, int, int], rows: int, dtype: torch.dtype, device: str) -> None:
    n, height, width = sizes
    grad = torch.randn(n, 32, height, width, device=device).to(dtype)
    x = torch.randn(n, 32, height + rows - 1, width, device=device).to(dtype)
    for memory_format in FORMATS:
        arguments = (grad.to(memory_format=memory_format), x.to(memory_format=memory_format))
        found = torch.ops.styleforge._column_gradient(*arguments)
        exact = [
            torch.einsum("nayx,nbyx->ab", grad.double(), x[:, :, k : k + height].double())
            for k in range(rows)
        ]
        assert found.dtype == torch.float32
        scale = (n * height * width) ** 0.5
        torch.testing.assert_close(found.double(), torch.stack(exact), rtol=0, atol=1e-5 * scale)
        assert torch.equal(found, torch.ops.styleforge._column_gradient(*arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("size", [(9, 9), (7, 7), (6, 5), (11, 9)])
def test_first_layer_is_as_accurate_as_pytorch(
    size: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 40, 37, device="cuda").to(dtype).to(memory_format=layout)
    w = (torch.randn(32, 3, *size, device="cuda") / 16).to(dtype).to(memory_format=layout)
    padding = (size[0] // 2, size[1] // 2)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return fused_conv_instance_norm_relu(x, w, padding=padding, padding_mode="reflect", activation="none")

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.instance_norm(F.conv2d(padded(x, padding, "reflect"), w))

    _compare(ours, plain, [x, w])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_last_layer_is_as_accurate_as_pytorch(
    autocast: bool, channels: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 32, 40, 37, device="cuda").to(dtype).to(memory_format=layout)
    w = (torch.randn(channels, 32, 9, 9, device="cuda") / 51).to(dtype).to(memory_format=layout)
    b = torch.randn(channels, device="cuda").to(dtype)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if not autocast or x.dtype == torch.float64:
            return reflect_conv2d(x, w, b)
        with torch.autocast("cuda", dtype):
            return reflect_conv2d(x, w.float(), b.float())

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(padded(x, (4, 4), "reflect"), w, b)

    _compare(ours, plain, [x, w, b])


def _compare(ours: object, plain: object, inputs: list[Tensor]) -> None:
    """Result and gradients: repeatable, in the inputs' formats, as near to float64 as PyTorch's."""

    def run(function: object, tensors: list[Tensor], grad: Tensor | None) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        output = function(*leaves)  # type: ignore[operator]
        grad = torch.ones_like(output) if grad is None else grad.to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    torch.manual_seed(0)
    exact_inputs = [t.double() for t in inputs]
    grad = torch.randn_like(run(plain, exact_inputs, None)[0]).to(inputs[0].dtype)
    exact = run(plain, exact_inputs, grad)
    theirs = run(plain, inputs, grad)
    found = run(ours, inputs, grad)
    for a, b in zip(found, run(ours, inputs, grad), strict=True):
        assert torch.equal(a, b)
    assert found[2].stride() == inputs[1].stride()  # of the weight
    for result, yardstick, reference in zip(found, theirs, exact, strict=True):
        assert_as_accurate(result, yardstick, reference, ulps=1.0)


def test_double_backward_says_that_it_is_not_supported() -> None:
    """Also where the gradient of the result needs none: a gradient penalty must not vanish without a word."""
    x = torch.randn(1, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    cases = {
        "fused_conv_instance_norm_relu": lambda: FewInputChannels.apply(x, w, (2, 2), "reflect"),
        "reflect_conv2d": lambda: ReflectConv2d.apply(x, w, None),
    }
    for name, call in cases.items():
        (grad,) = torch.autograd.grad(call().sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}: double backward is not supported"):
            (x.sum() + grad.square().sum()).backward()
