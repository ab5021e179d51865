"""What a server asks of an operator: streams, graphs, devices, determinism, memory, no synchronisation."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _cuda import capture, no_synchronisation
from _reference import conv_instance_norm, instance_norm, max_error, rms_error, tensor, tf32

NORM = torch.ops.styleforge.fused_instance_norm
CONV = torch.ops.styleforge.fused_conv_instance_norm_relu
cuda = pytest.mark.cuda

# STYLEFORGE_PATH, layout, sizes: one of each path the norm has.
PATHS = [
    ("", "contiguous", (2, 16, 32, 32)),
    ("", "contiguous", (2, 20, 191, 193)),
    ("plane", "contiguous", (1, 2, 640, 512)),
    ("", "channels_last", (60, 61, 23, 21)),
    ("", "channels_last", (2, 37, 101, 99)),
    ("split", "contiguous", (2, 16, 64, 64)),
    ("split", "channels_last", (2, 37, 101, 99)),
    ("portable", "contiguous", (1, 3, 511, 513)),
    ("ticket", "contiguous", (1, 2, 2048, 2048)),
    ("", "contiguous", (1, 3, 512, 512)),
    ("bulk", "contiguous", (2, 20, 192, 192)),
    ("stream", "contiguous", (3, 50, 132, 144)),  # more than a tile a plane, more than one a multiprocessor
    ("stream", "contiguous", (1, 3, 512, 512)),  # a tile a multiprocessor
    ("stream", "contiguous", (5, 60, 72, 64)),  # a plane a tile: no workspace
    ("stream", "channels_last", (3, 64, 96, 100)),
    ("stream", "channels_last", (1, 320, 100, 96)),  # slices of the channels
    ("", "channels_last", (1, 3, 512, 512)),  # few channels
]


def _force(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    if path:
        monkeypatch.setenv("STYLEFORGE_PATH", path)


def _conv_arguments(
    device: str, layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    return dict(
        input=tensor(2, 8, 33, 40, device=device, layout=layout, dtype=dtype),
        weight=(torch.randn(16, 8, 3, 3) / 8).to(dtype).to(device),
        norm_weight=torch.rand(16, device=device) + 0.5,
        norm_bias=torch.rand(16, device=device),
        stride=[2, 2],
        padding=[1, 1],
        padding_mode="reflect",
    )


# --- CUDA graphs ----------------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize(("forced", "layout", "sizes"), PATHS, ids=str)
def test_graph_capture_and_a_hundred_replays_of_the_norm(
    forced: str, layout: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _force(monkeypatch, forced)
    x, r = tensor(*sizes, device="cuda", layout=layout), tensor(*sizes, device="cuda", layout=layout)
    weight, bias = torch.rand(sizes[1], device="cuda"), torch.rand(sizes[1], device="cuda")
    with torch.no_grad():
        graph, result = capture(lambda: NORM(x, weight, bias, 1e-5, "relu", 0.01, r))
        for i in range(100):
            x.normal_(mean=float(i), std=1.0 + i)
            r.normal_()
            graph.replay()
            if i % 10 == 0 or i == 99:
                assert torch.equal(result, NORM(x, weight, bias, 1e-5, "relu", 0.01, r))


@cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_graph_capture_and_a_hundred_replays_of_the_convolution(upsample: int, layout: str) -> None:
    given = _conv_arguments("cuda", layout)
    x = given["input"]
    with torch.no_grad():
        graph, result = capture(lambda: CONV(**given, upsample=upsample))
        for i in range(100):
            x.normal_(std=1.0 + i)
            graph.replay()
        torch.testing.assert_close(result, CONV(**given, upsample=upsample), rtol=1e-5, atol=1e-5)


@cuda
@pytest.mark.parametrize("operator", ["norm", "conv"])
def test_graph_capture_of_a_training_step(operator: str) -> None:
    given = _conv_arguments("cuda", "channels_last")
    x = given["input"]
    parameters = [given["norm_weight"], given["norm_bias"]]
    if operator == "conv":
        parameters.append(given["weight"])
    else:
        parameters = [torch.rand(8, device="cuda"), torch.rand(8, device="cuda")]
    for p in parameters:
        p.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        if operator == "conv":
            loss = CONV(**given).square().sum()
        else:
            loss = NORM(x, *parameters, 1e-5, "silu").square().sum()
        return torch.autograd.grad(loss, parameters)

    graph, gradients = capture(step)
    for _ in range(5):
        x.normal_()
        graph.replay()
        captured = [g.clone() for g in gradients]
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- streams and devices --------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize(("forced", "layout", "sizes"), PATHS, ids=str)
def test_the_current_stream_is_used(
    forced: str, layout: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input becomes right only late on a side stream: a kernel on another one reads the old values."""
    _force(monkeypatch, forced)
    right = tensor(*sizes, device="cuda", layout=layout, scale=3.0)
    expected = NORM(right, activation="relu")
    x = torch.full_like(right, float("nan"))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        x.copy_(right)
        result = NORM(x, activation="relu")
        x.fill_(float("nan"))  # and it is read before what follows on the stream
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@cuda
def test_two_streams_at_once() -> None:
    """Workspaces of calls that run at the same time must not be shared."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [tensor(2, 3, 700, 701, device="cuda", offset=float(i), scale=1.0 + i) for i in range(2)]
    inputs += [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    expected = [NORM(x, activation="silu") for x in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[k] += [NORM(inputs[k], activation="silu"), NORM(inputs[k + 2], activation="silu")]
    torch.cuda.synchronize()
    for k in range(2):
        for i, result in enumerate(results[k]):
            assert torch.equal(result, expected[k + 2 * (i % 2)])


@cuda
@pytest.mark.parametrize(
    ("layout", "tune"),
    [
        ("contiguous", ""),
        ("contiguous", "grid=40,stages=1,bytes=4096"),
        ("contiguous", "grid=40,stages=1,bytes=4096,order=1"),
        ("channels_last", ""),
        ("channels_last", "grid=40,stages=2"),
    ],
)
def test_streaming_norms_on_three_streams_at_once(
    layout: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of different calls share the multiprocessors, so no call can count on all of its own running."""
    _force(monkeypatch, "stream")
    monkeypatch.setenv("STYLEFORGE_TUNE", tune)
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [
        tensor(2, 8, 512, 512, device="cuda", layout=layout, offset=float(i), scale=1.0 + i) for i in range(3)
    ]
    expected = [NORM(x, activation="silu") for x in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], [], []]
    for _ in range(10):
        for own, x, stream in zip(results, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                own.append(NORM(x, activation="silu"))
    torch.cuda.synchronize()
    for own, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in own)


