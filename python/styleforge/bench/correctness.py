"""Whether results are right, against float64, and the same from run to run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.bench.contenders import Contender, Problem, as_list, module_calls
from styleforge.bench.precision import repeatable_convolutions

# Of the whole result: |result - exact| / |exact| in the Euclidean norm.
_TOLERANCES = {"ieee": 1e-5, "tf32": 3e-3, "float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-12}
_VANISHES = 1e-9  # of the largest gradient, in float64
_NETWORK_FACTOR = 10  # sixteen convolutions and norms on top of each other
_MOST_SCORES = 2**27  # of attention in float64 at a time: 1 GB


@dataclass(frozen=True)
class Check:
    """Relative and largest absolute difference from float64, what is allowed, and whether repeats agree."""

    error: float
    largest: float
    tolerance: float
    deterministic: bool

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def tolerance(problem: Problem) -> float:
    """The relative difference that is allowed for a dtype and precision."""
    dtype = str(problem.autocast or problem.inputs[0].dtype)[6:]
    found = _TOLERANCES[problem.precision if dtype == "float32" else dtype]
    return found * (_NETWORK_FACTOR if problem.case.operator == "transformer-net" else 1)


def exact_results(problem: Problem) -> list[Tensor]:
    """The plain layers in float64 on the first input: the result, or the gradients of a step."""
    plain = copy.deepcopy(problem.plain).double()
    grad = None if problem.grad is None else problem.grad.double()
    inputs = [problem.inputs[0].double()]
    double = Problem(problem.case, plain, plain, inputs, grad)
    (call,) = module_calls(plain, list(plain.parameters()), double)
    # Without PyTorch's one kernel for attention and encoder layers: wide ones in float64 fail to launch.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch.object(F, "scaled_dot_product_attention", _attention_in_parts):
            return [t.detach() for t in as_list(call())]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


_attention: Any = F.scaled_dot_product_attention


def _attention_in_parts(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
    """Attention of long sequences by parts of the queries: in float64 PyTorch holds every score at once."""
    scores = query[..., 0].numel() * key.shape[-2]
    if scores <= _MOST_SCORES or torch.is_grad_enabled() or any(others) or any(named.values()):
        whole: Tensor = _attention(query, key, value, *others, **named)
        return whole
    rows = max(1, _MOST_SCORES * query.shape[-2] // scores)
    return torch.cat([_attention(part, key, value) for part in query.split(rows, -2)], -2)


def errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """Largest relative (Euclidean norm of each tensor) and largest absolute difference.

    What should vanish (the gradient of a bias that a norm cancels) holds rounding errors of the others: it is
    measured against the largest of them; other small ones against no less than a thousandth of that.
    """
    if [r.shape for r in results] != [e.shape for e in exact]:
        return float("nan"), float("nan")
    scale = max(float(e.norm()) for e in exact)
    relative = largest = 0.0
    for result, reference in zip(results, exact, strict=True):
        difference = result.detach().to(reference.device).double() - reference
        if difference.numel() == 0:
            continue
        if not bool(torch.isfinite(difference).all()):
            return float("nan"), float("nan")
        own = float(reference.norm())
        measure = max(own, 1e-3 * scale, 1e-30) if own > _VANISHES * scale else max(scale, 1e-30)
        relative = max(relative, float(difference.norm()) / measure)
        largest = max(largest, float(difference.abs().max()))
    return relative, largest


def check(contender: Contender, exact: Sequence[Tensor], allowed: float) -> Check:
    """Runs a contender on the first input, as it is and twice with repeatable convolutions, and compares."""
    call = contender.calls[0]

    def run() -> list[Tensor]:
        return [t.detach().clone() for t in contender.outputs(call())]

    result = run()
    with repeatable_convolutions():
        first, again = run(), run()
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return Check(*errors(result, exact), allowed, same)
