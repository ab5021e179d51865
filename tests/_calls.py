"""A call of every kind of CUDA kernel, for the tests of endurance: replays, streams, few multiprocessors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from _reference import attention_parameters
from styleforge.ops import (
    fused_attention_v1,
    fused_attention_v2,
    fused_conv_instance_norm_relu,
    fused_ffn,
    fused_instance_norm,
)

Call = Callable[[], Tensor]
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def _norm(
    sizes: tuple[int, ...], dtype: torch.dtype, *, last: bool = False, step: bool = False
) -> Callable[[], Call]:
    def make() -> Call:
        memory_format = torch.channels_last if last else torch.contiguous_format
        x, residual, grad = (
            torch.randn(sizes, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
            for _ in range(3)
        )
        weight, bias = torch.rand(sizes[1], device="cuda"), torch.rand(sizes[1], device="cuda")
        if not step:
            return lambda: fused_instance_norm(x, weight, bias, activation="silu", residual=residual)
        leaf = x.requires_grad_()

        def both() -> Tensor:
            result = fused_instance_norm(leaf, weight, bias, activation="silu")
            gradient: Tensor = torch.autograd.grad(result, leaf, grad)[0]
            return gradient

        return both

    return make


def _conv(
    batch: int,
    channels: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    *,
    kernel: int = 3,
    last: bool = True,
    **options: Any,
) -> Callable[[], Call]:
    def make() -> Call:
        memory_format = torch.channels_last if last else torch.contiguous_format
        ci, co = channels
        x = torch.randn(batch, ci, size, size, device="cuda", dtype=dtype)
        x = x.contiguous(memory_format=memory_format)
        weight = torch.randn(co, ci, kernel, kernel, device="cuda", dtype=dtype) / (ci * kernel**2) ** 0.5
        weight = weight.contiguous(memory_format=memory_format)
        scale = torch.rand(co, device="cuda", dtype=dtype) + 0.5
        given: dict[str, Any] = dict(padding=kernel // 2, padding_mode="reflect", precision=precision)
        given |= options
        return lambda: fused_conv_instance_norm_relu(x, weight, None, scale, scale, **given)

    return make


def _ffn(
    batch: int, length: int, embed: int, hidden: int, dtype: torch.dtype, precision: str = "ieee"
) -> Callable[[], Call]:
    def make() -> Call:
        def random(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(sizes, device="cuda") * scale).to(dtype)

        x = random(batch, length, embed)
        parameters = (
            random(hidden, embed, scale=embed**-0.5),
            random(hidden),
            random(embed, hidden, scale=hidden**-0.5),
            random(embed),
        )
        return lambda: fused_ffn(x, *parameters, activation="gelu", residual=x, precision=precision)

    return make


def _attention(
    operator: Callable[..., Tensor], sizes: tuple[int, int, int], heads: int, dtype: torch.dtype
) -> Callable[[], Call]:
    def make() -> Call:
        x = torch.randn(sizes, device="cuda").to(dtype)
        parameters = attention_parameters(sizes[2], dtype, "cuda")
        return lambda: operator(x, *parameters, heads)

    return make


# Name: STYLEFORGE_PATH, and what makes a call on data of its own.
CALLS: dict[str, tuple[str, Callable[[], Call]]] = {
    "norm": ("", _norm((1, 64, 128, 128), HALF)),
    "norm, clusters": ("plane", _norm((1, 16, 192, 192), FLOAT)),
    "norm, split": ("split", _norm((2, 16, 96, 96), FLOAT)),
    "norm, ticket": ("ticket", _norm((1, 3, 1024, 1024), HALF)),
    "norm, bulk copies": ("bulk", _norm((2, 20, 192, 192), FLOAT)),
    "norm, stream": ("stream", _norm((3, 50, 132, 144), HALF)),
    "norm, channels_last": ("", _norm((1, 64, 64, 64), HALF, last=True)),
    "norm, channels_last, stream": ("stream", _norm((3, 64, 96, 100), FLOAT, last=True)),
    "norm, channels_last, few": ("", _norm((1, 3, 512, 512), HALF, last=True)),
    "norm, step": ("", _norm((2, 16, 96, 96), FLOAT, step=True)),
    "norm, channels_last, step": ("", _norm((2, 64, 96, 96), HALF, last=True, step=True)),
    "conv, float16": ("", _conv(1, (64, 64), 64, HALF)),
    "conv, float16, two passes": ("sm90:two_pass", _conv(1, (64, 64), 64, HALF)),
    "conv, float16, large": ("", _conv(2, (128, 128), 128, HALF)),
    "conv, float16, NCHW": ("", _conv(1, (64, 64), 64, HALF, last=False)),
    "conv, float16, upsampled": ("", _conv(1, (64, 32), 64, HALF, upsample=2)),
    "conv, float16, portable": ("mma", _conv(1, (64, 64), 64, HALF)),
    "conv, float16, picture": ("", _conv(1, (3, 32), 128, HALF, kernel=9)),
    "conv, bfloat16, stride 2": ("", _conv(1, (64, 128), 64, BF16, stride=2)),
    "conv, TF32": ("", _conv(1, (128, 128), 32, FLOAT, "tf32")),
    "conv, float32": ("", _conv(1, (128, 128), 32, FLOAT)),
    "conv, float32, NCHW": ("", _conv(1, (64, 64), 64, FLOAT, last=False)),
    "ffn, float32": ("", _ffn(1, 256, 128, 512, FLOAT)),
    "ffn, float32, large": ("", _ffn(2, 512, 512, 1024, FLOAT)),
    "ffn, TF32": ("", _ffn(1, 256, 128, 512, FLOAT, "tf32")),
    "ffn, bfloat16": ("", _ffn(1, 256, 128, 512, BF16)),
    "ffn, float16, large": ("", _ffn(2, 512, 512, 2048, HALF)),
    "attention v1, float32": ("", _attention(fused_attention_v1, (1, 256, 128), 4, FLOAT)),
    "attention v1, bfloat16": ("", _attention(fused_attention_v1, (2, 256, 128), 4, BF16)),
    "attention v2, float32": ("", _attention(fused_attention_v2, (1, 512, 256), 4, FLOAT)),
    "attention v2, bfloat16": ("", _attention(fused_attention_v2, (1, 512, 256), 4, BF16)),
}


@contextmanager
def forced(path: str) -> Iterator[None]:
    """``STYLEFORGE_PATH`` for the time of a block; the default where it is empty."""
    with pytest.MonkeyPatch.context() as patch:
        if path:
            patch.setenv("STYLEFORGE_PATH", path)
        else:
            patch.delenv("STYLEFORGE_PATH", raising=False)
        yield


def bits(x: Tensor) -> Tensor:
    """As integers, so that -0 differs from 0 and a NaN equals itself."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)
