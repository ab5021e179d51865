"""``fused_attention`` on a GPU: graphs, streams, devices, determinism, memory, no synchronisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import styleforge
from _cuda import capture, no_synchronisation
from _reference import attention_parameters, max_error, random_mask, random_tensor

OP = torch.ops.styleforge.fused_attention
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.cuda

# STYLEFORGE_PATH, length, embed_dim, heads: one of each path, and of each way through it.
PATHS = [
    ("", 128, 128, 4),
    ("", 1200, 128, 4),
    ("", 77, 60, 4),
    ("", 700, 64, 1),
    ("flash", 130, 128, 4),
    ("cudnn", 256, 128, 4),
    ("efficient", 130, 128, 4),
    ("math", 130, 128, 4),
    ("sm90", 300, 128, 4),
    ("sm90", 77, 60, 1),
    ("dependent", 300, 128, 2),
    ("together", 200, 128, 4),
    ("whole", 300, 128, 4),
]
CASES = pytest.mark.parametrize(("forced", "length", "embed", "heads"), PATHS, ids=str)


def _arguments(
    length: int, embed: int, heads: int, dtype: torch.dtype, masked: bool = False, device: str = "cuda"
) -> tuple[Any, ...]:
    mask = random_mask(2, length, "dead", device) if masked else None
    x = random_tensor(2, length, embed, dtype=dtype, device=device)
    return (x, *attention_parameters(embed, dtype, device), heads, None, not masked, mask)


def _step(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The result, and the gradients of the input and the parameters."""
    leaves = [t.detach().requires_grad_() for t in args[:5]]
    y = OP(*leaves, *args[5:])
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)


