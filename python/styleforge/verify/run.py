"""Runs one case: result and gradients against float64, twice the same bits, and the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor

from styleforge import last_path
from styleforge.bench.precision import repeatable_convolutions
from styleforge.bench.timing import cpu_times, graph_time
from styleforge.ops._precision import convolutions_in, matmuls_in
from styleforge.verify.cases import Case
from styleforge.verify.operators import OPERATORS, Tensors
from styleforge.verify.tolerance import Comparison, compare

_SECONDS = 0.4
_LEAST_REPEATS, _MOST_REPEATS = 5, 30


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds of one forward without gradients."""

    pytorch_ms: float
    styleforge_ms: float

    @property
    def speedup(self) -> float:
        """PyTorch's time over styleforge's."""
        return self.pytorch_ms / self.styleforge_ms


@dataclass
class Outcome:
    """What one case gave; what was not come to, or not asked for, is None."""

    case: Case
    forward: Comparison | None = None
    gradients: dict[str, Comparison] = field(default_factory=dict)
    deterministic: bool | None = None
    path: str = ""
    timing: Timing | None = None
    error: str = ""

    @property
    def worst_gradient(self) -> tuple[str, Comparison] | None:
        """The gradient that is nearest to its tolerance or furthest beyond it."""
        return max(self.gradients.items(), key=lambda entry: entry[1].share, default=None)

    @property
    def problems(self) -> list[str]:
        """Why it failed, a line each; empty where it passed."""
        found = [f"error: {self.error}"] if self.error else []
        compared = {} if self.forward is None else {"result": self.forward}
        compared |= {f"gradient of {name}": one for name, one in self.gradients.items()}
        for name, one in compared.items():
            if not one.passed:
                found.append(
                    f"{name}: largest difference {one.max_difference:.2e} (tolerance {one.tolerance:.2e}), "
                    f"RMS {one.rms_difference:.2e} (tolerance {one.rms_tolerance:.2e})"
                )
        if self.deterministic is False:
            found.append("two runs differ in their bits")
        return found

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def run_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    precision: str = "ieee",
    backward: bool = True,
    timed: bool = True,
) -> Outcome:
    """Runs a case; what goes wrong in it is in the outcome.

    Args:
        case: what to run; its numbers are the same on each run and each device.
        device: CPU or CUDA.
        dtype: float32, float16 or bfloat16.
        precision: of float32 on CUDA, PyTorch's and ours: "ieee" or "tf32".
        backward: whether the gradients are checked as well.
        timed: whether to measure times.
    """
    outcome = Outcome(case)
    try:
        with convolutions_in(precision), matmuls_in(precision), _on(device):
            _run(outcome, device, dtype, precision, backward=backward, timed=timed)
    except Exception as error:  # the operator's fault or memory's: the other cases go on
        lines = [line for line in str(error).splitlines() if line.strip()]
        outcome.error = f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
    return outcome


def _run(
    outcome: Outcome, device: torch.device, dtype: torch.dtype, precision: str, *, backward: bool, timed: bool
) -> None:
    case = outcome.case
    operator, config = OPERATORS[case.operator], case.config
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(device, dtype)

    given = operator.tensors(config, draw)
    exact = {name: t.double() if _is_float(t) else t for name, t in given.items()}
    ours = partial(operator.styleforge, config, precision=precision)
    theirs = partial(operator.pytorch, config)

    with torch.no_grad():
        result = ours(given)
        outcome.path = last_path()
        reference = theirs(exact)
        outcome.forward = compare(
            result, theirs(given), reference, precision=precision, terms=operator.terms(config)
        )
        same = _same_bits(result, ours(given))
    outcome.deterministic = same

    if backward and operator.has_gradient(config):
        grad = torch.randn(reference.shape, generator=generator, dtype=torch.float64).to(device)
        with torch.no_grad():
            before = operator.kink(config, exact)
        if before is not None:
            # So near to the kink, PyTorch and we may come to lie on different sides of it.
            grad = grad * (before.abs() > outcome.forward.tolerance)
        grad = grad.to(dtype)
        results = _gradients(ours, given, grad)
        yardsticks = _gradients(theirs, given, grad)
        references = _gradients(theirs, exact, grad.double())
        rows = grad.numel() // grad.shape[1 if grad.dim() == 4 else -1]
        for name, right in references.items():
            summed = grad.numel() / right.shape[0] if right.dim() == 1 else 0.0
            outcome.gradients[name] = compare(
                results[name],
                yardsticks[name],
                right,
                precision=precision,
                terms=max(operator.terms(config), rows),
                scale=summed**0.5,
            )
        with repeatable_convolutions():
            first, again = (_gradients(ours, given, grad) for _ in range(2))
        outcome.deterministic = same and all(_same_bits(first[name], again[name]) for name in first)
    del exact, reference
    if timed:
        with torch.no_grad():
            outcome.timing = _timing(partial(theirs, given), partial(ours, given), device)


def _gradients(function: Callable[[Tensors], Tensor], given: Tensors, grad: Tensor) -> dict[str, Tensor]:
    """The gradients of every floating-point argument, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items() if _is_float(t)}
    result = function({**given, **leaves})
    return dict(zip(leaves, torch.autograd.grad(result, list(leaves.values()), grad), strict=True))


def _timing(pytorch: Callable[[], Tensor], ours: Callable[[], Tensor], device: torch.device) -> Timing:
    """Times on CUDA by events around graphs of many calls; elsewhere the wall clock's, taken in turns."""
    start = time.perf_counter()
    pytorch()
    ours()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return Timing(*(graph_time([call], repeats=15) / 1e3 for call in (pytorch, ours)))
    repeats = int(_SECONDS / (time.perf_counter() - start))
    repeats = min(max(repeats, _LEAST_REPEATS), _MOST_REPEATS)
    return Timing(*cpu_times([pytorch, ours], repeats))


def _is_float(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.is_floating_point()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # As integers, so that -0 differs from 0 and a NaN equals itself.
    integers = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(integers), b.view(integers))


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
