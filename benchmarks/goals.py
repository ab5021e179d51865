"""What the operators are asked to reach on a GPU, next to what they reach: `make performance-tables`.

    python benchmarks/goals.py      # prints the tables of the results that are kept here

A goal is one figure of one case: GPU time, host time of an eager call or peak memory, as a part of that of
eager PyTorch and `torch.compile` (of the better of the two where both are named), or the share of a copy's
rate. `run.py` measures every case that has a goal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

BOTH = ("eager", "compile")
OURS = "styleforge"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One figure.

    Attributes:
        group: heading of the table.
        run: of ``run.RUNS``.
        operator: with ``shape``, the case as `styleforge bench` writes it.
        figure: "gpu", "host", "peak": a part of the others', at most ``asked``; "copy": percent of the rate
            of a copy, at least; "held": memory of a call and its input as a part of what input, output,
            queries, keys and values take, at most. Without ``asked`` it is only stated.
        others: the better of these counts.
    """

    group: str
    run: str
    operator: str
    shape: str
    figure: str
    asked: float | None
    others: tuple[str, ...] = BOTH


CONVOLUTIONS = (
    "1x64->64@64x64k3s1",
    "1x128->128@128x128k3s1",
    "1x64->64@256x256k3s1",
    "1x128->128@32x32k3s1",
    "1x256->256@64x64k1s1",
    "1x64->128@128x128k3s2",
    "8x128->128@64x64k3s1",
)
NORMS = ("4x64x256x256", "1x3x512x512", "1x64x1024x1024", "16x128x128x128")
NETWORKS = ("8x1024x512->2048", "4x2048x768->3072", "2x4096x1024->4096", "1x2048x4096->11008")
SMALL_NETWORK = "1x256x128->512"
SHORT = ("1x128x128/4", "1x256x128/4", "1x512x128/4", "2x256x128/4", "1x256x256/4")
BLOCKS = ("1x2048x4096/32", "1x4096x4096/32")
LONG = "1x32768x512/8"
TRAINING = (("conv", "1x128->128@128x128k3s1"), ("transformer-net", "8x256x256"))


def _style_network() -> Iterator[Goal]:
    group = "TransformerNet"
    for run, asked in (("float16", 0.36), ("tf32", 0.40), ("float32", 0.32)):
        yield Goal(group, run, "transformer-net", "1x512x512", "gpu", asked, ("compile",))
    yield Goal(group, "float16", "transformer-net", "1x512x512", "gpu", 1 / 7, ("eager",))
    for shape in ("8x512x512", "1x1080x1920"):
        yield Goal(group, "float16", "transformer-net", shape, "gpu", 0.45, ("compile",))


def _convolutions() -> Iterator[Goal]:
    group = "Convolution + instance norm + ReLU"
    for run, asked in (("float16", 0.55), ("tf32", 0.6), ("float32", 0.5)):
        for shape in CONVOLUTIONS:
            yield Goal(group, run, "conv", shape, "gpu", asked)
    for run in ("float16", "tf32", "float32"):
        for shape in CONVOLUTIONS:
            yield Goal("The same, host time of an eager call", run, "conv", shape, "host", 1 / 6, ("eager",))


def _norms() -> Iterator[Goal]:
    for run in ("float16", "float32"):
        for shape in NORMS:
            yield Goal("Instance norm + ReLU", run, "instance-norm", shape, "gpu", 0.75, ("compile",))
    for run in ("float16", "float32"):
        for shape in NORMS:
            asked = None if shape == "1x3x512x512" else 92.0  # it fits the L2 cache: no memory is the limit
            yield Goal("The same, percent of a copy's rate", run, "instance-norm", shape, "copy", asked, ())


def _training() -> Iterator[Goal]:
    group = "Forward and backward, float16 autocast"
    for operator, shape in TRAINING:
        for other, asked in (("eager", 0.6), ("compile", 0.9)):
            yield Goal(group, "float16-autocast-backward", operator, shape, "gpu", asked, (other,))
        yield Goal(group, "float16-autocast-backward", operator, shape, "peak", None, ("eager",))


def _feed_forward() -> Iterator[Goal]:
    group = "Feed-forward network"
    asked = {
        "float32": (0.48, 0.48, 0.48, 0.48),
        "tf32": (0.85, 0.88, 0.92, 0.95),
        "bfloat16": (0.78, 0.88, 0.90, 0.97),
        "float16": (0.78, 0.88, 0.90, 0.97),
    }
    for run, most in asked.items():
        for shape, one in zip(NETWORKS, most, strict=True):
            yield Goal(group, run, "ffn", shape, "gpu", one)
    for run, small in (("float32", 0.4), ("bfloat16", 0.55)):
        yield Goal(group, run, "ffn", SMALL_NETWORK, "gpu", small)
    for run in ("float32", "bfloat16"):
        yield Goal(f"{group}, host time", run, "ffn", SMALL_NETWORK, "host", 1 / 3, ("eager",))
    for shape in NETWORKS[:3]:
        step = f"{group}, forward and backward"
        yield Goal(step, "bfloat16-backward", "ffn", shape, "gpu", 0.9, ("compile",))
        yield Goal(step, "bfloat16-backward", "ffn", shape, "peak", None, ("eager",))
    for run in ("float32", "bfloat16"):
        for shape in NETWORKS:
            yield Goal(f"{group}, peak memory in inference", run, "ffn", shape, "peak", 1.0, ("eager",))


