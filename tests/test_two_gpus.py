"""The second GPU while the first is current: every operator, on the first one's path, to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _reference import attention_parameters, tensor, tf32

OPS = torch.ops.styleforge
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def _norm(dtype: torch.dtype, layout: str, *sizes: int) -> tuple[Any, tuple[Any, ...]]:
    scale = torch.rand(sizes[1]) + 0.5
    return OPS.fused_instance_norm, (tensor(*sizes, layout=layout, dtype=dtype), scale, scale / 2)


def _conv(dtype: torch.dtype, layout: str, *sizes: int) -> tuple[Any, tuple[Any, ...]]:
    n, ci, co, h, w, kernel = sizes
    weight = (torch.randn(co, ci, kernel, kernel) / (kernel * ci**0.5)).to(dtype)
    x = tensor(n, ci, h, w, layout=layout, dtype=dtype)
    return OPS.fused_conv_instance_norm_relu, (x, weight, None, None, None, [1, 1], [kernel // 2] * 2)


def _ffn(dtype: torch.dtype, *sizes: int) -> tuple[Any, tuple[Any, ...]]:
    rows, width, hidden = sizes
    wide, narrow = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    given = (torch.randn(1, rows, width), wide, torch.randn(hidden), narrow, torch.randn(width))
    return OPS.fused_ffn, tuple(t.to(dtype) for t in given)


def _attention(dtype: torch.dtype, operator: str, *sizes: int) -> tuple[Any, tuple[Any, ...]]:
    length, width, heads = sizes
    parameters = attention_parameters(width, dtype=dtype)
    return getattr(OPS, operator), (torch.randn(1, length, width).to(dtype), *parameters, heads)


CASES: dict[str, Callable[[torch.dtype], tuple[Any, tuple[Any, ...]]]] = {
    "norm, plane": lambda d: _norm(d, "contiguous", 2, 16, 32, 32),
    "norm, stream": lambda d: _norm(d, "contiguous", 2, 16, 300, 304),
    "norm, few planes": lambda d: _norm(d, "contiguous", 1, 3, 512, 512),
    "norm, channels_last": lambda d: _norm(d, "channels_last", 2, 64, 96, 100),
    "conv, small": lambda d: _conv(d, "channels_last", 1, 64, 64, 64, 64, 3),
    "conv, in turns": lambda d: _conv(d, "channels_last", 4, 64, 64, 200, 200, 3),
    "conv, contiguous": lambda d: _conv(d, "contiguous", 1, 64, 128, 96, 96, 3),
    "conv, picture": lambda d: _conv(d, "contiguous", 1, 3, 32, 128, 128, 9),
    "ffn, small": lambda d: _ffn(d, 256, 128, 512),
    "ffn, large": lambda d: _ffn(d, 4096, 512, 2048),
    "ffn, odd": lambda d: _ffn(d, 77, 51, 133),
    "attention v1": lambda d: _attention(d, "fused_attention_v1", 256, 128, 4),
    "attention v1, wide": lambda d: _attention(d, "fused_attention_v1", 256, 256, 4),
    "attention v2": lambda d: _attention(d, "fused_attention_v2", 1200, 256, 4),
    "attention v2, wide heads": lambda d: _attention(d, "fused_attention_v2", 700, 512, 2),
}


def _on(device: str, operator: Any, given: tuple[Any, ...]) -> tuple[list[Tensor], str | None, str | None]:
    """Result and gradients, the path of a call without gradients and that of the backward pass."""
    moved = [
        t.to(device).requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in given
    ]
    inputs = [t for t in moved if isinstance(t, Tensor)]
    with torch.inference_mode():
        plain = operator(*moved)
        path = styleforge.last_path()
    result = operator(*moved)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(result.shape, generator=generator).to(result)
    gradients = torch.autograd.grad(result, inputs, direction)
    for t in (plain, *gradients):
        assert t.device == torch.device(device)
    return [t.detach().cpu() for t in (plain, result, *gradients)], path, styleforge.last_path()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_both_give_the_same_bits(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    operator, given = CASES[case](dtype)
    with tf32(False):
        second = _on("cuda:1", operator, given)
        assert torch.cuda.current_device() == 0
        first = _on("cuda:0", operator, given)
    assert second[1:] == first[1:]
    for a, b in zip(second[0], first[0], strict=True):
        assert torch.equal(a, b)


def test_graphs_of_the_second() -> None:
    with torch.inference_mode(), tf32(False):
        for case in ("norm, few planes", "conv, in turns", "ffn, large", "attention v1", "attention v2"):
            operator, given = CASES[case](torch.float16)
            moved = [t.to("cuda:1") if isinstance(t, Tensor) else t for t in given]
            expected = operator(*moved)
            with torch.cuda.device(1):
                graph = torch.cuda.CUDAGraph()
                # Without a stream it takes that of the first graph of the process, on whichever device.
                with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                    result = operator(*moved)
                for _ in range(3):
                    result.zero_()
                    graph.replay()
                torch.cuda.synchronize()
            assert torch.equal(result, expected), case


def test_graphed_models_of_both() -> None:
    """One after the other: the second one's capture must not be the first one's device's."""
    layers, pictures = {}, {}
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        layers[device] = styleforge.FusedInstanceNorm2d(4).eval().to(device)
        pictures[device] = torch.randn(2, 1, 4, 16, 16, device=device)
        fast = styleforge.graphed(layers[device], pictures[device][0])
        with torch.no_grad():
            for picture in pictures[device]:
                assert torch.equal(fast(picture), layers[device](picture))
    assert torch.cuda.current_device() == 0


def test_tensors_of_two_gpus_are_refused() -> None:
    for case in CASES:
        operator, given = CASES[case](torch.float32)
        moved = [
            t.to("cuda:1") if i == 0 else t.cuda() if isinstance(t, Tensor) else t
            for i, t in enumerate(given)
        ]
        with pytest.raises(RuntimeError, match="cuda:0"):
            operator(*moved)


_ALONE = """
import threading
import torch, styleforge

x = torch.randn(2, 16, 300, 304, device="cuda:1")
weight = torch.randn(16, 16, 3, 3, device="cuda:1")

def run():
    with torch.no_grad():
        styleforge.ops.fused_instance_norm(x)
        styleforge.ops.fused_conv_instance_norm_relu(x, weight, padding=1)
    torch.cuda.synchronize(1)

run()
other = threading.Thread(target=run)
other.start()
other.join()
assert torch.cuda.current_device() == 0
assert torch.cuda.max_memory_reserved(0) == 0, "workspace was booked on the first GPU"
assert not torch._C._cuda_hasPrimaryContext(0), "a context was made on the first GPU"
"""


def test_the_first_is_left_alone() -> None:
    """In a process of its own, which never uses the first: no context on it, no memory of it."""
    finished = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
