"""A run as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from styleforge.bench import plots
from styleforge.bench.floors import Rates
from styleforge.bench.measure import CaseResult
from styleforge.bench.tables import absent, headings, losses, rows

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1em 0 }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
.wide { overflow-x: auto } .bad { color: #b00020; font-weight: 600 }
svg { max-width: 100%; height: auto; display: block; margin: 1em 0 }
"""


def page(data: Mapping[str, Any], tables: Mapping[str, Sequence[CaseResult]], rates: Rates) -> str:
    """The page.

    Args:
        data: what ``report_json.report`` made of the run.
        tables: results by title.
        rates: the floors' rates.
    """
    on_gpu = data["settings"]["device"] != "cpu"
    machine, settings = data["environment"], data["settings"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>styleforge bench</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>styleforge bench: {escape(str(machine['device']))}</h1>",
        f"<p>{escape(data['date'])}</p>",
        _table(["", ""], [[name, str(value)] for name, value in {**machine, **settings}.items()]),
        f"<p>Floor: the longer of bytes (input, output, parameters once) at {rates.copy / 1e9:,.0f} GB/s, "
        f"measured by a copy, and operations at {rates.product / 1e12:,.2f} TFLOP/s, measured by "
        f"{escape(rates.product_is)}. Times: {_clocks(on_gpu)}; contenders count in their better memory "
        "format. More than 100 percent of the floor: a cache held "
        "the tensors, the algorithm needs fewer operations than the plain layers, or others kept the machine "
        "busy while the rates were measured. Every result was compared with float64 before it was timed.</p>",
    ]
    if not plots.available():
        parts.append("<p>Plots need matplotlib (pip install matplotlib).</p>")
    for title, results in tables.items():
        parts += _section(title, results, rates, on_gpu)
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _clocks(on_gpu: bool) -> str:
    if not on_gpu:
        return "wall clock, the contenders in turns"
    return (
        "GPU time inside a CUDA graph over inputs that the L2 cache does not hold (cudagraph: between "
        "events), host time of a call, and wall clock of a call and its result; onnxruntime and jax have the "
        "wall clock alone and are compared on it"
    )


def _section(title: str, results: Sequence[CaseResult], rates: Rates, on_gpu: bool) -> list[str]:
    parts = [f"<h2>{escape(title)}</h2>"]
    for result in results:
        parts += [f'<p class="bad">{escape(result.case.name)}: {escape(f)}</p>' for f in result.failures]
    if plots.available():
        parts += [
            plots.speedup_bars(results, title),
            plots.scaling(results, title),
            plots.roofline(results, rates, title),
        ]
    body = [row for result in results for row in rows(result, on_gpu)]
    if body:
        parts.append(_table(headings(on_gpu), body))
    checks = [
        [
            result.case.name,
            name,
            f"{t.check.error:.2e}",
            f"{t.check.tolerance:.0e}",
            "identical" if t.check.deterministic else "differ",
            t.path or "",
        ]
        for result in results
        for name, t in result.timings.items()
    ]
    if checks:
        names = ["case", "who", "relative error against float64", "allowed", "repeats", "path"]
        parts += ["<h3>Correctness</h3>", _table(names, checks)]
    missing = absent(results)
    if missing:
        parts += ["<h3>Not measured</h3>", _list(missing)]
    if body:
        parts += ["<h3>Where we lose</h3>", _list(losses(results) or ["nowhere in this table"])]
    return parts


def _table(names: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names) if any(names) else ""
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide"><table><tr>{head}</tr>' + "\n".join(lines) + "</table></div>"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
