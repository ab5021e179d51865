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
    return statistics.median(graph_times([CapturedCalls(calls, calls_per_graph)], repeats)[0])


class CapturedCalls:
    """A CUDA graph that holds many calls.

    Args:
        calls: what to time, taken in turn; several over different buffers keep the L2 cache from serving all.
        calls_per_graph: calls captured; rounded up to a multiple of ``len(calls)``.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], calls_per_graph: int = 20) -> None:
        self._count = -(-calls_per_graph // len(calls)) * len(calls)

        def run(number: int) -> None:
            for i in range(number):
                calls[i % len(calls)]()

        self._graph, _ = capture(partial(run, self._count), partial(run, len(calls)))

    def time(self) -> float:
        """GPU time of one call in microseconds, of one replay."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e3 / self._count


def graph_times(
    captured: Sequence[CapturedCalls], repeats: int = 30, warmup: int = 3, seconds: float = float("inf")
) -> list[list[float]]:
    """GPU time of one call in microseconds, for each replay of each graph.

    The graphs are replayed in turns: what the GPU's power limit leaves of its clock drifts by several percent
    within a second of full load, and so it does for all alike.

    Args:
        captured: what to replay.
        repeats: timed replays of each.
        warmup: rounds before those.
        seconds: no further round is started after this long, but for the first three.
    """
    return _in_turns([each.time for each in captured], repeats, warmup, seconds)


def _in_turns(
    samplers: Sequence[Callable[[], float]], repeats: int, warmup: int, seconds: float
) -> list[list[float]]:
    stop = time.perf_counter() + seconds
    for i in range(warmup):
        if i and time.perf_counter() > stop:
            break
        for sample in samplers:
            sample()
    times: list[list[float]] = [[] for _ in samplers]
    stop = time.perf_counter() + seconds
    for i in range(repeats):
        if i >= LEAST_SAMPLES and time.perf_counter() > stop:
            break
        for own, sample in zip(times, samplers, strict=True):
            own.append(sample())
    return times


def host_time(call: Callable[[], Any], repeats: int = 15, calls: int = 200) -> float:
    """Host time of one eager call in microseconds: the least of ``host_times``."""
    return min(host_times([call], [calls], repeats)[0])


def host_times(
    calls: Sequence[Callable[[], Any]], bursts: Sequence[int], repeats: int = 15
) -> list[list[float]]:
    """Host time of one eager call in microseconds: means over short bursts, GPU idle before each.

    Args:
        calls: what to time; their bursts are taken in turns, so that a busy host hits all alike.
        bursts: calls of a burst, for each. With more than the GPU's queue holds, a long kernel makes the host
            wait: then take fewer.
        repeats: bursts of each.
    """

    def sampler(call: Callable[[], Any], number: int) -> Callable[[], float]:
        def sample() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                call()
            return (time.perf_counter() - start) / number * 1e6

        return sample

    samplers = [sampler(call, number) for call, number in zip(calls, bursts, strict=True)]
    times = _in_turns(samplers, repeats, warmup=1, seconds=float("inf"))
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

    def sampler(call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6

        return sample

    return _in_turns([sampler(call) for call in calls], repeats, warmup, seconds)


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes of PyTorch's allocator on the GPU a call with its result holds beyond what was held."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
