"""The kernels of fused_attention_v1 for a whole block: every way to cut it, and what they leave to others.

STYLEFORGE_PATH=dependent forces them, together the same as one launch. What a server asks of them (graphs,
streams, repeatability) is in test_fused_attention_cuda.py, with the other paths.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _reference import (
    assert_as_accurate,
    attention,
    attention_parameters,
    matmul_tf32,
    max_error,
    poison,
    random_mask,
    random_tensor,
    rms_error,
    torch_attention,
)

OP = torch.ops.styleforge.fused_attention_v1
FORWARD = torch.ops.styleforge._fused_attention_forward
PATH = "dependent"
# dtype, precision
ARITHMETIC = [
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
]
# embed_dim, heads: head sizes of 8 to 128, also between those that the kernels are compiled for
WIDTHS = [(64, 8), (128, 4), (120, 3), (64, 1), (160, 2), (256, 2), (512, 4), (512, 8)]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="made for sm_90"
    ),
]


def _taken() -> bool:
    return styleforge.last_path() == f"attention:v1:cuda:{PATH}"


def _compare(*args: Any, precision: str = "ieee") -> Tensor:
    reference = attention(*args)
    with matmul_tf32(precision == "tf32"):
        yardstick = torch_attention(*args)
    dtype = args[0].dtype
    for factor in (1, 3, 4):
        poison(factor * reference.numel(), dtype, "cuda")
    result = OP(*args, precision=precision)
    assert _taken()
    assert result.is_contiguous() and result.dtype == dtype
    # One number out of a handful is chance.
    ulps = 0.5 if dtype.itemsize == 2 else 4.0
    if precision == "tf32":  # PyTorch's attention proper is not in TF32, its projections are
        assert rms_error(result, reference) <= 4 * rms_error(yardstick, reference) + 1e-5
    else:
        assert_as_accurate(result, yardstick, reference, ulps=ulps)
    assert torch.equal(OP(*args, precision=precision), result)
    return result


@pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC, ids=str)
@pytest.mark.parametrize(("embed", "heads"), WIDTHS)
def test_every_cut(
    embed: int, heads: int, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)
    for length, rows in itertools.product((1, 17, 128, 250, 333, 512, 1025), (16, 32)):
        out_rows = 48 - rows
        halves = 1 + length % 2
        monkeypatch.setenv(
            "STYLEFORGE_SMALL_ATTENTION_TUNE", f"rows={rows},out_rows={out_rows},halves={halves}"
        )
        x = random_tensor(2, length, embed, dtype=dtype, device="cuda")
        for is_causal, mask in ((False, None), (True, None), (False, "some"), (True, "dead")):
            parameters = attention_parameters(embed, dtype, "cuda", "none" if mask == "some" else "both")
            hidden = None if mask is None else random_mask(2, length, mask, "cuda")
            _compare(x, *parameters, heads, None, is_causal, hidden, precision=precision)


@pytest.mark.parametrize("length", [64, 128, 256, 512])
@pytest.mark.parametrize("embed", [128, 256, 512])
def test_the_seeds_correctness_grid(embed: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)
    for batch, heads, bias in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (True, False)):
        if embed // heads > 128:
            continue
        x = random_tensor(batch, length, embed, device="cuda")
        args = (x, *attention_parameters(embed, device="cuda", biases="both" if bias else "none"), heads)
        result, reference = OP(*args), attention(*args)
        assert _taken()
        assert max_error(result, reference) < 1e-4
        assert_as_accurate(result, torch_attention(*args), reference, ulps=2.0)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_scale(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)
    x = random_tensor(2, 200, 96, dtype=dtype, device="cuda")
    hidden = random_mask(2, 200, "some", "cuda")
    _compare(x, *attention_parameters(96, dtype, "cuda"), 3, scale, False, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_backward_needs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, but for rounding, as the path of matrix products keeps."""
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for is_causal, mask in ((False, None), (True, None), (True, "some")):
        x = random_tensor(2, 130, 96, dtype=dtype, device="cuda")
        hidden = None if mask is None else random_mask(2, 130, mask, "cuda")
        args = (x, *attention_parameters(96, dtype, "cuda"), 3, None, is_causal, hidden, "ieee", 1)
        monkeypatch.setenv("STYLEFORGE_PATH", "math")
        expected = FORWARD(*args)
        monkeypatch.setenv("STYLEFORGE_PATH", PATH)
        results = FORWARD(*args)
        assert _taken()
        assert torch.equal(results[0], OP(*args[:-1]))
        seen = torch.ones(2, 3, 130, dtype=torch.bool, device="cuda")
        if hidden is not None:
            seen &= (~hidden).cumsum(1).gt(0)[:, None]
        for result, wanted in zip(results[:3], expected[:3], strict=True):
            torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(results[3][seen], expected[3][seen], rtol=tolerance, atol=tolerance)