@CASES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_graph_capture_and_replays(
    dtype: torch.dtype,
    masked: bool,
    forced: str,
    length: int,
    embed: int,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", forced)
    args = _arguments(length, embed, heads, dtype, masked)
    with torch.no_grad():
        graph, result = capture(lambda: OP(*args))
        for i in range(20):
            args[0].normal_(std=0.1 + i)
            if masked:
                args[8].copy_(torch.rand(2, length, device="cuda") < 0.5)
            graph.replay()
            assert torch.equal(result, OP(*args))


@CASES
@pytest.mark.parametrize("masked", [False, True])
def test_graph_capture_of_a_training_step(
    masked: bool, forced: str, length: int, embed: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", forced)
    args = _arguments(length, embed, heads, torch.float32, masked)
    graph, results = capture(lambda: _step(args))
    for _ in range(5):
        args[0].normal_()
        graph.replay()
        for a, b in zip(results, _step(args), strict=True):
            assert torch.equal(a, b)


@CASES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_call_waits_for_the_device(
    dtype: torch.dtype,
    masked: bool,
    forced: str,
    length: int,
    embed: int,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", forced)
    args = _arguments(length, embed, heads, dtype, masked)
    _step(args)
    with no_synchronisation():
        _step(args)


@CASES
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_twenty_runs_are_bitwise_equal(
    masked: bool,
    dtype: torch.dtype,
    forced: str,
    length: int,
    embed: int,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, while other work on another stream disturbs the order of blocks."""
    monkeypatch.setenv("STYLEFORGE_PATH", forced)
    args = _arguments(length, embed, heads, dtype, masked)
    first, noise, side = _step(args), torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    compared = len(first)
    if styleforge.last_path() == "attention_backward:cuda:flash":
        compared = 1  # its gradients are added up by atomics, which is why it is never chosen
    for i in range(20):
        if i % 2:
            with torch.cuda.stream(side):
                noise @ noise
        for a, b in zip(_step(args)[:compared], first[:compared], strict=True):
            assert torch.equal(a, b)


@CASES
def test_the_current_stream_is_used(
    forced: str, length: int, embed: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind work that takes its time on that stream; the default stream is idle."""
    monkeypatch.setenv("STYLEFORGE_PATH", forced)
    for dtype, masked in itertools.product(FLOATS, (False, True)):
        args = _arguments(length, embed, heads, dtype, masked)
        late = args[0].clone()
        expected = _step(args)
        args[0].zero_()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            args[0].copy_(late)
            results = _step(args)
        side.synchronize()
        compared = 1 if forced == "flash" and dtype != torch.float32 else len(results)
        for a, b in zip(results[:compared], expected[:compared], strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_second_device_while_the_first_is_current(dtype: torch.dtype, masked: bool) -> None:
    for length, heads in ((128, 4), (1200, 4), (700, 1)):
        args = _arguments(length, 64, heads, dtype, masked, device="cuda:1")
        results = _step(args)
        assert torch.cuda.current_device() == 0
        same = _step(tuple(t.to("cuda:0") if isinstance(t, Tensor) else t for t in args))
        for a, b in zip(results, same, strict=True):
            assert a.device == torch.device("cuda:1") and torch.equal(a.cpu(), b.cpu())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for dtype in FLOATS:
        args = _arguments(130, 128, 4, dtype)
        together = OP(*args)
        for i in range(2):
            alone = OP(args[0][i : i + 1], *args[1:])
            assert max_error(alone[0], together[i].double().cpu()) < 8 * torch.finfo(dtype).eps


def _peak(call: Callable[[], object]) -> int:
    """Bytes that a call holds at most, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.cuda
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_linear_in_the_length(dtype: torch.dtype, masked: bool) -> None:
    """The input, the result and QKV, and a tenth of these: one [length, length] would be 13 times as much."""
    length, embed, heads = 32768, 512, 8
    x = torch.randn(1, length, embed, device="cuda", dtype=dtype)
    parameters = attention_parameters(embed, dtype, "cuda")
    mask = random_mask(1, length, "some", "cuda") if masked else None
    token = embed * dtype.itemsize * length
    with torch.no_grad():
        OP(
            x[:, :2048], *parameters, heads, None, False, None if mask is None else mask[:, :2048]
        )  # workspaces
        assert token + _peak(lambda: OP(x, *parameters, heads, None, False, mask)) <= 1.1 * 5 * token


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_training_step_is_linear_in_the_length(dtype: torch.dtype) -> None:
    """What is kept, its gradients and the weights': at most a quarter of one [length, length]."""
    length, embed, heads = 32768, 512, 8
    x = torch.randn(1, length, embed, device="cuda", dtype=dtype, requires_grad=True)
    parameters = [p.requires_grad_() for p in attention_parameters(embed, dtype, "cuda") if p is not None]
    grad = torch.randn_like(x)

    def step(tokens: int) -> None:
        torch.autograd.grad(OP(x[:, :tokens], *parameters, heads), (x, *parameters), grad[:, :tokens])

    step(2048)  # workspaces
    token = embed * dtype.itemsize * length
    assert _peak(lambda: step(length)) <= 16 * token


@pytest.mark.cuda
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sixty_five_thousand_tokens(dtype: torch.dtype, is_causal: bool) -> None:
    length = 65536
    x = random_tensor(1, length, 64, dtype=dtype, device="cuda").requires_grad_()
    parameters = attention_parameters(64, dtype, "cuda")
    y = OP(x, *parameters, 1, None, is_causal)
    # A few queries against all keys.
    rows = torch.tensor([0, 1, 777, 30000, length - 1], device="cuda")
    q, k, v = (x.detach().double() @ parameters[0].double().T + parameters[1].double())[0].chunk(3, -1)
    scores = q[rows] @ k.T / 8
    if is_causal:
        scores = scores.masked_fill(torch.arange(length, device="cuda") > rows[:, None], -math.inf)
    expected = scores.softmax(-1) @ v @ parameters[2].double().T + parameters[3].double()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y[0, rows].double(), expected, rtol=tolerance, atol=tolerance)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.isfinite().all()
