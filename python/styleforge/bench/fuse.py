"""Networks as their users have them: fused, against eager PyTorch and torch.compile of the original.

    python -m styleforge.bench.fuse [--no-compile] [--width 64] [--size 256]

A CycleGAN generator (9 blocks, 1x3x256x256) in half precision and in float32 with TF32, by
``styleforge.fuse`` and by ``torch.compile(backend="styleforge")``. GPU time inside a CUDA graph; every
network in the better of contiguous and channels_last. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from styleforge.bench.timing import graph_time

FORMATS = (torch.contiguous_format, torch.channels_last)


class Block(nn.Module):
    """Residual block of CycleGAN: padding, convolution, norm, ReLU, padding, convolution, norm, addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to the same."""
        y: Tensor = x + self.layers(x)
        return y


def cyclegan_generator(width: int = 64, blocks: int = 9) -> nn.Sequential:
    """The ResNet generator of Zhu et al. (2017, arXiv:1703.10593) in plain PyTorch layers."""

    def step(layer: nn.Module, channels: int) -> list[nn.Module]:
        return [layer, nn.InstanceNorm2d(channels), nn.ReLU(True)]

    layers = [nn.ReflectionPad2d(3), *step(nn.Conv2d(3, width, 7), width)]
    for i in (0, 1):
        layers += step(nn.Conv2d(width << i, width << (i + 1), 3, 2, 1), width << (i + 1))
    layers += [Block(4 * width) for _ in range(blocks)]
    for i in (1, 0):
        layers += step(nn.ConvTranspose2d(width << (i + 1), width << i, 3, 2, 1, 1), width << i)
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


def _best(
    make: Callable[[nn.Module], Callable[..., Tensor]], net: nn.Module, x: Tensor, reference: Tensor
) -> tuple[float, str]:
    """GPU microseconds of ``make(net)`` in the better memory format, and which that is."""
    times: dict[str, float] = {}
    for memory_format in FORMATS:
        torch._dynamo.reset()
        formatted: Any = copy.deepcopy(net).to(memory_format=memory_format)  # type: ignore[call-overload]
        call = partial(make(formatted), x.contiguous(memory_format=memory_format))
        error = ((call().double() - reference).norm() / reference.norm()).item()
        if not error < 2e-2:
            raise SystemExit(f"wrong result: relative difference {error:.3g}")
        name = "channels_last" if memory_format is torch.channels_last else "contiguous"
        times[name] = graph_time([call], calls_per_graph=3)
    best = min(times, key=lambda name: times[name])
    return times[best], best


def main() -> None:
    """Prints a line for each dtype and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave everything with torch.compile out")
    parser.add_argument("--width", type=int, default=64, help="channels after the first layer")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    ways: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {"eager": lambda net: net}
    if not arguments.no_compile:
        ways["torch.compile"] = lambda net: torch.compile(net, fullgraph=True)
        ways["backend styleforge"] = lambda net: torch.compile(net, backend="styleforge", fullgraph=True)
    ways["styleforge.fuse"] = styleforge.fuse
    torch.backends.cudnn.allow_tf32 = True
    with torch.no_grad():
        net = cyclegan_generator(arguments.width).eval().cuda()
        picture = torch.rand(1, 3, arguments.size, arguments.size, device="cuda") * 2 - 1
        reference = copy.deepcopy(net).double()(picture.double())
        for dtype in (torch.float16, torch.float32):
            times: dict[str, float] = {}
            for name, make in ways.items():
                times[name], memory_format = _best(
                    make, copy.deepcopy(net).to(dtype), picture.to(dtype), reference
                )
                shares = [f"{times[name] / t:.2f} of {other}" for other, t in times.items() if other != name]
                title = f"CycleGAN generator {arguments.size} {str(dtype)[6:]} {name}"
                print(f"{title:52s} {times[name]:9.1f} us {memory_format:14s}", ", ".join(shares), flush=True)


if __name__ == "__main__":
    main()
