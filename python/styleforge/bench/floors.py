"""What the machine can do at best, measured on it: bytes and floating-point operations a second.

The floor of a case is the longer of two times: its bytes (input, output and parameters once each) at the rate
of a copy, and its operations (those of the plain layers) at the rate of a large matrix product in the same
dtype and precision. For float32 on tensor cores without TF32's loss (3xTF32) the latter is a third of TF32's
rate where that is more than PyTorch's own. On the CPU the rates are those of the fastest sample: others' work
only slows it down. What needs fewer operations (phases of an upsampled convolution, Winograd), or less memory
traffic because its tensors stay in a cache, comes out at more than 100 percent of this floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from styleforge.bench.precision import precision_flags
from styleforge.bench.timing import graph_time, wall_times


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy (read plus write); operations a second of a product, and how it was taken."""

    copy: float
    product: float
    product_is: str


def copy_rate(device: torch.device) -> float:
    """TB/s of a copy by kernel, read plus write, over rotated buffers that no cache holds."""
    sizes = (16, 128, 128, 128) if device.type == "cuda" else (32, 1024, 1024)
    sources = [torch.randn(sizes, device=device) for _ in range(3 if device.type == "cuda" else 1)]
    targets = [torch.empty_like(s) for s in sources]
    calls = [partial(torch.add, s, 1.0, out=t) for s, t in zip(sources, targets, strict=True)]
    if device.type == "cuda":
        time = graph_time(calls)
    else:
        time = min(wall_times(calls, repeats=10)[0])
    return 2 * sources[0].nbytes / time / 1e6


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    call = partial(torch.matmul, a, b)
    if device.type == "cuda":
        time = graph_time([call], repeats=10, calls_per_graph=2)
    else:
        time = min(wall_times([call], repeats=40, seconds=2)[0])
    return 2 * n**3 / time * 1e6


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of this machine as PyTorch's precision flags are now."""
    with torch.no_grad():
        copy = copy_rate(device) * 1e12
        product = _product_rate(device, dtype)
        n = 8192 if device.type == "cuda" else 1024
        note = f"torch.matmul of {n}x{n}, {str(dtype)[6:]}"
        if (
            device.type == "cuda"
            and dtype == torch.float32
            and torch.cuda.get_device_capability(device) >= (8, 0)
        ):
            with precision_flags("tf32"):
                third = _product_rate(device, dtype) / 3
            if third > product:
                product, note = third, f"a third of torch.matmul of {n}x{n} in TF32 (3xTF32)"
    return Rates(copy, product, note)


def floor(bytes: float, operations: float, rates: Rates) -> tuple[float, str]:
    """Least time in microseconds, and which of "memory" and "arithmetic" sets it."""
    memory, arithmetic = bytes / rates.copy * 1e6, operations / rates.product * 1e6
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")
