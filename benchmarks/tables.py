"""The README's performance tables and GOALS.md, made of the results kept here: `make performance-tables`.

    python benchmarks/tables.py

The files are those of `styleforge bench --json` (see run.py). Of several with the same device, precision and
step, the newest counts. A case of ``SHOWN`` is a row wherever it was measured; losses are counted over all
cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import goals

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
GOALS = FOLDER / "GOALS.md"
BEGIN, END = "<!-- performance: begin (make performance-tables) -->\n", "<!-- performance: end -->\n"
OURS = "styleforge"

# What a reader compares with their own: small and large of each operator, the seed's cases among them.
SHOWN = (
    ("transformer-net", "1x512x512"),
    ("transformer-net", "8x512x512"),
    ("conv", "1x64->64@64x64k3s1"),
    ("conv", "1x128->128@128x128k3s1"),
    ("conv", "1x64->128@128x128k3s2"),
    ("conv", "1x3->32@512x512k9s1"),
    ("instance-norm", "4x64x256x256"),
    ("instance-norm", "1x64x1024x1024"),
    ("instance-norm", "1x3x512x512"),
    ("ffn", "1x256x128->512"),
    ("ffn", "8x1024x512->2048"),
    ("attention", "1x512x128/4"),
    ("attention", "4x256x512/8"),
    ("attention", "1x2048x4096/32"),
)
SHOWN_TRAINING = (
    ("transformer-net", "8x256x256"),
    ("conv", "1x128->128@128x128k3s1"),
    ("conv", "1x64->128@128x128k3s2"),
    ("instance-norm", "4x64x256x256"),
    ("ffn", "1x256x128->512"),
    ("ffn", "8x1024x512->2048"),
    ("attention", "4x256x512/8"),
    ("attention", "8x1024x1024/16"),
)
MOST_LOSSES = 8
AUTOCAST = "float16 autocast"
PRECISIONS = ("float16", "bfloat16", "TF32", "float32", AUTOCAST, "bfloat16 autocast")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One kept file."""

    data: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Device and versions."""
        found: dict[str, Any] = self.data["environment"]
        return found

    @property
    def on_gpu(self) -> bool:
        """Whether it was measured on a GPU."""
        return bool(self.data["settings"]["device"].startswith("cuda"))

    @property
    def precision(self) -> str:
        """One of ``PRECISIONS``."""
        settings = self.data["settings"]
        if settings.get("autocast"):
            return f"{settings['dtype']} autocast"
        tf32 = settings["dtype"] == "float32" and settings["precision"] == "tf32" and self.on_gpu
        return "TF32" if tf32 else str(settings["dtype"])

    @property
    def training(self) -> bool:
        """Whether it measured forward and backward."""
        return bool(self.data["settings"]["backward"])

    def entries(self) -> list[Entry]:
        """Every case."""
        return [case for table in self.data["tables"] for case in table["cases"]]

    def entry(self, operator: str, shape: str) -> Entry | None:
        """A case, if it was measured."""
        key = (operator, shape)
        return next((e for e in self.entries() if (e["operator"], e["case"]) == key), None)


def load(folder: Path = FOLDER) -> list[Run]:
    """The newest run for each device, precision and step.

    Raises:
        ValueError: a file is not what `styleforge bench --json` writes.
    """
    newest: dict[tuple[Any, ...], Run] = {}
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text())
        if not isinstance(data, dict) or data.get("format") != 1:
            raise ValueError(f"{file} is not what `styleforge bench --json` writes")
        run = Run(data)
        key = (run.environment["device"], run.precision, run.training)
        if key not in newest or newest[key].data["date"] <= data["date"]:
            newest[key] = run
    return sorted(newest.values(), key=_order)


def render(runs: Sequence[Run]) -> str:
    """The tables in Markdown, GPUs first."""
    parts: list[str] = []
    for device in dict.fromkeys(run.environment["device"] for run in sorted(runs, key=_order)):
        parts += _device([run for run in runs if run.environment["device"] == device])
    return "\n\n".join(parts) + "\n" if parts else ""


def table_in(readme: str) -> str:
    """The part of the README between the two marks."""
    return readme.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    """Rewrites the README."""
    readme = README.read_text()
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"{README} has no place for the tables: {BEGIN.strip()} and {END.strip()}")
    before, _, rest = readme.partition(BEGIN)
    runs = load()
    README.write_text(before + BEGIN + render(runs) + END + rest.partition(END)[2])
    GOALS.write_text(render_goals(runs))
    print(f"wrote the tables in {README} and {GOALS}, of {len(runs)} runs")


def render_goals(runs: Sequence[Run]) -> str:
    """GOALS.md: of each GPU what was asked and what is reached."""
    parts = [
        "# Goals and what is reached",
        "Made by `make performance-tables` of the results kept here: styleforge, eager PyTorch and "
        "`torch.compile`, each in its better memory format (the other in brackets). *Reached* is styleforge's"
        " time (or memory) as a part of the better of the two, or of the one that is named, in the same run; "
        "**bold** where it is more than was asked.",
    ]
    for device in dict.fromkeys(run.environment["device"] for run in runs if run.on_gpu):
        own = [run for run in runs if run.environment["device"] == device]
        entries = {}
        for run in own:
            name_of_run = run.precision.lower().replace(" ", "-") + ("-backward" if run.training else "")
            entries.update({(name_of_run, e["operator"], e["case"]): e for e in run.entries()})
        parts += [_heading(own), goals.render(entries, name)]
    return "\n\n".join(parts).rstrip() + "\n"


def _order(run: Run) -> tuple[Any, ...]:
    return (not run.on_gpu, run.environment["device"], run.training, PRECISIONS.index(run.precision))


def _device(runs: Sequence[Run]) -> list[str]:
    parts = [_heading(runs)]
    several = False
    for training in (False, True):
        own = [run for run in runs if run.training is training]
        if not own:
            continue
        step = "forward and backward" if training else "forward"
        # One precision with all columns; of the others the time and the two ratios.
        main = own[0]
        columns = ["of eager", "of `torch.compile`"]
        if main.on_gpu:  # a CPU's caches hold much of what the floor counts as memory traffic
            columns.append("of the floor")
        if not training:  # after a step the last path would be that of a backward
            columns.append("path")
        heads = [f"{main.precision}, {step}", OURS, *columns]
        shown = SHOWN_TRAINING if training else SHOWN
        parts.append(_table(heads, shown, [main], partial(_full, columns)))
        if own[1:]:
            several = True
            heads = [f"the same, {step}", *(run.precision for run in own[1:])]
            parts.append(_table(heads, shown, own[1:], lambda entries: [_short(entry) for entry in entries]))
    if several:
        parts.append("In brackets: times the time of eager, of `torch.compile`.")
    parts.append(_losses(runs))
    return parts


def _heading(runs: Sequence[Run]) -> str:
    first = runs[0]
    found = first.environment
    dates = sorted({run.data["date"][:10] for run in runs})
    versions = sorted({f"PyTorch {run.environment['pytorch']}" for run in runs})
    said = [", ".join(dates), "styleforge " + found["styleforge"], *versions]
    if first.on_gpu:
        said += [f"CUDA {found['cuda']}", f"cuDNN {found['cudnn']}"]
        clock = "GPU time of a call in a CUDA graph over inputs that the L2 cache does not hold"
    else:
        said.append(f"{found['threads']} threads, {found['cpu_capability']}")
        clock = "wall-clock time"
    return (
        f"**{found['device']}** ({', '.join(said)}): {clock}, median; eager, `torch.compile` and styleforge "
        "each in its better memory format; **bold** where styleforge is slower."
    )


def _table(
    heads: list[str],
    shown: Sequence[tuple[str, str]],
    runs: Sequence[Run],
    cells: Callable[[list[Entry | None]], list[str]],
) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for operator, shape in shown:
        entries = [run.entry(operator, shape) for run in runs]
        if any(entry is not None for entry in entries):
            lines.append(f"| {name(operator, shape)} | " + " | ".join(cells(entries)) + " |")
    return "\n".join(lines)


def _full(columns: Sequence[str], entries: list[Entry | None]) -> list[str]:
    (entry,) = entries
    ours = None if entry is None else entry["contenders"].get(OURS)
    if entry is None or ours is None:
        return ["not measured", *("-" for _ in columns)]
    layout = "" if ours["memory_format"] == "contiguous" else f", {ours['memory_format']}"
    # A network has as many paths as layers; only the last one is recorded.
    path = "several" if entry["operator"] == "transformer-net" else f"`{ours['path']}`"
    cells = {
        "of eager": _ratio(entry, "eager"),
        "of `torch.compile`": _ratio(entry, "compile"),
        "of the floor": f"{ours['throughput']['percent_of_floor']:.0f} %",
        "path": path + layout,
    }
    return [_time(_median(ours)), *(cells[column] for column in columns)]


def _short(entry: Entry | None) -> str:
    if entry is None or OURS not in entry["contenders"]:
        return "-"
    ratios = f"{_ratio(entry, 'eager')}, {_ratio(entry, 'compile')}"
    return f"{_time(_median(entry['contenders'][OURS]))} ({ratios})"


def _ratio(entry: Entry, other: str) -> str:
    if other not in entry["speedups"]:
        return "-"
    ratio = f"{1 / entry['speedups'][other]:.2f}"
    return f"**{ratio}**" if float(ratio) > 1 else ratio


def _median(contender: Entry) -> float:
    clock = contender["gpu"] or contender["wall"]
    return float(clock["median"])


def _time(microseconds: float) -> str:
    if microseconds >= 10_000:
        return f"{microseconds / 1000:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"
    return f"{microseconds:.0f} us" if microseconds >= 100 else f"{microseconds:.3g} us"


def _losses(runs: Sequence[Run]) -> str:
    """Where styleforge is slower or wrong, over all cases that were measured."""
    found: list[tuple[float, str]] = []
    compared = 0
    for run in runs:
        step = f"{run.precision}{', forward and backward' if run.training else ''}"
        for entry in run.entries():
            what = f"{name(entry['operator'], entry['case'])}, {step}"
            compared += 1
            if entry["failures"]:
                found.append((float("inf"), f"{what}: {'; '.join(entry['failures'])}"))
                continue
            worst = _worst(entry)
            if worst is not None:
                found.append((worst[0], f"{what}: {worst[1]}"))
    if not found:
        return f"Where it loses: in none of {compared} cases."
    found.sort(key=lambda loss: -loss[0])
    lines = [f"Where it loses, in {len(found)} of {compared} cases:", ""]
    lines += [f"- {text}" for _, text in found[:MOST_LOSSES]]
    if len(found) > MOST_LOSSES:
        least = found[-1][0]
        lines.append(f"- {len(found) - MOST_LOSSES} more, {found[MOST_LOSSES][0]:.2f} to {least:.2f} times")
    return "\n".join(lines)


def _worst(entry: Entry) -> tuple[float, str] | None:
    """The contender that is furthest ahead, each in its better memory format or all with contiguous input."""
    formats = {who: contender.get("formats", {}) for who, contender in entry["contenders"].items()}
    found = []
    for other, speedup in entry["speedups"].items():
        ratio = 1 / speedup
        found.append((ratio, f"{ratio:.2f} times {_called(other)}"))
        if "contiguous" in formats[OURS] and "contiguous" in formats[other]:
            ratio = formats[OURS]["contiguous"] / formats[other]["contiguous"]
            found.append((ratio, f"{ratio:.2f} times {_called(other)} where the input is contiguous"))
    ahead = [loss for loss in found if round(loss[0], 2) > 1]
    return max(ahead, key=lambda loss: loss[0]) if ahead else None


def _called(other: str) -> str:
    return {"compile": "`torch.compile`"}.get(other, other)


def name(operator: str, shape: str) -> str:
    """A case in words and PyTorch's order of sizes."""
    sizes = re.findall(r"\d+", shape)
    if operator == "transformer-net":
        return f"TransformerNet {sizes[0]}x3x{sizes[1]}x{sizes[2]}"
    if operator == "instance-norm":
        return f"instance norm + ReLU {shape}"
    if operator == "ffn":
        return f"FFN {shape}"
    if operator == "attention":
        return f"attention {'x'.join(sizes[:3])}, {sizes[3]} heads"
    if len(sizes) == 4:
        return f"residual block {'x'.join(sizes)}"
    n, channels, out, height, width, kernel, stride = sizes
    said = f"conv {kernel}x{kernel} + norm + ReLU {n}x{channels}x{height}x{width}"
    said += f" to {out} channels" if out != channels else ""
    return said + (f", stride {stride}" if stride != "1" else "")


if __name__ == "__main__":
    main()
