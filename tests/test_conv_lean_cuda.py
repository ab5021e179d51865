"""Convolutions in resident grids of full tiles (conv_sm90_lean.cu), against the general kernels."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial
from typing import Any

import pytest
import torch

import styleforge
from _reference import conv_instance_norm, poison, rms_error, tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="wgmma, which compute capability 9.0 has",
    ),
]

OP = torch.ops.styleforge.fused_conv_instance_norm_relu.default
KINDS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32")]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-3}

# batch, input channels, output channels, (H, W), kernel, stride: one warpgroup and two, tiles of 32 to 128
# columns, blocks that share a tile or its input, several tiles a block
CASES = [
    (1, 64, 64, (64, 64), 3, 1),
    (1, 128, 128, (128, 128), 3, 1),
    (1, 64, 64, (256, 256), 3, 1),
    (2, 128, 128, (32, 32), 3, 1),
    (1, 256, 256, (64, 64), 1, 1),
    (1, 64, 128, (128, 128), 3, 2),
    (8, 128, 128, (64, 64), 3, 1),
    (1, 64, 32, (16, 16), 3, 1),
    (1, 128, 256, (48, 80), 5, 1),
    (4, 64, 64, (128, 128), 3, 1),
]


def _given(
    case: Any, dtype: torch.dtype, offset: float = 0.3, layout: str = "channels_last"
) -> tuple[Any, ...]:
    batch, ci, co, size, kernel, stride = case
    x = tensor(batch, ci, *size, dtype=dtype, device="cuda", layout=layout, offset=offset)
    scale = (ci * kernel * kernel) ** -0.5
    w = tensor(co, ci, kernel, kernel, dtype=dtype, device="cuda", layout=layout, scale=scale)
    params = [torch.randn(co, device="cuda") for _ in range(2)]
    return x, w, None, *params, (stride, stride), (kernel // 2, kernel // 2)


@pytest.mark.parametrize(
    "tune",
    [
        "",
        "lean=1",
        "lean=2",
        "lean=1,prefetch=1",
        "lean=2,prefetch=2,merged=1",
        # blocks without a tile, blocks that ask for all input; first loads one at a time and all at once
        "lean=1,spare=2,early=2,boxes=1,ahead=1",
        "lean=2,spare=2,early=2,boxes=8,ahead=8,once=4",
    ],
)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(
    case: Any, dtype: torch.dtype, precision: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "sm90")
    epilogues = (("zeros", "relu", False), ("reflect", "leaky_relu", True))
    for layout, (mode, activation, with_residual) in itertools.product(LAYOUTS, epilogues):
        given = _given(case, dtype, layout=layout)
        args: tuple[Any, ...] = (*given, mode, 1, 1e-5, activation, 0.1)
        reference = conv_instance_norm(*args)
        residual = None
        if with_residual:
            residual = tensor(*reference.shape, dtype=dtype, device="cuda", layout=layout)
        reference = conv_instance_norm(*args, residual)
        monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
        poison(reference.numel(), dtype, "cuda")
        result = OP(*args, residual, precision)
        assert styleforge.last_path().endswith("sm90:one_pass:lean")
        assert result.is_contiguous(memory_format=LAYOUTS[layout])
        assert rms_error(result, reference) < LIMITS[dtype]
        # Launches that begin while the one before is still at work.
        assert all(torch.equal(result, OP(*args, residual, precision)) for _ in range(10))
        monkeypatch.setenv("STYLEFORGE_CONV_TUNE", "lean=3")
        general = OP(*args, residual, precision)
        assert styleforge.last_path().endswith("sm90:one_pass")
        assert rms_error(result, reference) <= 1.1 * rms_error(general, reference) + 1e-7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_replayed_without_a_pause(case: Any, dtype: torch.dtype, precision: str, layout: str) -> None:
    """Each of a chain begins before the one in front has ended, in a graph and on two streams at once."""
    x, *rest = _given(case, dtype, layout=layout)
    inputs = [torch.randn_like(x) for _ in range(6)]
    expected = [OP(v, *rest, precision=precision) for v in inputs]
    assert styleforge.last_path().endswith(":lean")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [OP(v, *rest, precision=precision) for v in inputs]
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 2]):
            outputs.append(OP(inputs[i % 6], *rest, precision=precision))
    torch.cuda.synchronize()
    assert all(torch.equal(a, expected[i % 6]) for i, a in enumerate(outputs))


def _captured(calls: list[Any]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def _calls(
    case: Any, dtype: torch.dtype = torch.float32, precision: str = "tf32", layout: str = "channels_last"
) -> list[Any]:
    """Of an epilogue of relu alone, and of one of all: three inputs each."""
    x, *rest = _given(case, dtype, layout=layout)
    inputs = [torch.randn_like(x) for _ in range(3)]
    residual = torch.randn_like(OP(x, *rest, precision=precision))
    options: tuple[Any, ...] = ("reflect", 1, 1e-5, "leaky_relu", 0.1, residual, precision)
    plain = [partial(OP, v, *rest, precision=precision) for v in inputs]
    return plain + [partial(OP, v, *rest, *options) for v in inputs]


@pytest.mark.parametrize(
    "tune",
    [
        "gate=3",
        "gate=3,lean=1",
        "gate=3,lean=2",
        "gate=3,lean=2,merged=1",
        "gate=2,patience=1",
        "gate=2,early=1",
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_grid_that_is_called_off(
    case: Any, dtype: torch.dtype, precision: str, layout: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In graphs grids are not cooperative: one that is called off waits for no block and gives the same."""
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
    calls = _calls(case, dtype, precision, layout)
    expected = [call() for call in calls]
    assert styleforge.last_path().endswith(":lean")
    captured = [_captured(calls) for _ in range(2)]
    streams = [torch.cuda.Stream(priority=-i) for i in range(2)]
    for _ in range(3):
        for _, results in captured:
            for result in results:
                result.fill_(math.nan)
        torch.cuda.synchronize()
        for (graph, _), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                graph.replay()
        torch.cuda.synchronize()
        for _, results in captured:
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_gates_return_from_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """More launches are captured than there are gates, called off and not in turns."""
    x, *rest = _given(CASES[5], torch.float32)
    call = partial(OP, x, *rest, precision="tf32")
    expected = call()
    for i in range(36):
        monkeypatch.setenv("STYLEFORGE_CONV_TUNE", "gate=3" if i % 2 == 0 else "")
        graph, results = _captured([call] * (500 if i < 34 else 2))
        graph.replay()
        assert all(torch.equal(y, expected) for y in results[::50])
        del graph, results
    torch.cuda.synchronize()


