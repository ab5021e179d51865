"""Frames of a video a second, from host memory through the style network and back.

    python -m styleforge.bench.video [--size 1080x1920] [--frames 240] [--no-compile]

One frame at a time, as a camera gives them: bytes to the GPU, half precision, the network, bytes back to
pinned host memory; the host waits for a frame while the next one is under way. Decoding and encoding are left
out. "latency" is one frame alone, from its bytes to those of the picture. styleforge runs as a user has it,
``styleforge.graphed``; eager PyTorch and ``torch.compile`` run the plain layers in the better memory format.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from styleforge.models.styles import load_style

_MOST_ERROR = 8.0  # RMS, of 255; frames of noise are the hardest for half precision
Frame = Callable[[Tensor], Tensor]
"""uint8 ``[H, W, 3]`` on the GPU to the same."""


class _OfBytes(nn.Module):
    """A style network between bytes as video decoders give and encoders take them."""

    def __init__(self, network: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.memory_format = memory_format

    def forward(self, frame: Tensor) -> Tensor:
        """uint8 ``[H, W, 3]`` to the same."""
        x = frame.permute(2, 0, 1)[None].to(torch.float16).contiguous(memory_format=self.memory_format)
        y: Tensor = self.network(x)
        return y.clamp(0, 255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous()


def rates(frame: Frame, frames: list[Tensor], count: int) -> tuple[float, float]:
    """Frames a second with two under way, and the median milliseconds of one alone.

    Args:
        frame: what stylises one.
        frames: taken in turn, in pinned host memory.
        count: how many are timed.
    """
    results = [torch.empty_like(frames[0], pin_memory=True) for _ in range(2)]
    done = [torch.cuda.Event() for _ in range(2)]

    def send(index: int) -> None:
        picture = frame(frames[index % len(frames)].to("cuda", non_blocking=True))
        results[index % 2].copy_(picture, non_blocking=True)
        done[index % 2].record()

    alone: list[float] = []
    for index in range(12):
        start = time.perf_counter()
        send(index)
        done[index % 2].synchronize()
        alone.append((time.perf_counter() - start) * 1e3)
    start = time.perf_counter()
    for index in range(count):
        send(index)
        if index:
            done[(index - 1) % 2].synchronize()
    torch.cuda.synchronize()
    return count / (time.perf_counter() - start), statistics.median(alone[4:])


def main() -> None:
    """Prints a line for each way of running the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1080x1920", help="height x width, multiples of 4")
    parser.add_argument("--frames", type=int, default=240, help="timed frames")
    parser.add_argument("--style", default="mosaic", help="a style that comes with the package")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    height, width = map(int, given.size.split("x"))
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, styleforge {styleforge.__version__}")
    generator = torch.Generator().manual_seed(0)
    frames = [
        torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).pin_memory()
        for _ in range(4)
    ]
    net = load_style(given.style).eval().half().cuda()
    with torch.inference_mode(), torch.cuda.device(0):
        ours = styleforge.graphed(_OfBytes(net, torch.channels_last).eval(), frames[0].cuda())
        exact = _OfBytes(net.to_torch().float(), torch.contiguous_format)
        reference = exact.network(frames[0].cuda().permute(2, 0, 1)[None].float())
        ways: dict[str, list[Frame]] = {"styleforge.graphed": [ours], "eager": [], "torch.compile": []}
        for memory_format in (torch.contiguous_format, torch.channels_last):
            plain = _OfBytes(net.to_torch().half(), memory_format)
            ways["eager"].append(plain)
            if not given.no_compile and memory_format is torch.channels_last:
                ways["torch.compile"].append(torch.compile(plain, fullgraph=True))
        best = 0.0
        for name, candidates in ways.items():
            found = []
            for frame in candidates:
                difference = frame(frames[0].cuda()).float() - reference[0].permute(1, 2, 0).clamp(0, 255)
                error = difference.square().mean().sqrt().item()
                if not error < _MOST_ERROR:
                    raise SystemExit(f"{name}: wrong picture, {error:.2f} of 255 away from float32's")
                found.append((*rates(frame, frames, given.frames), error))
            if found:
                speed, latency, error = max(found)
                best = best or speed
                print(
                    f"{height}x{width} float16 {name:18s} {speed:7.1f} frames/s, latency {latency:6.2f} ms, "
                    f"styleforge {best / speed:5.2f} x as fast, {error:.2f} of 255 from float32's picture",
                    flush=True,
                )


if __name__ == "__main__":
    main()
