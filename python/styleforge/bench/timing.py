"""Clocks: GPU time of a call inside a CUDA graph, CPU time of a call, host time of a call.

``*_times`` give every sample, the others one figure of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from styleforge.graphs import capture

LEAST_SAMPLES = 3
"""Samples that are taken even where the time set for them is over."""


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 30, calls_per_graph: int = 20) -> float:
    """GPU time of one call in microseconds: the median of ``graph_times``."""
    return statistics.median(graph_times(calls, repeats, calls_per_graph))


def graph_times(
    calls: Sequence[Callable[[], Any]],
    repeats: int = 30,
    calls_per_graph: int = 20,
    warmup: int = 3,
    seconds: float = float("inf"),
) -> list[float]:
    """GPU time of one call in microseconds, for each replay of a CUDA graph that holds many calls.

    Args:
        calls: what to time, taken in turn; several over different buffers keep the L2 cache from serving all.
        repeats: timed replays.
        calls_per_graph: calls captured; rounded up to a multiple of ``len(calls)``.
        warmup: replays before those.
        seconds: no further replay is timed after this long, but for the first three.
    """
    count = -(-calls_per_graph // len(calls)) * len(calls)

    def run(number: int) -> None:
        for i in range(number):
            calls[i % len(calls)]()

    graph, _ = capture(partial(run, count), partial(run, len(calls)))
    stop = time.perf_counter() + seconds
    for _ in range(warmup):
        graph.replay()
        if seconds < float("inf"):
            torch.cuda.synchronize()
            if time.perf_counter() > stop:
                break
    times: list[float] = []
    stop = time.perf_counter() + seconds
    for _ in range(repeats):
        if len(times) >= LEAST_SAMPLES and time.perf_counter() > stop:
            break
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return times


def host_time(call: Callable[[], Any], repeats: int = 15, calls: int = 200) -> float:
    """Host time of one eager call in microseconds: the least of ``host_times``."""
    return min(host_times(call, repeats, calls))


def host_times(call: Callable[[], Any], repeats: int = 15, calls: int = 200) -> list[float]:
    """Host time of one eager call in microseconds: means over short bursts, GPU idle before each.

    With more ``calls`` than the GPU's queue holds, a long kernel makes the host wait: then take fewer.
    """
    for _ in range(calls):
        call()
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return times


def cpu_times(calls: Sequence[Callable[[], Any]], repeats: int = 15) -> list[float]:
    """Median CPU time of each call in milliseconds, taken in turns so that a busy machine hits all alike."""
    return [statistics.median(own) / 1e3 for own in wall_times(calls, repeats)]


def wall_times(
    calls: Sequence[Callable[[], Any]], repeats: int = 15, warmup: int = 2, seconds: float = float("inf")
) -> list[list[float]]:
    """Wall-clock time of each call in microseconds, every sample; the calls are taken in turns.

    Args:
        calls: each must return only when its work is done.
        repeats: samples of each.
        warmup: rounds before those.
        seconds: no further round is started after this long, but for the first three.
    """
    stop = time.perf_counter() + seconds
    for i in range(warmup):
        if i and time.perf_counter() > stop:
            break
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + seconds
    for i in range(repeats):
        if i >= LEAST_SAMPLES and time.perf_counter() > stop:
            break
        for own, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            own.append((time.perf_counter() - start) * 1e6)
    return times


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes of PyTorch's allocator on the GPU a call with its result holds beyond what was held."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