def test_inputs_of_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)
    for dtype in (torch.float32, torch.float16):
        for x in (
            random_tensor(2, 70, 128, dtype=dtype, device="cuda")[:, :, 32:96],
            random_tensor(70, 2, 64, dtype=dtype, device="cuda").transpose(0, 1),
            random_tensor(2, 70, 64, dtype=dtype, device="cuda", layout="transposed"),
            random_tensor(1, 70, 64, dtype=dtype, device="cuda").expand(2, 70, 64),
        ):
            for layout in ("contiguous", "transposed"):
                parameters = attention_parameters(64, dtype, "cuda", layout=layout)
                hidden = random_mask(70, 2, "some", "cuda").T
                _compare(x, *parameters, 2, None, False, hidden)


def test_one_sample_of_nan_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)
    for dtype in (torch.float32, torch.bfloat16):
        x = random_tensor(3, 40, 64, dtype=dtype, device="cuda")
        parameters = attention_parameters(64, dtype, "cuda")
        expected = OP(x, *parameters, 2)
        x[1, 3, 5] = float("nan")
        result = OP(x, *parameters, 2)
        assert result[1].isnan().all()
        assert torch.equal(result[::2], expected[::2])


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("rows", [16, 32])
def test_three_launches_as_one(rows: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit, whichever part has the most blocks; also what the backward needs."""
    monkeypatch.setenv("STYLEFORGE_SMALL_ATTENTION_TUNE", f"rows={rows}")
    for batch, length, embed, heads in (
        (1, 128, 128, 4),
        (2, 250, 128, 4),
        (1, 512, 128, 4),
        (1, 256, 256, 4),
        (1, 100, 128, 2),
        (3, 1, 48, 2),
        (2, 77, 192, 3),
        (1, 40, 512, 16),
    ):
        for is_causal, mask in ((False, None), (True, "some"), (False, "dead")):
            x = random_tensor(batch, length, embed, device="cuda")
            hidden = None if mask is None else random_mask(batch, length, mask, "cuda")
            args = (x, *attention_parameters(embed, device="cuda"), heads, None, is_causal, hidden, precision)
            monkeypatch.setenv("STYLEFORGE_PATH", "dependent")
            expected = FORWARD(*args, 1)
            monkeypatch.setenv("STYLEFORGE_PATH", "together")
            poison(x.numel(), x.dtype, "cuda")
            result = OP(*args)
            assert styleforge.last_path() == "attention:v1:cuda:together"
            assert torch.equal(result, expected[0])
            for ours, wanted in zip(FORWARD(*args, 1), expected, strict=True):
                assert torch.equal(ours, wanted)


def test_one_launch_on_many_streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than the GPU takes, all waiting for others of theirs: none for ever."""
    cases = []
    for batch, length, embed, heads in ((1, 512, 128, 4), (2, 256, 128, 4), (1, 256, 256, 4), (3, 5, 48, 2)):
        x = random_tensor(batch, length, embed, device="cuda")
        args = (x, *attention_parameters(embed, device="cuda"), heads)
        monkeypatch.setenv("STYLEFORGE_PATH", "dependent")
        expected = OP(*args)
        monkeypatch.setenv("STYLEFORGE_PATH", "together")
        assert torch.equal(OP(*args), expected)
        assert styleforge.last_path() == "attention:v1:cuda:together"
        cases.append((args, expected))
    streams = [torch.cuda.Stream(priority=-(i % 2)) for i in range(8)]
    for turn in range(20):
        torch.cuda.synchronize()
        results = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                for j in range(6):
                    args, expected = cases[(turn + i + j) % len(cases)]
                    results.append((OP(*args), expected))
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result, expected in results)


def test_graphs_have_the_dependent_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "")
    args = (random_tensor(1, 128, 128, device="cuda"), *attention_parameters(128, device="cuda"), 4)
    expected = OP(*args)
    assert styleforge.last_path() == "attention:v1:cuda:together"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = OP(*args)
        assert _taken()
    graph.replay()
    assert torch.equal(result, expected)


def test_what_the_kernels_do_not_take_runs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", PATH)

    def last_path(length: int, embed: int, heads: int, dtype: torch.dtype, layout: str = "contiguous") -> str:
        x = random_tensor(1, length, embed, dtype=dtype, device="cuda", layout=layout)
        OP(x, *attention_parameters(embed, dtype, "cuda"), heads)
        return styleforge.last_path()

    given = (
        last_path(20, 60, 5, torch.float32),  # head sizes of 12, 160
        last_path(20, 320, 2, torch.float16),
        last_path(20, 64, 2, torch.float64),
        last_path(5000, 64, 2, torch.float16),
        last_path(20, 64, 2, torch.float16, "offset"),  # rows that do not begin at 16 bytes
    )
    for name in given:
        assert name.startswith("attention:v1:cuda:") and not name.endswith(PATH)
