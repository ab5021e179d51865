"""Attention: the heads alone, whole blocks, training steps, memory.

    python -m styleforge.bench.attention [heads blocks training memory] [--no-compile]

Prints one line a case: microseconds of GPU time, the baselines', and the ratios; for memory, the peak over
the bytes of input, result and QKV. Results are compared with float64 or eager before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import styleforge
from styleforge.bench.timing import graph_time

# batch, length, heads, head_dim; float32
HEADS_CASES = [
    (8, 1024, 16, 64),
    (1, 4096, 32, 128),
    (1, 4096, 8, 256),
    (8, 1024, 4, 256),
    (4, 2048, 4, 160),
]
# batch, length, embed, heads
BLOCK_CASES = [
    (1, 128, 128, 4),
    (1, 256, 128, 4),
    (1, 512, 128, 4),
    (2, 256, 128, 4),
    (1, 256, 256, 4),
    (1, 2048, 4096, 32),
    (1, 4096, 4096, 32),
]
TRAINING_CASES = [(8, 1024, 1024, 16), (4, 2048, 512, 8), (4, 2048, 1024, 8), (8, 256, 512, 8)]
MEMORY_CASE = (1, 32768, 512, 8)

_PATH = "STYLEFORGE_PATH"


@contextmanager
def _forced(path: str) -> Iterator[None]:
    before = os.environ.get(_PATH, "")
    os.environ[_PATH] = path
    try:
        yield
    finally:
        os.environ[_PATH] = before


def _line(name: str, ours: float, baselines: dict[str, float], note: str = "") -> None:
    columns = [f"{name:48s} ours {ours:9.2f}"]
    columns += [f"{key} {value:9.2f} ({ours / value:4.2f}x)" for key, value in baselines.items()]
    print("  ".join(columns), note, flush=True)


def _check(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    difference = (ours.double() - reference.double()).norm() / reference.double().norm()
    if not difference < tolerance:
        raise SystemExit(f"wrong result: relative difference {difference:.3g}, allowed {tolerance:.3g}")


def _kernel_time(call: Callable[[], Any], name: str, calls: int = 5) -> float:
    """Microseconds a call spends in the kernels of that name: the operator has no way to the heads alone."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type.name == "CUDA" and name in e.name]
    return float(sum(e.device_time for e in events)) / calls


