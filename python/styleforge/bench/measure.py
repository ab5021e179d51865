"""Measures one case: prepare, check every contender against float64, then time those that are right.

``prepare`` is the first two, which take the host long (torch.compile) and disturb others' times; several
cases can be prepared before the first of them is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

import styleforge
from styleforge.bench import floors
from styleforge.bench.cases import Case
from styleforge.bench.contenders import OURS, Contender, Problem, Unavailable, build
from styleforge.bench.correctness import Check, check, exact_results, tolerance
from styleforge.bench.stats import Statistics, summarize
from styleforge.bench.timing import CapturedCalls, graph_times, host_times, peak_memory, wall_times

_MOST_BUFFERS = 32
_CALLS_OF_A_GRAPH = 20
_CALLS_OF_A_BURST = 20
_GRAPH_MICROSECONDS = 10_000
_LONG_CALL = 2_000  # microseconds


@dataclass(frozen=True)
class Settings:
    """How to measure: see `styleforge bench --help`.

    Attributes:
        dtype: of parameters and inputs; with ``autocast``, which leaves those float32, of the layers.
        seconds: for one clock of one contender; iterations beyond are left out.
        formats: memory formats of pictures; each contender counts in its better one.
        autocast: mixed precision by ``torch.autocast``.
    """

    device: torch.device
    dtype: torch.dtype
    precision: str
    backward: bool
    warmup: int
    iterations: int
    seconds: float
    against: tuple[str, ...]
    formats: tuple[str, ...] = ("contiguous", "channels_last")
    autocast: bool = False


@dataclass
class Timing:
    """A contender's figures in its better memory format, in microseconds.

    Attributes:
        gpu: GPU time: in a CUDA graph ("graph") or between events around calls ("events").
        host: host time of a call, GPU idle at the start of each burst.
        wall: of a call and the wait for its result.
        formats: median by memory format, of all that were measured.
        hosts: the same of the host times.
        peak_bytes: most memory of PyTorch's allocator that a call holds beyond what was held before it
            (parameters and input), its result included.
    """

    memory_format: str
    check: Check
    wall: Statistics | None = None
    gpu: Statistics | None = None
    gpu_clock: str | None = None
    host: Statistics | None = None
    path: str | None = None
    formats: dict[str, float] = field(default_factory=dict)
    hosts: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None

    def main(self) -> Statistics:
        """GPU time where there is one, else wall-clock time."""
        found = self.gpu or self.wall
        assert found is not None
        return found


@dataclass
class CaseResult:
    """What came out of a case; ``failures`` is empty where styleforge's result is right and deterministic."""

    case: Case
    bytes: float
    operations: float
    floor: float = 0.0
    floor_is: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    buffers: int = 1

    def speedup(self, other: str) -> float:
        """Time of another contender by ours, on a clock that both have."""
        ours, theirs = self.timings[OURS], self.timings[other]
        if ours.gpu is not None and theirs.gpu is not None:
            return theirs.gpu.median / ours.gpu.median
        assert ours.wall is not None and theirs.wall is not None
        return theirs.wall.median / ours.wall.median

    def speedups(self) -> dict[str, float]:
        """Every other contender's; none unless styleforge's result is right."""
        if OURS not in self.timings:
            return {}
        return {name: self.speedup(name) for name in self.timings if name != OURS}

    def throughput(self, name: str) -> dict[str, float]:
        """Items (tokens or pictures), bytes and operations a second, and percent of the floor."""
        seconds = self.timings[name].main().median / 1e6
        found = {
            f"{self.case.unit}_per_s": self.case.items / seconds,
            "gb_per_s": self.bytes / seconds / 1e9,
            "percent_of_floor": 100 * self.floor / (seconds * 1e6),
        }
        if self.operations:
            found["tflop_per_s"] = self.operations / seconds / 1e12
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        contenders = {}
        for name, timing in self.timings.items():
            contenders[name] = asdict(timing) | {"throughput": self.throughput(name)}
        return {
            "operator": self.case.operator,
            "mode": self.case.mode,
            "case": self.case.name,
            "input_shape": list(self.case.input_shape),
            "bytes": self.bytes,
            "operations": self.operations,
            "floor_us": self.floor,
            "floor_is": self.floor_is,
            "buffers": self.buffers,
            "contenders": contenders,
            "missing": self.missing,
            "failures": self.failures,
            "speedups": self.speedups(),
        }


@dataclass
class Prepared:
    """A case with the contenders whose results are right."""

    result: CaseResult
    ready: list[tuple[Contender, Timing]]


def measure(
    case: Case, settings: Settings, rates: floors.Rates, tell: Callable[[str], None] = lambda _: None
) -> CaseResult:
    """Checks and times a case.

    Args:
        case: what.
        settings: how.
        rates: of this machine, see ``floors``.
        tell: is told what is being done.
    """
    if "compile" in settings.against:
        torch._dynamo.reset()
    return time_prepared(prepare(case, settings, tell), settings, rates, tell)


