"""What the tests of the matrix products under ``fused_ffn`` share: GPU, matrices, a check of repetition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from _reference import poison

OP = torch.ops.styleforge.fused_ffn
SM90 = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="kernels of sm_90"
    ),
]


def random_matrix(*sizes: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(sizes, device="cuda") * scale).to(dtype)


def ffn_parameters(embed: int, hidden: int, out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """fc1_weight, fc1_bias, fc2_weight, fc2_bias of the size that keeps the variance."""
    return [
        random_matrix(hidden, embed, dtype=dtype, scale=embed**-0.5),
        random_matrix(hidden, dtype=dtype, scale=0.5),
        random_matrix(out, hidden, dtype=dtype, scale=hidden**-0.5),
        random_matrix(out, dtype=dtype, scale=0.5),
    ]


def assert_same_bits(x: Tensor, other: Tensor, parameters: list[Tensor], precision: str = "ieee") -> None:
    """On every call, over poisoned memory, on another stream and in a graph whose input changes."""
    first = OP(x, *parameters, "gelu", x, precision)
    expected = OP(other, *parameters, "gelu", other, precision)
    for _ in range(5):
        poison(x.shape[0] * parameters[0].shape[0], x.dtype, "cuda")
        assert torch.equal(OP(x, *parameters, "gelu", x, precision), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(OP(x, *parameters, "gelu", x, precision), first)
    torch.cuda.current_stream().wait_stream(stream)
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        result = OP(given, *parameters, "gelu", given, precision)
    for values, wanted in ((x, first), (other, expected), (x, first)):
        given.copy_(values)
        result.fill_(math.nan)
        graph.replay()
        assert torch.equal(result, wanted)


def assert_same_bits_beside_copies(call: Callable[[], Tensor]) -> None:
    """On every call, while copies on another stream delay what its warps load, some more than others."""
    expected = call()
    copies, stream = torch.zeros(2, 2**26, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        with torch.cuda.stream(stream):
            copies[0].copy_(copies[1])
        assert torch.equal(call(), expected)
    torch.cuda.current_stream().wait_stream(stream)
