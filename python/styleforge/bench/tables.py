"""The results of a run as tables for the terminal: what is right first, then times, then where we lose."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from styleforge.bench.contenders import OURS
from styleforge.bench.measure import CaseResult


def losses(results: Sequence[CaseResult]) -> list[str]:
    """One line for each case and contender that is faster than styleforge, the worst first."""
    found: list[tuple[float, str]] = []
    for result in results:
        for name, factor in result.speedups().items():
            if factor < 1:
                found.append((factor, f"{result.case.name}: {1 / factor:.2f} times the time of {name}"))
    return [line for _, line in sorted(found)]


def absent(results: Sequence[CaseResult]) -> list[str]:
    """One line for each contender that did not take part somewhere, with its reason and the cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.missing.items():
            reasons.setdefault((name, reason), []).append(result.case.name)
    return [
        f"{name}: {reason}" + ("" if len(where) == len(results) else f" ({', '.join(where)})")
        for (name, reason), where in reasons.items()
    ]


def headings(on_gpu: bool) -> list[str]:
    """Of the columns of ``rows``."""
    clocks = ["GPU us, median", "host us", "wall us", "peak MB"] if on_gpu else ["wall us, median"]
    middle = ["mean +- std", "min .. max", "items/s", "GB/s", "TFLOP/s", "% of floor", "styleforge is"]
    return ["case", "who", *clocks, *middle]


def rows(result: CaseResult, on_gpu: bool) -> list[list[str]]:
    """A row for each contender; empty where styleforge's result is wrong."""
    speedups = result.speedups()
    found: list[list[str]] = []
    for name, timing in result.timings.items():
        main, rates = timing.main(), result.throughput(name)
        who = name if timing.memory_format == "contiguous" else f"{name} ({timing.memory_format})"
        clocks = [timing.gpu, timing.host, timing.wall] if on_gpu else [timing.wall]
        peak = "-" if timing.peak_bytes is None else _figure(timing.peak_bytes / 2**20)
        found.append(
            [
                "" if found else result.case.name,
                who,
                *(_figure(clock.median) if clock else "-" for clock in clocks),
                *([peak] if on_gpu else []),
                f"{_figure(main.mean)} +- {_figure(main.std)}",
                f"{_figure(main.minimum)} .. {_figure(main.maximum)}",
                f"{_figure(rates[f'{result.case.unit}_per_s'])} {result.case.unit}",
                _figure(rates["gb_per_s"]),
                _figure(rates["tflop_per_s"]) if "tflop_per_s" in rates else "-",
                f"{rates['percent_of_floor']:.0f} ({result.floor_is})",
                f"{speedups[name]:.2f}x as fast" if name in speedups else "",
            ]
        )
    return found


def print_results(console: Console, title: str, results: Sequence[CaseResult], on_gpu: bool) -> None:
    """Prints an operator's tables: correctness, then times of what is right, then where we lose."""
    console.print(Text(f"\n{title}", style="bold"))
    correct = Table("case", "who", "relative error", "allowed", "largest", "repeats", "result")
    for result in results:
        first = True
        for name, timing in result.timings.items():
            check = timing.check
            cells = [f"{check.error:.2e}", f"{check.tolerance:.0e}", f"{check.largest:.2e}"]
            same = "identical" if check.deterministic else "differ"
            correct.add_row(result.case.name if first else "", name, *cells, same, "right")
            first = False
        for failure in result.failures:
            correct.add_row(
                result.case.name, OURS, "", "", "", "", Text(f"WRONG {failure}", style="bold red")
            )
    console.print(correct)
    times = Table(*headings(on_gpu))
    for column in times.columns:
        column.overflow = "fold"
    for result in results:
        for row in rows(result, on_gpu):
            times.add_row(*(Text(cell) for cell in row))
        times.add_section()
    if times.row_count:
        console.print(times)
    for line in absent(results):
        console.print(Text(f"not measured: {line}"), soft_wrap=True)
    found = losses(results)
    if times.row_count:
        console.print(Text("where we lose: " + ("" if found else "nowhere in this table")))
    for line in found:
        console.print(Text(f"  {line}"), soft_wrap=True)


def _figure(value: float) -> str:
    """Three significant digits, or all of an integer's."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