def prepare(case: Case, settings: Settings, tell: Callable[[str], None] = lambda _: None) -> Prepared:
    """Builds the contenders of a case and holds their results against float64; see ``measure``."""
    with torch.set_grad_enabled(settings.backward):
        problem = _problem(case, settings)
        passes = 3 if settings.backward else 1
        parameters = sum(p.numel() for p in problem.plain.parameters())
        elements = case.output_elements + problem.inputs[0].numel() + parameters
        size = settings.dtype.itemsize
        # A step also reads the gradient and writes one for all that was read.
        bytes = size * elements * (2 if settings.backward else 1)
        operations = case.operations * passes
        result = CaseResult(case, bytes, operations, buffers=len(problem.inputs))
        ready = _checked(problem, settings, result, tell)
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # float64 took many times what is held
    return Prepared(result, ready if OURS in {contender.name for contender, _ in ready} else [])


def time_prepared(
    prepared: Prepared,
    settings: Settings,
    rates: floors.Rates,
    tell: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Times a prepared case and drops its contenders; see ``measure``."""
    result = prepared.result
    result.floor, result.floor_is = floors.floor(result.bytes, result.operations, rates)
    ready, prepared.ready = prepared.ready, []
    if ready:
        with torch.set_grad_enabled(settings.backward):
            _time(ready, settings, result, tell)
    return result


def _problem(case: Case, settings: Settings) -> Problem:
    torch.manual_seed(0)
    dtype = torch.float32 if settings.autocast else settings.dtype
    plain, ours = (m.to(settings.device, dtype).eval() for m in case.modules())
    first = case.input(settings.device, dtype)
    count = 1
    if settings.device.type == "cuda":
        cache = torch.cuda.get_device_properties(settings.device).L2_cache_size
        count = max(1, min(_MOST_BUFFERS, -(-2 * cache // first.nbytes)))
    inputs = [first, *(case.input(settings.device, dtype) for _ in range(count - 1))]
    autocast = settings.dtype if settings.autocast else None
    problem = Problem(case, plain, ours, inputs, None, settings.precision, autocast=autocast)
    if settings.backward:
        with torch.no_grad():
            problem.grad = torch.randn_like(build("eager", problem).calls[0]())
    return problem


def _checked(
    problem: Problem, settings: Settings, result: CaseResult, tell: Callable[[str], None]
) -> list[tuple[Contender, Timing]]:
    """Contenders whose results are right; the others' reasons go to the result."""
    tell("float64")
    exact = exact_results(problem)
    formats = settings.formats if problem.case.picture else ("contiguous",)
    problems = [problem.in_format(name) for name in formats]
    ready: list[tuple[Contender, Timing]] = []
    allowed = tolerance(problem)
    if settings.backward:
        # ReLUs whose inputs are within rounding of zero switch: PyTorch's own error says how often.
        yardstick = max(check(build("eager", p), exact, allowed).error for p in problems)
        allowed = max(allowed, 3 * yardstick)
    for name in (OURS, *settings.against):
        for formatted in problems:
            tell(f"checking {name}")
            try:
                contender = build(name, formatted)
                found = check(contender, exact, allowed)
            except Unavailable as reason:
                result.missing.setdefault(name, str(reason))
                continue
            except Exception as error:  # one that breaks must not end the others' measurement
                lines = str(error).strip().splitlines() or [""]
                reason_text = f"failed: {type(error).__name__}: {lines[0]}"
                if name == OURS:
                    result.failures.append(f"{formatted.memory_format}: {reason_text}")
                result.missing.setdefault(name, reason_text)
                continue
            path = styleforge.last_path() if name == OURS else None
            if not found.passed:
                wrong = f"wrong result: relative error {found.error:.3g}, allowed {allowed:.3g}"
                result.missing[name] = wrong
                if name == OURS:
                    result.failures.append(f"{formatted.memory_format}: {wrong}")
                continue
            if name == OURS and not found.deterministic:
                result.failures.append(f"{formatted.memory_format}: repeated calls differ")
            ready.append((contender, Timing(formatted.memory_format, found, path=path)))
    if any("wrong" in failure or "failed" in failure for failure in result.failures):
        return []  # right in one format is not right
    for contender, _ in ready:  # one format is enough to take part; a wrong result in the other stays named
        if not result.missing.get(contender.name, "wrong").startswith("wrong"):
            del result.missing[contender.name]
    return ready


def _time(
    ready: Sequence[tuple[Contender, Timing]],
    settings: Settings,
    result: CaseResult,
    tell: Callable[[str], None],
) -> None:
    if settings.device.type == "cuda":
        _time_on_gpu(ready, settings, result, tell)
    else:
        tell("timing")
        samples = wall_times(
            [contender.calls[0] for contender, _ in ready],
            settings.iterations,
            settings.warmup,
            settings.seconds * len(ready),
        )
        for (_, timing), own in zip(ready, samples, strict=True):
            timing.wall = summarize(own)
    formats: dict[str, dict[str, float]] = {}
    hosts: dict[str, dict[str, float]] = {}
    for contender, timing in ready:
        if timing.wall is None:
            continue
        formats.setdefault(contender.name, {})[timing.memory_format] = timing.main().median
        timing.formats = formats[contender.name]
        timing.hosts = hosts.setdefault(contender.name, {})
        if timing.host is not None:
            timing.hosts[timing.memory_format] = timing.host.median
        best = result.timings.get(contender.name)
        if best is None or timing.main().median < best.main().median:
            result.timings[contender.name] = timing
    if OURS not in result.timings:
        result.timings.clear()


def _time_on_gpu(
    ready: Sequence[tuple[Contender, Timing]],
    settings: Settings,
    result: CaseResult,
    tell: Callable[[str], None],
) -> None:
    """Times all contenders in turns, but for those that cannot be captured."""
    captured: list[tuple[Timing, CapturedCalls]] = []
    called: list[tuple[Contender, Timing, int]] = []  # with the calls of a burst
    for contender, timing in ready:
        tell(f"capturing {contender.name}")
        try:
            burst = _prepare_on_gpu(contender, timing, settings, captured)
        except Exception as error:  # as above: capture may refuse what eager calls allow
            lines = str(error).strip().splitlines() or [""]
            result.missing[contender.name] = f"failed: {type(error).__name__}: {lines[0]}"
            if contender.name == OURS:
                result.failures.append(f"{timing.memory_format}: {result.missing[OURS]}")
            torch.cuda.synchronize()
            continue
        called.append((contender, timing, burst))
    tell("timing")
    samples = graph_times(
        [graph for _, graph in captured],
        settings.iterations,
        settings.warmup,
        settings.seconds * len(captured),
    )
    for (timing, _), own in zip(captured, samples, strict=True):
        timing.gpu, timing.gpu_clock = summarize(own), "graph"
    captured.clear()
    waited = [each for each in called if not each[0].synchronous]
    # Fewer calls of long ones: what is asked is how soon the host is through, and it may wait for none.
    hosts = host_times(
        [contender.calls[0] for contender, _, _ in waited],
        [burst for _, _, burst in waited],
        15 if all(burst == _CALLS_OF_A_BURST for _, _, burst in waited) else 3,
    )
    for (_, timing, _), own in zip(waited, hosts, strict=True):
        timing.host = summarize(own)

    def finished(call: Callable[[], Any]) -> None:
        call()
        torch.cuda.synchronize()

    walls = wall_times(
        [partial(finished, contender.calls[0]) for contender, _, _ in called],
        settings.iterations,
        settings.warmup,
        settings.seconds * len(called),
    )
    for (_, timing, _), own in zip(called, walls, strict=True):
        timing.wall = summarize(own)


def _prepare_on_gpu(
    contender: Contender, timing: Timing, settings: Settings, captured: list[tuple[Timing, CapturedCalls]]
) -> int:
    """Captures the contender's calls, or times them where that cannot be; the calls of a burst."""
    calls = contender.calls
    estimate = 0.0
    if contender.capturable and not contender.synchronous:
        start = time.perf_counter()
        calls[0]()
        torch.cuda.synchronize()
        estimate = (time.perf_counter() - start) * 1e6
        count = max(1, min(_CALLS_OF_A_GRAPH, int(_GRAPH_MICROSECONDS / estimate)))
        if estimate > _LONG_CALL:  # it empties the cache itself
            calls = calls[: max(2, count)]
        timing.peak_bytes = peak_memory(calls[0])
        captured.append((timing, CapturedCalls(calls, count)))
    elif not contender.synchronous:
        timing.gpu, timing.gpu_clock = summarize(_event_times(calls, settings)), "events"
    return max(2, min(_CALLS_OF_A_BURST, int(_GRAPH_MICROSECONDS / max(estimate, 1))))


def _event_times(calls: Sequence[Callable[[], Any]], settings: Settings) -> list[float]:
    """GPU time of calls that are graphs themselves: between events around as many as there are inputs."""
    count = max(len(calls), _CALLS_OF_A_GRAPH)

    def burst() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(count):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e3 / count

    stop = time.perf_counter() + settings.seconds
    burst()
    times: list[float] = []
    while len(times) < settings.iterations and (len(times) < 3 or time.perf_counter() < stop):
        times.append(burst())
    return times
