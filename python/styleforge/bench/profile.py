"""Which styleforge operators a forward runs, on which path, and how long each takes (torch.profiler)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from styleforge import last_path

_NAMESPACE = "styleforge::"


@dataclass(frozen=True)
class Call:
    """One call of an operator: its name, its path, and the shapes of its first two arguments."""

    operator: str
    path: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None


@dataclass
class Row:
    """All calls of one kind in a forward; time in milliseconds, on CUDA the GPU's."""

    call: Call
    calls: int = 0
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A forward: its styleforge operators in the order in which they first ran, and all it took."""

    rows: list[Row]
    total_ms: float

    @property
    def other_ms(self) -> float:
        """What other operators took."""
        return self.total_ms - sum(row.milliseconds for row in self.rows)


class _Watch(TorchDispatchMode):
    """Notes each styleforge operator as it runs; those called inside of one are not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith(_NAMESPACE):
            path = last_path()
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            input, weight, *_ = [*given.values(), None]
            self.calls.append(
                Call(
                    func._schema.name.removeprefix(_NAMESPACE),
                    path,
                    tuple(input.shape),
                    tuple(weight.shape) if isinstance(weight, Tensor) else None,
                )
            )
        return result


def profile(forward: Callable[[], Any], device: torch.device, *, warm_up: int = 3) -> Profile:
    """Runs a forward to see its operators, then once more under ``torch.profiler`` for their times.

    Args:
        forward: the same operators in the same order each time; runs in inference mode.
        device: where it runs; on CUDA the times are those of its kernels.
        warm_up: calls beforehand, in which libraries choose their algorithms.

    Raises:
        RuntimeError: the two runs did not call the same operators.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.inference_mode():
        for _ in range(warm_up):
            forward()
        with _Watch() as watch:
            forward()
        if on_gpu:
            torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=activities) as profiler:
            forward()
            if on_gpu:
                torch.cuda.synchronize(device)
    events = profiler.events() or []
    total = sum(_milliseconds(event, on_gpu) for event in events if _is_outermost(event))
    timed = list(_own(events))
    if [event.name.removeprefix(_NAMESPACE) for event in timed] != [call.operator for call in watch.calls]:
        raise RuntimeError("profile: two runs of the forward did not call the same operators")
    rows: dict[Call, Row] = {}
    for call, event in zip(watch.calls, timed, strict=True):
        row = rows.setdefault(call, Row(call))
        row.calls += 1
        row.milliseconds += _milliseconds(event, on_gpu)
    return Profile(list(rows.values()), total)


def _own(events: Any) -> Iterator[FunctionEvent]:
    """The styleforge operators by their start, without those that run inside of one."""
    for event in sorted(events, key=lambda one: one.time_range.start):
        if not _on_host(event) or not event.name.startswith(_NAMESPACE):
            continue
        outer = event.cpu_parent
        while outer is not None and not outer.name.startswith(_NAMESPACE):
            outer = outer.cpu_parent
        if outer is None:
            yield event


def _on_host(event: FunctionEvent) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CPU)  # type: ignore[attr-defined]


def _is_outermost(event: FunctionEvent) -> bool:
    return _on_host(event) and event.cpu_parent is None


def _milliseconds(event: FunctionEvent, on_gpu: bool) -> float:
    return float(event.device_time_total if on_gpu else event.cpu_time_total) / 1e3
