"""fused_attention_v1 in one launch: a whole block of 16-bit numbers, whose keys and values are not computed.

STYLEFORGE_PATH=whole forces it. What a server asks of it (graphs, streams, repeatability) is in
test_fused_attention_cuda.py, with the other paths.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _reference import (
    assert_as_accurate,
    attention,
    attention_parameters,
    max_error,
    poison,
    random_mask,
    random_tensor,
    torch_attention,
)

OP = torch.ops.styleforge.fused_attention_v1
PATH = "whole"
HEADS = 4
DTYPES = [torch.float16, torch.bfloat16]
# embed_dim, heads and length: whole chunks of 128 tokens and not, blocks of queries that begin in every chunk
SIZES = [
    *((128, 4, length) for length in (1, 16, 17, 127, 128, 129, 250, 256, 333, 384, 512)),
    *((256, heads, length) for heads in (4, 8) for length in (1, 40, 128, 200, 256)),
]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="made for sm_90"
    ),
]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)


def _taken() -> bool:
    return styleforge.last_path() == f"attention:v1:cuda:{PATH}"


def _compare(*args: Any) -> Tensor:
    reference, yardstick = attention(*args), torch_attention(*args)
    poison(reference.numel(), args[0].dtype, "cuda")
    result = OP(*args)
    assert _taken()
    assert result.is_contiguous() and result.dtype == args[0].dtype
    assert_as_accurate(result, yardstick, reference, ulps=0.5)
    assert torch.equal(OP(*args), result)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("embed", "heads", "length"), SIZES)
def test_every_cut(
    embed: int, heads: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (16, 32):
        monkeypatch.setenv("STYLEFORGE_SMALL_ATTENTION_TUNE", f"block={rows}")
        for batch, is_causal, mask, biases in (
            (1, False, None, "both"),
            (3, True, None, "none"),
            (2, False, "some", "first"),
            (2, True, "dead", "both"),
            (2, False, "left", "second"),
        ):
            x = random_tensor(batch, length, embed, dtype=dtype, device="cuda")
            parameters = attention_parameters(embed, dtype, "cuda", biases)
            hidden = None if mask is None else random_mask(batch, length, mask, "cuda")
            _compare(x, *parameters, heads, None, is_causal, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    x = random_tensor(2, 200, 128, dtype=dtype, device="cuda")
    hidden = random_mask(2, 200, "some", "cuda")  # and PyTorch's kernels that know a scale of 0
    _compare(x, *attention_parameters(128, dtype, "cuda"), HEADS, scale, False, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_are_alike(dtype: torch.dtype) -> None:
    """A large mean: what keys have in common drops out of the softmax, and must not take the rest with it."""
    for offset in (3.0, 10.0):
        x = random_tensor(2, 200, 128, dtype=dtype, device="cuda", offset=offset)
        _compare(x, *attention_parameters(128, dtype, "cuda"), HEADS)


def test_numbers_near_the_ends_of_float16() -> None:
    """Queries times the keys' weights are larger than float16 is, where neither of them nor any key is."""
    x = random_tensor(1, 100, 128, dtype=torch.float16, device="cuda")
    parameters = list(attention_parameters(128, torch.float16, "cuda"))
    for size in (1e-3, 1.0, 1e3):
        weight = parameters[0].clone()
        weight[:128] *= size  # of queries
        parameters[1][:128] *= size
        weight[128:256] *= 100
        args = (x, weight, *parameters[1:], HEADS, 1e-3 / size)
        result, reference = OP(*args), attention(*args)
        assert _taken()
        assert result.isfinite().all()
        assert_as_accurate(result, torch_attention(*args), reference, ulps=0.5)
        parameters[1][:128] /= size


def test_what_is_no_number() -> None:
    for dtype in DTYPES:
        x = random_tensor(3, 40, 128, dtype=dtype, device="cuda")
        parameters = attention_parameters(128, dtype, "cuda")
        expected = OP(x, *parameters, HEADS)
        spoiled = x.clone()
        spoiled[1, 3, 5] = float("nan")
        result = OP(spoiled, *parameters, HEADS)
        assert _taken()
        assert result[1].isnan().all()
        assert torch.equal(result[::2], expected[::2])
        # The keys' bias drops out of the softmax, but not if it is infinite.
        parameters[1][128 + 7] = float("inf")
        assert OP(x, *parameters, HEADS).isnan().all()


def test_inputs_of_other_strides() -> None:
    for dtype in DTYPES:
        for x in (
            random_tensor(2, 70, 256, dtype=dtype, device="cuda")[:, :, 32:160],
            random_tensor(70, 2, 128, dtype=dtype, device="cuda").transpose(0, 1),
            random_tensor(2, 70, 128, dtype=dtype, device="cuda", layout="transposed"),
            random_tensor(2, 1, 128, dtype=dtype, device="cuda").expand(2, 1, 128),
        ):
            for layout in ("contiguous", "transposed"):
                parameters = attention_parameters(128, dtype, "cuda", layout=layout)
                hidden = random_mask(x.shape[1], 2, "some", "cuda").T
                _compare(x, *parameters, HEADS, None, False, hidden)


def test_the_module_takes_it_in_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "")
    module = styleforge.FusedAttention(128, HEADS, device="cuda", dtype=torch.bfloat16)
    x = random_tensor(1, 256, 128, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        result = module(x)
    assert _taken()
    kept = module(x)  # a gradient needs the queries, keys and values
    assert not _taken()
    assert max_error(kept.detach(), result.double()) < 5e-2


def test_what_the_kernel_does_not_take_runs_elsewhere() -> None:
    def last_path(
        length: int, embed: int, heads: int, dtype: torch.dtype = torch.float16, layout: str = "contiguous"
    ) -> str:
        x = random_tensor(2, length, embed, dtype=dtype, device="cuda", layout=layout)
        args = (x, *attention_parameters(embed, dtype, "cuda"), heads)
        assert_as_accurate(OP(*args), torch_attention(*args), attention(*args), ulps=4.0)
        return styleforge.last_path()

    for name in (
        last_path(20, 128, 8),
        last_path(20, 64, 4),
        last_path(513, 128, 4),
        last_path(257, 256, 4),
        last_path(20, 128, 4, torch.float32),
        last_path(20, 128, 4, layout="offset"),  # rows that do not begin at 16 bytes
        last_path(20, 128, 4, layout="expanded"),
    ):
        assert name.startswith("attention:v1:cuda:") and not name.endswith(PATH)