def _parameters(embed: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((3 * embed, embed), (3 * embed,), (embed, embed), (embed,))
    return [torch.randn(s, device="cuda", dtype=dtype) / embed**0.5 for s in sizes]


def bench_heads() -> None:
    """Attention of float32 heads against PyTorch's ``scaled_dot_product_attention`` of the same numbers."""
    for (batch, length, heads, head_dim), is_causal in itertools.product(HEADS_CASES, (False, True)):
        x = torch.randn(batch, length, heads * head_dim, device="cuda")
        call = partial(
            torch.ops.styleforge._fused_attention_forward,
            *(x, *_parameters(heads * head_dim, x.dtype), heads, None, is_causal, None, "ieee", 2),
        )
        _, qkv, result, _ = call()
        path = styleforge.last_path()
        packed = qkv.view(batch, length, 3, heads, head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).contiguous()
        first = F.scaled_dot_product_attention(
            q[:1, :1].double(), k[:1, :1].double(), v[:1, :1].double(), is_causal=is_causal
        )
        _check(result.view(batch, length, heads, head_dim)[:1, :, 0], first[:, 0], 1e-6)
        theirs = graph_time(
            [partial(F.scaled_dot_product_attention, q, k, v, is_causal=is_causal)],
            repeats=5,
            calls_per_graph=2,
        )
        name = f"heads {batch}x{length}x{heads}x{head_dim} {'causal' if is_causal else ''}"
        _line(name, _kernel_time(call, "attention_kernel"), {"sdpa": theirs}, path)


class _Plain(nn.Module):
    """``nn.MultiheadAttention`` of one sequence with itself."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


def _modules(embed: int, heads: int, dtype: torch.dtype) -> tuple[_Plain, nn.Module]:
    plain = nn.MultiheadAttention(embed, heads, batch_first=True, device="cuda", dtype=dtype)
    return _Plain(plain), styleforge.FusedAttention.from_torch(plain)


def _compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(module, fullgraph=True)
    return compiled


def bench_blocks(compile: bool) -> None:
    """Inference with the projections, float32 and bfloat16."""
    for dtype, (batch, length, embed, heads) in itertools.product(
        (torch.float32, torch.bfloat16), BLOCK_CASES
    ):
        x = torch.randn(batch, length, embed, device="cuda", dtype=dtype)
        calls = 20 if embed < 1024 else 3
        with torch.no_grad():
            plain, ours = (m.eval() for m in _modules(embed, heads, dtype))
            _check(ours(x), plain(x), 1e-5 if dtype == torch.float32 else 3e-2)
            path = styleforge.last_path()
            times = {"eager": graph_time([partial(plain, x)], calls_per_graph=calls)}
            if compile:
                times["compile"] = graph_time([partial(_compiled(plain), x)], calls_per_graph=calls)
            time = graph_time([partial(ours, x)], calls_per_graph=calls)
        _line(f"block {batch}x{length}x{embed}/{heads} {str(dtype)[6:]}", time, times, path)


def bench_training(compile: bool) -> None:
    """Forward and backward; beside it, that of ATen's kernels whose sums have a fixed order as well."""
    for dtype, (batch, length, embed, heads) in itertools.product(
        (torch.bfloat16, torch.float32), TRAINING_CASES
    ):
        plain, ours = _modules(embed, heads, dtype)
        x = torch.randn(batch, length, embed, device="cuda", dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)

        def step(
            function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor = x, g: Tensor = grad
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(x), (x, *module.parameters()), g)

        for a, b in zip(step(ours, ours), step(plain, plain), strict=True):
            _check(a, b, 1e-5 if dtype == torch.float32 else 3e-2)
        timed = partial(graph_time, repeats=5, calls_per_graph=3)
        times = {"eager": timed([partial(step, plain, plain)])}
        if compile:
            times["compile"] = timed([partial(step, _compiled(plain), plain)])
        with _forced("efficient"):
            times["efficient"] = timed([partial(step, ours, ours)])
        time = timed([partial(step, ours, ours)])
        path = styleforge.last_path()
        _line(f"step {batch}x{length}x{embed}/{heads} {str(dtype)[6:]}", time, times, path)


def _peak(call: Callable[[], object]) -> int:
    call()  # workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bench_memory() -> None:
    """Peaks over input, result and QKV; of a training step over the input."""
    batch, length, embed, heads = MEMORY_CASE
    for dtype, masked in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        x = torch.randn(batch, length, embed, device="cuda", dtype=dtype)
        parameters = [p.requires_grad_() for p in _parameters(embed, dtype)]
        mask = torch.rand(batch, length, device="cuda") < 0.5 if masked else None
        call = partial(torch.ops.styleforge.fused_attention, x, *parameters, heads, None, False, mask)
        with torch.no_grad():
            inference = (x.nbytes + _peak(call)) / (5 * x.nbytes)
        path = styleforge.last_path()
        leaves, grad = [x.requires_grad_(), *parameters], torch.randn_like(x)

        def train(c: Callable[[], Tensor] = call, p: list[Tensor] = leaves, g: Tensor = grad) -> object:
            return torch.autograd.grad(c(), p, g)

        step = _peak(train) / x.nbytes
        name = f"memory {batch}x{length}x{embed}/{heads} {str(dtype)[6:]} {'masked' if masked else ''}"
        print(
            f"{name:48s} {inference:.3f} of input, result and QKV; step {step:.2f} inputs", path, flush=True
        )


def main() -> None:
    """Runs the groups named on the command line, all by default."""
    groups = ("heads", "blocks", "training", "memory")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=groups, default=list(groups))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    if "heads" in arguments.groups:
        bench_heads()
    if "blocks" in arguments.groups:
        bench_blocks(not arguments.no_compile)
    if "training" in arguments.groups:
        bench_training(not arguments.no_compile)
    if "memory" in arguments.groups:
        bench_memory()


if __name__ == "__main__":
    main()
