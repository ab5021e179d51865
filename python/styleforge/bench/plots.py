"""Plots of a run as SVG elements for a page that loads nothing: speed-ups, scaling with size, roofline."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Sequence
from typing import Any

from styleforge.bench.contenders import OTHERS, OURS
from styleforge.bench.floors import Rates
from styleforge.bench.measure import CaseResult

# The colours that Okabe and Ito (2008) chose to be told apart by everybody.
_COLOURS = dict(
    zip((OURS, *OTHERS), ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), strict=True)
)
_MARKERS = dict(zip((OURS, *OTHERS), "os^Dv*", strict=True))


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return False
    return True


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure, figure.add_subplot()


def _svg(figure: Any, salt: str) -> str:
    """An element that names no namespace and no metadata: in HTML it needs none, and both are addresses."""
    matplotlib = importlib.import_module("matplotlib")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)


def _contenders(results: Sequence[CaseResult]) -> list[str]:
    return [name for name in (OURS, *OTHERS) if any(name in result.timings for result in results)]


def speedup_bars(results: Sequence[CaseResult], salt: str) -> str:
    """Speed-up over each other contender, a group of bars for each case; below 1 we lose."""
    results = [result for result in results if result.speedups()]
    others = [name for name in _contenders(results) if name != OURS]
    if not others:
        return ""
    figure, axes = _figure(8, 1.2 + 0.24 * len(results) * (len(others) + 1))
    height = 0.8 / len(others)
    for i, other in enumerate(others):
        present = [(row, r.speedups()[other]) for row, r in enumerate(results) if other in r.speedups()]
        positions = [row + (i - (len(others) - 1) / 2) * height for row, _ in present]
        bars = axes.barh(
            positions, [s for _, s in present], height * 0.9, label=f"over {other}", color=_COLOURS[other]
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(results)), [result.case.name for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("speed-up of styleforge (left of the line it is slower)")
    axes.margins(x=0.12)
    axes.legend(fontsize=8, loc="best")
    return _svg(figure, f"speedup {salt}")


def scaling(results: Sequence[CaseResult], salt: str) -> str:
    """Time against the work of a call, a line for each contender, with the floor."""
    results = [result for result in results if result.timings]
    if not results:
        return ""
    counted = all(result.operations for result in results)

    def work(result: CaseResult) -> float:
        return result.operations if counted else result.bytes

    results = sorted(results, key=work)
    figure, axes = _figure(8, 4)
    for name in _contenders(results):
        points = [(work(r), r.timings[name].main().median) for r in results if name in r.timings]
        style = {"color": _COLOURS[name], "marker": _MARKERS[name], "markersize": 5, "linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    floor = [(work(r), r.floor) for r in results]
    axes.plot(*zip(*floor, strict=True), "k--", linewidth=1, label="floor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations of a call" if counted else "bytes of a call")
    axes.set_ylabel("time of a call, us (median)")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure, f"scaling {salt}")


def roofline(results: Sequence[CaseResult], rates: Rates, salt: str) -> str:
    """Operations a second against operations a byte, under the two measured roofs."""
    results = [result for result in results if result.timings and result.operations]
    if not results:
        return ""
    figure, axes = _figure(8, 4)
    ridge = rates.product / rates.copy
    intensities = [result.operations / result.bytes for result in results]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot(
        [left, ridge, right],
        [left * rates.copy / 1e12, rates.product / 1e12, rates.product / 1e12],
        "k-",
        label="measured: copy, matrix product",
    )
    for name in _contenders(results):
        points = [
            (r.operations / r.bytes, r.operations / r.timings[name].main().median / 1e6)
            for r in results
            if name in r.timings
        ]
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=_COLOURS[name],
            marker=_MARKERS[name],
            linestyle="none",
            markersize=6,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure, f"roofline {salt}")
