"""Measures what the README's tables and the goals (goals.py) show, and keeps it.

    python benchmarks/run.py                       # all runs, on the GPU if there is one
    python benchmarks/run.py float16 tf32 --suite  # two of the runs, with every case of `--suite`

Files: benchmarks/DEVICE-RUN.json. On a GPU each run goes in parts of about the same length, one
`styleforge bench` a part, all of which compile and check at the same time (which takes nearly all of the
time, on the host); then each has the machine alone to measure (`--turns`). What is not through when the
--total is over is ended; the operators that it had measured are kept. With --only, cases of the file that
are not measured again stay in it with their date, where device and versions are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goals import cases_of
from tables import FOLDER, SHOWN, SHOWN_TRAINING

from styleforge.bench.turns import prepared

Case = tuple[str, str]
"""Operator and shape."""

RUNS = {
    "float16": ("--dtype", "float16"),
    "tf32": ("--precision", "tf32"),
    "float32": ("--precision", "ieee"),
    "bfloat16": ("--dtype", "bfloat16"),
    "bfloat16-backward": ("--dtype", "bfloat16", "--backward"),
    "tf32-backward": ("--precision", "tf32", "--backward"),
    "float32-backward": ("--precision", "ieee", "--backward"),
    "float16-autocast-backward": ("--dtype", "float16", "--autocast", "--backward"),
}
ONLY_GOALS = ("float32-backward", "float16-autocast-backward")  # which the README's tables do without
PICTURES = ("transformer-net", "conv", "instance-norm")  # in bfloat16 as fast as in float16: left out
CPU_RUNS = ("float32",)
MOST_ON_CPU = 1e11  # floating-point operations of a case: seconds a call beyond
# Compiling and checking on one core, in seconds, about.
COSTS = {"transformer-net": 24, "conv": 5, "instance-norm": 5, "ffn": 3, "attention": 3}
BACKWARD_COSTS = 1.7  # times as much
MOST_OF_A_PART, LEAST_OF_A_PART = 50, 25  # few parts: a core for each all the same
PREPARING = 0.6  # of the total: a part that still compiles then would leave the others no time to measure


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument(
        "--suite",
        action="store_true",
        help="every case of styleforge bench --suite, in the forward runs",
    )
    parser.add_argument("--only", default="", help="operators, with commas between: no others")
    parser.add_argument("--config", default="fast", help="of styleforge bench")
    parser.add_argument("--seconds", help="of styleforge bench; default: 0.2 on a GPU, 1 on the CPU")
    parser.add_argument("--against", default="eager,compile", help="of styleforge bench")
    parser.add_argument("--device", default="auto", help="of styleforge bench")
    parser.add_argument("--total", type=float, default=1200, help="seconds of all runs together")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files")
    given = parser.parse_args(arguments)
    unknown = [run for run in given.runs if run not in RUNS]
    if unknown:
        parser.error(f"RUN must be one of {', '.join(RUNS)}, got {', '.join(unknown)}")
    return given


def cases(run: str, *, suite: bool = False, goals: bool = True) -> list[Case]:
    """What a run measures: the rows of the README's tables, and all that has a goal."""
    backward = "--backward" in RUNS[run]
    found = [] if run in ONLY_GOALS else list(SHOWN_TRAINING if backward else SHOWN)
    found += cases_of(run) if goals else []
    if run == "bfloat16" and not suite:
        found = [case for case in found if case[0] not in PICTURES]
    if suite and not backward:
        from styleforge.bench.cases import SUITES

        for (operator, mode), texts in SUITES.items():
            found += [(operator, text) for part in texts for text in part if mode == "standard"]
    return list(dict.fromkeys(found))


def parts(run: str, found: Sequence[Case], most: float = MOST_OF_A_PART) -> list[list[Case]]:
    """The cases of a run in parts that compile for about as long, what takes longest first."""
    factor = BACKWARD_COSTS if "--backward" in RUNS[run] else 1.0
    made: list[list[Case]] = []
    room = 0.0
    for operator, shape in sorted(found, key=lambda case: -COSTS[case[0]]):
        cost = COSTS[operator] * factor
        if room < cost or not made:
            made.append([])
            room = most
        made[-1].append((operator, shape))
        room -= cost
    return made


def command(run: str, part: Sequence[Case], given: argparse.Namespace, file: Path) -> list[str]:
    """The `styleforge bench` of a part."""
    operators = dict.fromkeys(operator for operator, _ in part)
    found = [sys.executable, "-m", "styleforge", "bench", *operators, "--config", given.config]
    found += ["--seconds", given.seconds, "--against", given.against, "--device", given.device]
    found += ["--json", str(file), *RUNS[run]]
    for operator, shape in part:
        found += ["--case", f"{operator} {shape}"]
    return found