@cuda
def test_resident_convolutions_on_three_streams_at_once() -> None:
    """Grids that wait for themselves: two that hold half of the multiprocessors each would wait for ever."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    given = []
    for k in range(3):
        x = tensor(1, 64, 128, 128 + 16 * k, device="cuda", dtype=torch.float16, layout="channels_last")
        given.append(dict(input=x, weight=(torch.randn(128, 64, 3, 3) / 24).half().cuda(), padding=[1, 1]))
    with torch.inference_mode():
        expected = [CONV(**one) for one in given]
        torch.cuda.synchronize()
        results: list[list[Tensor]] = [[], [], []]
        for _ in range(50):
            for own, one, stream in zip(results, given, streams, strict=True):
                with torch.cuda.stream(stream):
                    own += [CONV(**one), NORM(one["input"])]
        torch.cuda.synchronize()
    for own, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in own[::2])


@cuda
def test_the_streaming_norm_overwrites_the_convolutions_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, also where blocks take the parts of tiles that others are about to overwrite."""
    _force(monkeypatch, "stream")
    # Which no path but ATen's convolution takes.
    wide: dict[str, Any] = dict(device="cuda", dtype=torch.float64)
    x, w = tensor(2, 8, 256, 256, **wide), torch.randn(16, 8, 1, 1, **wide) / 3
    given = dict(input=x, weight=w, residual=tensor(2, 16, 256, 256, **wide), activation="silu")
    with torch.inference_mode():
        monkeypatch.setenv("STYLEFORGE_TUNE", "bytes=4096")
        expected = CONV(**given)
        assert styleforge.last_path().endswith("instance_norm:cuda:stream")
        for grid in (1, 7, 132):
            monkeypatch.setenv("STYLEFORGE_TUNE", f"bytes=4096,stages=1,grid={grid}")
            for _ in range(3):
                assert torch.equal(CONV(**given), expected)
        reference = conv_instance_norm(**given)
    assert rms_error(expected, reference) < 1e-13


@cuda
def test_threads_with_streams_of_their_own() -> None:
    given = _conv_arguments("cuda")
    expected = CONV(**given)
    torch.cuda.synchronize()
    failures: list[str] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
                for _ in range(30):
                    result = CONV(**given)
                torch.cuda.current_stream().synchronize()
                if not torch.allclose(result, expected, rtol=1e-4, atol=1e-4):
                    failures.append("another result")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("forced", "layout", "sizes"), PATHS, ids=str)
