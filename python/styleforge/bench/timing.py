"""Clocks: GPU time of a call inside a CUDA graph, CPU time of a call, host time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 30, calls_per_graph: int = 20) -> float:
    """GPU time of one call in microseconds: the median over replays of a CUDA graph that holds many calls.

    Args:
        calls: what to time, taken in turn; several over different buffers keep the L2 cache from serving all.
        repeats: timed replays.
        calls_per_graph: calls captured; rounded up to a multiple of ``len(calls)``.
    """
    count = -(-calls_per_graph // len(calls)) * len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def host_time(call: Callable[[], Any], repeats: int = 15, calls: int = 200) -> float:
    """Host time of one eager call in microseconds: the least mean over short bursts, GPU idle before each."""
    for _ in range(calls):
        call()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return best * 1e6


def cpu_times(calls: Sequence[Callable[[], Any]], repeats: int = 15) -> list[float]:
    """Median CPU time of each call in milliseconds, taken in turns so that a busy machine hits all alike."""
    for call in calls:
        call()
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for own, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            own.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(own) for own in times]