def compact(data: dict[str, Any]) -> str:
    """The file's text: a line a case, figures with five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return [short(inner) for inner in value] if isinstance(value, list) else value

    cases: dict[str, str] = {}
    plain = short(data)
    for table in plain["tables"]:
        for index, case in enumerate(table["cases"]):
            cases[f'"@{len(cases)}@"'] = json.dumps(case)
            table["cases"][index] = f"@{len(cases) - 1}@"
    text = json.dumps(plain, indent=1)
    return re.sub(r'"@\d+@"', lambda match: cases[match[0]], text) + "\n"


def _operations(operator: str, shape: str) -> float:
    from styleforge.bench.cases import parse

    return parse(operator, "standard", shape).operations


@dataclass
class Part:
    """A `styleforge bench` that was started."""

    run: str
    file: Path
    log: Path
    process: subprocess.Popen[bytes]


def _start(
    asked: tuple[str, int, list[Case]], given: argparse.Namespace, turns: Path, threads: int | None
) -> Part:
    run, index, found = asked
    file, log = (turns.parent / f"{run}-{index}{suffix}" for suffix in (".json", ".txt"))
    line = [*command(run, found, given, file), "--turns", str(turns)]
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    with log.open("w") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return Part(run, file, log, process)


def _wait(started: Sequence[Part], turns: Path, total: float) -> None:
    """Waits for all; ends those that compile for too long, and at the end of the time all."""
    begin = time.monotonic()
    running, slow = list(started), list(started)
    while running:
        time.sleep(0.2)
        seconds = time.monotonic() - begin
        ready = prepared(turns)
        for part in running:
            if part.process.poll() is not None:
                print(f"{seconds:4.0f} s: {part.file.stem} is through", flush=True)
        running = [part for part in running if part.process.returncode is None]
        compiling, slow = slow, [part for part in running if part.process.pid not in ready]
        for part in compiling:
            if part not in slow:
                print(f"{seconds:4.0f} s: {part.file.stem} has compiled, {len(slow)} have not", flush=True)
        late = running if seconds > total else slow if seconds > PREPARING * total else []
        for part in late:
            print(f"{seconds:4.0f} s: no time left for {part.file.stem}", flush=True)
            part.process.kill()
            part.process.wait()
        running = [part for part in running if part not in late]


def merge(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a run as one; the rates are the first's."""
    whole = found[0]
    tables = {table["title"]: table for table in whole["tables"]}
    for data in found[1:]:
        for table in data["tables"]:
            if table["title"] not in tables:
                tables[table["title"]] = table
                continue
            for key in ("cases", "not_measured", "losses"):
                tables[table["title"]][key] += table[key]
        whole["passed"] = whole["passed"] and data["passed"]
    return whole | {"tables": list(tables.values())}


def again(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new measurement with the cases of the old one that it does not have."""
    same = ("styleforge", "pytorch", "device", "cuda", "cudnn")
    if any(old["environment"].get(key) != new["environment"].get(key) for key in same):
        return new
    for table in new["tables"]:
        measured = {case["case"] for case in table["cases"]}
        for before in old["tables"]:
            if before["title"] != table["title"]:
                continue
            stay = [case for case in before["cases"] if case["case"] not in measured]
            table["cases"] += [{"date": old["date"]} | case for case in stay]
            names = {case["case"] for case in stay}
            table["losses"] += [text for text in before["losses"] if text.partition(": ")[0] in names]
    titles = {table["title"] for table in new["tables"]}
    for before in old["tables"]:
        if before["title"] not in titles:
            cases_before = [{"date": old["date"]} | case for case in before["cases"]]
            new["tables"].append(before | {"cases": cases_before})
    return new | {"passed": old["passed"] and new["passed"]}


def _keep(run: str, own: Sequence[Part], given: argparse.Namespace) -> bool:
    """Writes a run's file; whether all of it was measured with every result right."""
    found = []
    right = True
    for part in own:
        code = part.process.returncode
        right = right and code == 0
        if code != 0:
            print(f"{run}: {part.file.stem}, exit code {code}\n{part.log.read_text()[-800:]}", flush=True)
        try:
            found.append(json.loads(part.file.read_text()))
        except (OSError, ValueError):  # ended before it had measured anything, or while it was writing
            right = False
    if not found:
        print(f"{run}: nothing measured", flush=True)
        return False
    data = merge(found)
    device = re.sub(r"[^a-z0-9]+", "-", data["environment"]["device"].lower()).strip("-")
    kept = given.out / f"{device}-{run}.json"
    if given.only and kept.exists():
        data = again(json.loads(kept.read_text()), data)
    kept.write_text(compact(data))
    count = sum(len(table["cases"]) for table in data["tables"])
    losses = sum(len(table["losses"]) for table in data["tables"])
    print(f"{run}: {count} cases, {losses} losses, {len(own)} parts: {kept}", flush=True)
    return right


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit code."""
    import torch

    given = parse_arguments(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    on_gpu = given.device.startswith("cuda") or (given.device == "auto" and torch.cuda.is_available())
    given.seconds = given.seconds or ("0.2" if on_gpu else "1")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        turns = Path(folder) / "turns"
        asked: list[tuple[str, int, list[Case]]] = []
        for run in given.runs or (RUNS if on_gpu else CPU_RUNS):
            found = cases(run, suite=given.suite, goals=on_gpu)
            if given.only:
                found = [case for case in found if case[0] in given.only.split(",")]
                if not found:
                    continue
            if not on_gpu:
                found = [case for case in found if _operations(*case) <= MOST_ON_CPU]
            most = MOST_OF_A_PART if not given.only else LEAST_OF_A_PART
            asked += [(run, i, part) for i, part in enumerate(parts(run, found, most) if on_gpu else [found])]
        # The parts share the cores; few parts have some each for torch.compile, which takes minutes of one
        # for the training step of the style network (about a hundred kernels in each memory format).
        threads = max(1, (os.cpu_count() or 1) // len(asked)) if on_gpu else None
        started = [_start(part, given, turns, threads) for part in asked]
        print(f"{len(started)} parts of {len({part.run for part in started})} runs", flush=True)
        try:
            _wait(started, turns, given.total)
        finally:
            for part in started:
                part.process.kill()
                part.process.wait()
        own = {run: [part for part in started if part.run == run] for run in (p.run for p in started)}
        right = [_keep(run, parts_of_it, given) for run, parts_of_it in own.items()]
    print(f"all: {time.monotonic() - begin:.0f} s", flush=True)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
