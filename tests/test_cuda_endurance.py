"""Every kind of kernel as on a server: ten thousand replays, two streams at once, few multiprocessors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import styleforge
from _calls import CALLS, Call, bits, forced
from _cuda import capture

cuda = pytest.mark.cuda
REPLAYS = 10_000
MULTIPROCESSORS = 16  # of an H200's 132: what an eighth of a GPU under MPS has


@cuda
@pytest.mark.parametrize("name", CALLS)
def test_ten_thousand_replays_are_bitwise_equal(name: str) -> None:
    """Compared in the graph, which then overwrites the result: a replay that left anything out would show."""
    path, make = CALLS[name]
    with forced(path):
        call = make()
        expected = call().clone()
        different = torch.zeros((), dtype=torch.int64, device="cuda")

        def once() -> Tensor:
            result = call().detach()
            different.add_((bits(result) != bits(expected)).sum())
            return result.fill_(float("nan"))

        graph, _ = capture(once)
        different.zero_()
        for _ in range(REPLAYS):
            graph.replay()
        assert different.item() == 0 and torch.isfinite(expected).all()


def _twice(name: str) -> tuple[list[Call], list[Tensor]]:
    """Two calls of a kind with different data, and what they give one after the other."""
    calls = [CALLS[name][1]() for _ in range(2)]
    expected = [call().detach().clone() for call in calls]
    assert not torch.equal(*expected)
    torch.cuda.synchronize()
    return calls, expected


@cuda
@pytest.mark.parametrize("name", CALLS)
def test_two_streams_at_once(name: str) -> None:
    """Eagerly: workspaces and counters of calls that overlap must not be shared."""
    with forced(CALLS[name][0]):
        calls, expected = _twice(name)
        streams = [torch.cuda.Stream() for _ in calls]
        results: list[list[Tensor]] = [[], []]
        for _ in range(40):
            for own, call, stream in zip(results, calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    own.append(call().detach())
        torch.cuda.synchronize()
    for own, right in zip(results, expected, strict=True):
        assert all(torch.equal(bits(result), bits(right)) for result in own)


@cuda
@pytest.mark.parametrize("name", CALLS)
def test_two_graphs_at_once(name: str) -> None:
    """Graphs keep their workspaces: two of them on two streams."""
    with forced(CALLS[name][0]):
        calls, expected = _twice(name)
        graphs = [capture(call) for call in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        for _ in range(200):
            for (graph, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
    for (_, result), right in zip(graphs, expected, strict=True):
        assert torch.equal(bits(result.detach()), bits(right))


def _with_few_multiprocessors() -> None:
    """Run as a program of its own, which may hang: prints each kind's relative difference and path."""
    context = torch.cuda.green_contexts.GreenContext.create(num_sms=MULTIPROCESSORS, device_id=0)
    for name, (path, make) in CALLS.items():
        with forced(path):
            call = make()
            whole = call().detach().double()
            all_of_them = styleforge.last_path()
            torch.cuda.synchronize()
            context.set_context()
            try:
                # The context is the thread's; its default stream is not ordered with those of other threads.
                with torch.autograd.set_multithreading_enabled(False):
                    results = [call().detach() for _ in range(3)]
                few = styleforge.last_path()
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(json.dumps({"name": name, "error": str(error).splitlines()[0]}), flush=True)
                continue
            finally:
                context.pop_context()
        same = all(torch.equal(bits(results[0]), bits(result)) for result in results[1:])
        difference = float((results[0].double() - whole).norm() / whole.norm())
        found = {"name": name, "difference": difference, "repeats": same, "whole": all_of_them, "few": few}
        print(json.dumps(found), flush=True)


@cuda
def test_a_green_context_of_few_multiprocessors() -> None:
    """A grid that waits for itself does not fit there: what runs instead gives the same to rounding."""
    green = getattr(torch.cuda, "green_contexts", None)
    if green is None or not green.SUPPORTED:
        pytest.skip("needs a PyTorch with green contexts")
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {here!r}); import test_cuda_endurance as t; "
    program += "t._with_few_multiprocessors()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    reached = found[-1]["name"] if found else "none"
    assert done.returncode == 0, f"after {reached}: {done.stderr[-1500:]}"
    assert {entry["name"] for entry in found} == set(CALLS)
    for entry in found:
        assert "error" not in entry, entry
        assert entry["repeats"] and entry["difference"] < 4e-3, entry
