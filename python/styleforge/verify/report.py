"""Outcomes as a table, a summary and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from styleforge.verify.run import Outcome
from styleforge.verify.tolerance import Comparison


@dataclass(frozen=True)
class Summary:
    """Totals over all cases."""

    total: int
    passed: int
    average_speedup: float | None

    @property
    def failed(self) -> int:
        """How many did not pass."""
        return self.total - self.passed

    @property
    def pass_rate(self) -> float:
        """In percent; 100 for no case."""
        return 100.0 * self.passed / self.total if self.total else 100.0


def summary(outcomes: Sequence[Outcome]) -> Summary:
    """The totals; the average speed-up is the geometric mean over the cases that passed and were timed."""
    logarithms = [math.log(one.timing.speedup) for one in outcomes if one.passed and one.timing is not None]
    average = math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
    return Summary(len(outcomes), sum(one.passed for one in outcomes), average)


def table(operator: str, outcomes: Sequence[Outcome]) -> RenderableType:
    """One row a case, and beneath it why each one failed that did."""
    rows = Table(
        title=f"{operator}: largest difference from float64 / tolerance, times in ms",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("#", "configuration"):
        rows.add_column(name, overflow="fold", justify="right" if name == "#" else "left")
    rows.add_column("result", no_wrap=True)
    rows.add_column("gradients (worst)", no_wrap=True)
    for name in ("PyTorch", "styleforge", "speed-up"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("same bits", no_wrap=True)
    rows.add_column("verdict", no_wrap=True)
    problems: list[RenderableType] = []
    for number, one in enumerate(outcomes, 1):
        gradient = one.worst_gradient
        times = ("-", "-", "-")
        if one.timing is not None:
            times = (_ms(one.timing.pytorch_ms), _ms(one.timing.styleforge_ms), f"{one.timing.speedup:.2f}x")
        rows.add_row(
            str(number),
            Text(str(one.case)),
            "-" if one.forward is None else _difference(one.forward),
            "-" if gradient is None else _difference(gradient[1]),
            *times,
            {True: "yes", False: "no", None: "-"}[one.deterministic],
            Text("passed", "green") if one.passed else Text("FAILED", "bold red"),
        )
        problems += [Text(f"  {number}: {problem}", "red") for problem in one.problems]
    return Group(rows, *problems, *([Text()] if problems else []))


def summary_text(outcomes: Sequence[Outcome]) -> Text:
    """The totals, a line each."""
    totals = summary(outcomes)
    average = "-" if totals.average_speedup is None else f"{totals.average_speedup:.2f}x (geometric mean)"
    lines = {
        "Total tests": str(totals.total),
        "Passed": str(totals.passed),
        "Failed": str(totals.failed),
        "Pass rate": f"{totals.pass_rate:.1f}%",
        "Avg speedup": average,
    }
    return Text("\n".join(f"{name + ':':<13} {value}" for name, value in lines.items()))


def as_json(outcomes: Sequence[Outcome], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, for ``json.dumps``; a number that is not finite becomes a string."""
    report = {
        **settings,
        "summary": {
            **asdict(totals := summary(outcomes)),
            "failed": totals.failed,
            "pass_rate": totals.pass_rate,
        },
        "cases": [
            {
                "operator": one.case.operator,
                "config": one.case.config,
                "passed": one.passed,
                "problems": one.problems,
                "forward": None if one.forward is None else asdict(one.forward),
                "gradients": {name: asdict(gradient) for name, gradient in one.gradients.items()},
                "deterministic": one.deterministic,
                "path": one.path,
                "pytorch_ms": None if one.timing is None else one.timing.pytorch_ms,
                "styleforge_ms": None if one.timing is None else one.timing.styleforge_ms,
                "speedup": None if one.timing is None else one.timing.speedup,
            }
            for one in outcomes
        ],
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _difference(one: Comparison) -> Text:
    text = f"{one.max_difference:.1e} / {one.tolerance:.1e}"
    return Text(text, "" if one.passed else "red")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}"