def _attention() -> Iterator[Goal]:
    group = "Attention block against nn.MultiheadAttention"
    for run, asked in (("float32", 0.35), ("bfloat16", 0.5)):
        for shape in SHORT:
            yield Goal(group, run, "attention", shape, "gpu", asked)
    for run in ("float32", "bfloat16"):
        for shape in SHORT:
            yield Goal("The same, host time", run, "attention", shape, "host", 1 / 5, ("eager",))
    for run, asked in (("bfloat16", 1.0), ("float32", 0.52)):
        for shape in BLOCKS:
            yield Goal("Attention block, long", run, "attention", shape, "gpu", asked)
    for run, asked in (("bfloat16-backward", 1.0), ("float32-backward", 0.6)):
        step = "Attention block, forward and backward"
        yield Goal(step, run, "attention", "8x1024x1024/16", "gpu", asked, ("compile",))
        yield Goal(step, run, "attention", "8x1024x1024/16", "peak", None, ("eager",))
    yield Goal("Attention block, memory", "float32", "attention", LONG, "held", 1.1, ())


GOALS: tuple[Goal, ...] = (
    *_style_network(),
    *_convolutions(),
    *_norms(),
    *_training(),
    *_feed_forward(),
    *_attention(),
)


def cases_of(run: str) -> list[tuple[str, str]]:
    """(operator, shape) of every goal of a run, each once."""
    return list(dict.fromkeys((goal.operator, goal.shape) for goal in GOALS if goal.run == run))


def reached(goal: Goal, entry: Entry) -> float | None:
    """The figure that ``asked`` is a bound of; None where it was not measured.

    Args:
        goal: which figure.
        entry: the case as `styleforge bench --json` writes it.
    """
    ours = _value(goal.figure, entry, OURS)
    if ours is None or not goal.others:
        return ours
    others = [value for other in goal.others if (value := _value(goal.figure, entry, other)) is not None]
    return ours / min(others) if others else None


def met(goal: Goal, value: float) -> bool:
    """Whether a figure is good enough."""
    if goal.asked is None:
        return True
    return value >= goal.asked if goal.figure == "copy" else round(value, 2) <= round(goal.asked, 2)


def _value(figure: str, entry: Entry, who: str) -> float | None:
    contender = entry["contenders"].get(who)
    if contender is None:
        return None
    if figure == "copy":
        return float(contender["throughput"]["percent_of_floor"]) if entry["floor_is"] == "memory" else None
    if figure in ("gpu", "host"):
        clock = contender[figure]
        return None if clock is None else float(clock["median"])
    peak = contender.get("peak_bytes")
    if peak is None:
        return None
    if figure == "peak":
        return peak / 2**20
    n, length, embed = entry["input_shape"]
    tensor = n * length * embed * 4  # float32
    return float((peak + tensor) / (5 * tensor))


def render(entries: dict[tuple[str, str, str], Entry], name: Any) -> str:
    """The tables in Markdown.

    Args:
        entries: the measured case by run, operator and shape.
        name: makes a case's title of operator and shape.
    """
    lines: list[str] = []
    group, count, good = "", 0, 0
    for goal in GOALS:
        if goal.group != group:
            group = goal.group
            unit = {"peak": "MB", "copy": "us", "held": "MB"}.get(goal.figure, "us")
            lines += ["", f"**{group}** ({unit})", ""]
            lines += ["| case | styleforge | eager | compile | reached | asked |", "|---" * 6 + "|"]
        entry = entries.get((goal.run, goal.operator, goal.shape))
        value = None if entry is None else reached(goal, entry)
        title = f"{name(goal.operator, goal.shape)}, {goal.run.removesuffix('-backward')}"
        lines.append(f"| {title} | " + " | ".join(_cells(goal, entry, value)) + " |")
        if goal.asked is not None:
            count += 1
            good += value is not None and met(goal, value)
    return f"{good} of {count} goals are reached.\n" + "\n".join(lines) + "\n"


def _cells(goal: Goal, entry: Entry | None, value: float | None) -> Sequence[str]:
    figure = {"copy": "gpu", "held": "peak"}.get(goal.figure, goal.figure)
    columns = []
    for who in (OURS, *BOTH):
        own = None if entry is None else _value(figure, entry, who)
        columns.append("-" if own is None else _short(own))
        if entry is not None and own is not None and goal.figure == "gpu":
            formats = entry["contenders"][who].get("formats", {})
            others = [time for time in formats.values() if time != own]
            columns[-1] += f" ({_short(others[0])})" if others else ""
    if value is None:
        said = "not measured"
    elif goal.figure == "copy":
        said = f"{value:.0f} %"
    else:
        said = f"{value:.2f}"
        said += "" if not goal.others or len(goal.others) > 1 else f" of {goal.others[0]}"
        if goal.figure == "peak":
            said += ", peak memory"
    if value is not None and not met(goal, value):
        said = f"**{said}**"
    asked = "-"
    if goal.asked is not None:
        asked = f"{goal.asked:.0f} %" if goal.figure == "copy" else f"{goal.asked:.2f}"
    return (*columns, said, asked)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
