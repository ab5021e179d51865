"""styleforge.graphed: a model as one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import styleforge
from styleforge import graphs
from styleforge.models import TransformerNet


def test_the_example_must_be_on_the_gpu() -> None:
    with pytest.raises(
        ValueError, match="graphed: example must hold tensors, and all of them on a CUDA device"
    ):
        styleforge.graphed(nn.ReLU().eval(), torch.ones(2))
    with pytest.raises(ValueError, match="graphed: example must hold tensors"):
        styleforge.graphed(lambda n: n, 3)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"graphed: the model is in training mode; call model.eval\(\) first"
    ):
        styleforge.graphed(nn.Dropout(), torch.ones(2))


def test_copies_of_arguments_may_be_written_to_in_every_mode() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
        copies = [graphs._copy(x)]
    copies.append(graphs._copy(x))
    for copy in copies:
        with torch.no_grad():
            copy.copy_(x + 1)
        with torch.inference_mode():
            copy.copy_(x + 2)
        assert copy.tolist() == [3, 3]


@pytest.mark.cuda
def test_captured_in_inference_mode_and_called_outside() -> None:
    layer = styleforge.FusedInstanceNorm2d(4).eval().cuda()
    with torch.inference_mode():
        x, y = torch.randn(2, 1, 4, 8, 8, device="cuda")
        fast = styleforge.graphed(layer, x)
    with torch.no_grad():
        assert torch.equal(fast(y), layer(y))
    with torch.inference_mode():
        assert torch.equal(fast(x), layer(x))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_network_replays_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = TransformerNet().eval().to("cuda", dtype)
    pictures = [torch.rand(1, 3, 64, 80).to("cuda", dtype) * 255 for _ in range(3)]
    fast = styleforge.graphed(model, pictures[0])
    with torch.inference_mode():
        for picture in (*pictures, pictures[0]):
            assert torch.equal(fast(picture), model(picture))
        for parameter in model.parameters():
            parameter.mul_(0.9)
        assert torch.equal(fast(pictures[1]), model(pictures[1]))


@pytest.mark.cuda
def test_ten_thousand_replays() -> None:
    layer = styleforge.FusedConvInstanceNormReLU(64, 64, 3).eval().half().cuda()
    picture = torch.randn(1, 64, 64, 64).half().cuda().contiguous(memory_format=torch.channels_last)
    fast = styleforge.graphed(layer, picture)
    with torch.inference_mode():
        expected = layer(picture)
        for _ in range(10_000):
            result = fast(picture)
    assert torch.equal(result, expected)


@pytest.mark.cuda
def test_nested_arguments_and_results() -> None:
    def model(pair: tuple[Tensor, Tensor], scale: float) -> dict[str, Tensor]:
        return {"sum": (pair[0] + pair[1]) * scale, "first": pair[0]}

    a, b = torch.randn(2, 5, device="cuda")
    fast = styleforge.graphed(model, ((a, b), 2.0))
    result = fast((b, b), 2.0)
    torch.testing.assert_close(result["sum"], 4 * b)
    torch.testing.assert_close(result["first"], b)


@pytest.mark.cuda
def test_the_captured_parameters_outlive_the_models() -> None:
    layer = styleforge.FusedInstanceNorm2d(256).eval().cuda()
    picture = torch.randn(1, 256, 8, 8, device="cuda")
    fast = styleforge.graphed(layer, picture)
    expected = fast(picture).clone()
    layer.load_state_dict({name: t * 2 for name, t in layer.state_dict().items()}, assign=True)
    others = [torch.full((256,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(fast(picture), expected)
    del others


@pytest.mark.cuda
def test_calls_on_two_streams_do_not_overtake_each_other() -> None:
    def model(x: Tensor) -> Tensor:
        torch.cuda._sleep(50_000_000)
        return x * 2

    pictures = list(torch.randn(4, 256, 256, device="cuda"))
    fast = styleforge.graphed(model, pictures[0])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for i, picture in enumerate(pictures):
        with torch.cuda.stream(streams[i % 2]):
            results.append(fast(picture).clone())
    torch.cuda.synchronize()
    for picture, result in zip(pictures, results, strict=True):
        assert torch.equal(result, picture * 2)


@pytest.mark.cuda
def test_other_arguments_are_refused() -> None:
    fast = styleforge.graphed(lambda x, n: x * n, (torch.ones(2, 3, device="cuda"), 2))
    with pytest.raises(ValueError, match=r"argument 0 was captured with shape \[2, 3\], got \[3, 2\]"):
        fast(torch.ones(3, 2, device="cuda"), 2)
    with pytest.raises(
        ValueError, match=r"argument 0 was captured with dtype torch.float32, got torch.float16"
    ):
        fast(torch.ones(2, 3, device="cuda", dtype=torch.float16), 2)
    with pytest.raises(ValueError, match=r"argument 0 was captured with device cuda:0, got cpu"):
        fast(torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="argument 1 was captured as 2, got 3"):
        fast(torch.ones(2, 3, device="cuda"), 3)
    with pytest.raises(ValueError, match="graphed: expected arguments like"):
        fast(torch.ones(2, 3, device="cuda"))