def test_the_second_device_while_the_first_is_current(
    forced: str, layout: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _force(monkeypatch, forced)
    assert torch.cuda.current_device() == 0
    x = tensor(*sizes, device="cuda:1", layout=layout).requires_grad_()
    result = NORM(x, activation="silu")
    assert result.device == torch.device("cuda:1")
    grad = torch.randn_like(result)
    result.backward(grad)
    assert torch.cuda.current_device() == 0
    first = x.detach().to("cuda:0").requires_grad_()
    same = NORM(first, activation="silu")
    same.backward(grad.to("cuda:0"))
    assert torch.equal(result.cpu(), same.cpu())
    assert x.grad is not None and first.grad is not None
    assert torch.equal(x.grad.cpu(), first.grad.cpu())


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_convolution_on_the_second_device() -> None:
    given = _conv_arguments("cpu")
    with tf32(False):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
            with torch.no_grad():
                result = CONV(**moved)
            trained = CONV(**{**moved, "weight": moved["weight"].clone().requires_grad_()})
            trained.sum().backward()
            assert result.device == torch.device(device) and torch.cuda.current_device() == 0
            for y in (result, trained):
                assert max_error(y, conv_instance_norm(**given)) < 1e-4


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_two_gpus_are_refused() -> None:
    with pytest.raises(RuntimeError, match="weight must be on the device of input, cuda:1, got cuda:0"):
        NORM(torch.ones(1, 2, 3, 3, device="cuda:1"), torch.ones(2, device="cuda:0"))


# --- determinism ----------------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("forced", "layout", "sizes"), PATHS, ids=str)
def test_twenty_runs_are_bitwise_equal(
    forced: str, layout: str, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, while other work on another stream disturbs the order of blocks."""
    _force(monkeypatch, forced)
    x = tensor(*sizes, dtype=dtype, device="cuda", layout=layout).requires_grad_()
    w = torch.rand(sizes[1], device="cuda", requires_grad=True)
    b = torch.rand(sizes[1], device="cuda", requires_grad=True)
    r = tensor(*sizes, dtype=dtype, device="cuda", layout=layout).requires_grad_()
    grad = tensor(*sizes, dtype=dtype, device="cuda", layout=layout)
    noise, side = torch.randn(1500, 1500, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    first: tuple[Tensor, ...] | None = None
    for i in range(20):
        if i % 2:
            with torch.cuda.stream(side):
                noise @ noise
        y = NORM(x, w, b, 1e-5, "silu", 0.01, r)
        results = (y.detach(), *torch.autograd.grad(y, (x, w, b, r), grad))
        if first is None:
            first = tuple(t.clone() for t in results)
            continue
        assert all(torch.equal(a, c) for a, c in zip(first, results, strict=True)), f"run {i}"


@cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_twenty_runs_of_the_convolution_are_bitwise_equal(dtype: torch.dtype, layout: str) -> None:
    given = _conv_arguments("cuda", layout, dtype)
    for upsample in (1, 2):
        first = CONV(**given, upsample=upsample)
        for _ in range(19):
            assert torch.equal(CONV(**given, upsample=upsample), first)


@cuda
def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Not bitwise (the cut may differ with the batch), but to rounding."""
    x = tensor(8, 16, 96, 96, device="cuda", offset=5.0)
    whole = NORM(x)
    for i in range(8):
        torch.testing.assert_close(NORM(x[i : i + 1])[0], whole[i], rtol=1e-5, atol=1e-5)


# --- synchronisation and memory -------------------------------------------------------------------


@cuda
@pytest.mark.parametrize(("forced", "layout", "sizes"), PATHS, ids=str)
def test_no_call_waits_for_the_device(
    forced: str, layout: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _force(monkeypatch, forced)
    x = tensor(*sizes, device="cuda", layout=layout).requires_grad_()
    w = torch.rand(sizes[1], device="cuda", requires_grad=True)
    grad = tensor(*sizes, device="cuda", layout=layout)
    with no_synchronisation():
        torch.autograd.grad(NORM(x, w, None, 1e-5, "relu", 0.01, x), (x, w), grad)
        with torch.inference_mode():
            NORM(x, w, None, 1e-5, "relu", 0.01, x)


@cuda
def test_calls_return_before_the_device_is_done() -> None:
    """What set_sync_debug_mode does not see: a synchronisation by the library itself."""
    x = tensor(1, 3, 700, 700, device="cuda")
    given = _conv_arguments("cuda")

    def calls() -> None:
        NORM(x)
        NORM(x.contiguous(memory_format=torch.channels_last))
        CONV(**given)

    for _ in range(2):  # memory and kernels are there from now on: to get them may wait
        calls()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # cycles, some 300 ms
    event = torch.cuda.Event()
    calls()
    event.record()
    assert not event.query()
    torch.cuda.synchronize()


@cuda
def test_the_convolution_does_not_wait_for_the_device() -> None:
    given = _conv_arguments("cuda")
    with torch.inference_mode():
        CONV(**given)
        with no_synchronisation():
            CONV(**given)
            CONV(**given, upsample=2)


def _allocated_by(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """(bytes that stay, most bytes at a time, result) of one call; bytes as asked of PyTorch's allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = function()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    left, peak = after["requested_bytes.all.current"] - before, after["requested_bytes.all.peak"] - before
    return left, peak, result


@cuda
@pytest.mark.parametrize(("forced", "layout", "sizes"), PATHS, ids=str)
def test_the_norm_allocates_its_result_and_little_else(
    forced: str, layout: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _force(monkeypatch, forced)
    x = tensor(*sizes, device="cuda", layout=layout)
    NORM(x)
    left, peak, result = _allocated_by(lambda: NORM(x, activation="relu", residual=x))
    size = result.numel() * result.element_size()
    assert left == size
    workspace = peak - left
    if not styleforge.last_path().startswith(("instance_norm:cuda:split", "instance_norm:cuda:stream")):
        assert workspace == 0
    assert workspace <= max(size // 16, 1 << 20)


@cuda
def test_the_convolution_leaves_only_its_result() -> None:
    x, w = tensor(2, 32, 128, 128, device="cuda"), torch.randn(32, 32, 3, 3, device="cuda") / 17
    with torch.inference_mode():
        CONV(x, w, padding=[1, 1])
        left, _, result = _allocated_by(lambda: CONV(x, w, padding=[1, 1]))
    assert left == result.numel() * 4


@cuda
def test_a_thousand_calls_leave_no_device_memory() -> None:
    x = tensor(2, 8, 64, 64, device="cuda").requires_grad_()
    given = _conv_arguments("cuda")
    given["weight"].requires_grad_()

    def both() -> None:
        NORM(x, activation="silu").sum().backward()
        CONV(**given).sum().backward()

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        both()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@cuda
@pytest.mark.parametrize("sizes", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty_tensors_launch_nothing(sizes: tuple[int, ...]) -> None:
    x = torch.empty(sizes, device="cuda")
    assert NORM(x).shape == sizes
    torch.cuda.synchronize()


@cuda
def test_misaligned_parameters_and_residual() -> None:
    """Vectors are 16 bytes; every tensor alone may start anywhere."""
    sizes = (2, 8, 32, 32)
    for which in range(4):
        tensors = []
        for i, shape in enumerate((sizes, (8,), (8,), sizes)):
            count = 1
            for s in shape:
                count *= s
            start = 1 if i == which else 0
            tensors.append(torch.randn(count + 1, device="cuda")[start : start + count].view(shape))
        x, w, b, r = tensors
        for input in (x, x.contiguous(memory_format=torch.channels_last)):
            result = NORM(input, w, b, 1e-5, "none", 0.01, r)
            assert rms_error(result, instance_norm(x, w, b, residual=r)) < 1e-6


# --- the host -------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes of this process in memory now (getrusage has the peak, which another test may have set)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


@linux
def test_calls_do_not_leak_host_memory() -> None:
    """200,000 calls with string arguments: the stable ABI's stock conversion leaks each of them."""
    x = torch.randn(1, 1, 2, 2)
    w = torch.randn(1, 1, 1, 1)
    with torch.inference_mode():

        def run(count: int) -> None:
            for _ in range(count // 2):
                NORM(x, None, None, 1e-5, "leaky_relu")
                CONV(x, w, activation="leaky_relu", padding_mode="replicate")

        run(4_000)
        before = _resident()
        run(200_000)
        assert _resident() - before < 10 << 20


@linux
def test_failing_calls_do_not_leak_host_memory() -> None:
    x, w = torch.randn(1, 3, 4, 4), torch.randn(4)

    def run(count: int) -> None:
        for _ in range(count):
            try:
                NORM(x, w, activation="leaky_relu")
            except RuntimeError:
                continue
            raise AssertionError("not refused")

    run(1_000)
    before = _resident()
    run(20_000)
    assert _resident() - before < 10 << 20
