"""What is said about the samples of a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """Mean, median, sample standard deviation (0 for one sample), least and largest, in microseconds."""

    count: int
    mean: float
    median: float
    std: float
    minimum: float
    maximum: float


def summarize(samples: Sequence[float]) -> Statistics:
    """The statistics of at least one sample.

    Raises:
        ValueError: there is none.
    """
    if not samples:
        raise ValueError("samples must hold at least one measurement, got none")
    return Statistics(
        count=len(samples),
        mean=statistics.fmean(samples),
        median=statistics.median(samples),
        std=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        minimum=min(samples),
        maximum=max(samples),
    )