HOLD = """
extern "C" __global__ void __launch_bounds__(1024) hold(int microseconds) {
  __shared__ volatile char room[48 * 1024];
  room[threadIdx.x] = 1;
  unsigned long long since, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(since));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - since < 1000ull * microseconds);
}
"""


@pytest.mark.skipif(
    not hasattr(torch.cuda, "_compile_kernel"), reason="needs a PyTorch that compiles kernels"
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5], CASES[6]], ids=str)
def test_beside_a_kernel_that_holds_multiprocessors(
    case: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid some of whose blocks get no place for 20 ms: whoever comes first, and whoever has priority."""
    hold = torch.cuda._compile_kernel(HOLD, "hold")
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", "gate=2")
    calls = _calls(case, layout=layout)
    expected = [call() for call in calls]
    graph, results = _captured(calls)
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    other = torch.cuda.Stream(priority=-1)
    for blocks, comes_first, priority in itertools.product(
        (60, multiprocessors - 1, multiprocessors), (True, False), (0, -2)
    ):
        stream = torch.cuda.Stream(priority=priority)
        for result in results:
            result.fill_(math.nan)
        torch.cuda.synchronize()
        if comes_first:
            hold((blocks, 1, 1), (1024, 1, 1), (20_000,), 0, other)
            time.sleep(0.001)
        with torch.cuda.stream(stream):
            graph.replay()
            done = stream.record_event()
        if not comes_first:
            hold((blocks, 1, 1), (1024, 1, 1), (20_000,), 0, other)
        held = other.record_event()
        done.synchronize()
        if case == CASES[5] and layout == "channels_last" and comes_first and blocks == 60:
            assert not held.query()  # it did not wait for its places
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        # The gates are as they were.
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("tune", ["lean=1", "lean=2"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
def test_values_that_are_not_finite(
    dtype: torch.dtype, precision: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such pixel: its plane is NaN, whichever tile it is in, and relu makes no zeros of it."""
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
    for value, (y, x) in (
        (math.inf, (0, 0)),
        (-math.inf, (3, 20)),
        (math.nan, (37, 41)),
        (math.inf, (63, 63)),
    ):
        picture = tensor(2, 64, 64, 64, dtype=dtype, device="cuda", layout="channels_last")
        picture[1, 5, y, x] = value
        w = tensor(64, 64, 1, 1, dtype=dtype, device="cuda")
        result = OP(picture, w, precision=precision)
        assert styleforge.last_path().endswith(":lean")
        assert result[1].isnan().all() and result[0].isfinite().all()


@pytest.mark.parametrize("tune", ["lean=1", "lean=2"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
def test_large_means_and_values(
    dtype: torch.dtype, precision: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are about a pixel: of a mean of many deviations, of half's largest numbers of both signs."""
    monkeypatch.setenv("STYLEFORGE_CONV_TUNE", tune)
    eye = torch.eye(64, device="cuda", dtype=dtype).view(64, 64, 1, 1)
    for scale, offset in ((1.0, 100.0), (1.0, -1000.0), (1e4, 0.0)):
        x = tensor(
            1, 64, 64, 64, dtype=dtype, device="cuda", layout="channels_last", scale=scale, offset=offset
        )
        if scale > 1.0:
            x = x.clamp(-6e4, 6e4)
        result = OP(x, eye, activation="none", precision=precision)
        assert styleforge.last_path().endswith(":lean")
        error = rms_error(result, conv_instance_norm(x, eye, activation="none"))
        assert error < LIMITS[dtype] * (
            1.0 if precision == "ieee" else max(1.0, abs(offset))
        )  # TF32 cuts the input
