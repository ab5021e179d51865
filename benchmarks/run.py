"""Measures what the README's performance tables show, and keeps it: one `styleforge bench` a precision.

    python benchmarks/run.py                       # the cases of the tables, on the GPU if there is one
    python benchmarks/run.py float16 tf32 --suite  # two of the runs, with every case of `--suite`

Files: benchmarks/DEVICE-RUN.json. On a GPU the runs first go all at once with a handful of samples, which
fills the caches of torch.compile: compiling takes nearly all of the time, on the host, and is quick a second
time. Then each run has the machine alone. A run that takes longer than --limit, or is not through when the
--total of all is over, is ended; the operators that it had measured are kept. The first runs matter most.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import FOLDER, SHOWN

RUNS = {
    "float16": ("--dtype", "float16"),
    "tf32": ("--precision", "tf32"),
    "float32": ("--precision", "ieee"),
    "bfloat16": ("--dtype", "bfloat16"),
    "bfloat16-backward": ("--dtype", "bfloat16", "--backward"),
    "tf32-backward": ("--precision", "tf32", "--backward"),
}
CPU_RUNS = ("float32",)
LEAST_SECONDS = 10  # a run takes longer to start than what is left
MOST_ON_CPU = 1e11  # floating-point operations of a case: seconds a call beyond


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--suite", action="store_true", help="every case, not those of the tables alone")
    parser.add_argument("--config", default="fast", help="of styleforge bench")
    parser.add_argument("--seconds", default="1", help="of styleforge bench")
    parser.add_argument("--against", default="eager,compile", help="of styleforge bench")
    parser.add_argument("--device", default="auto", help="of styleforge bench")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one run")
    parser.add_argument("--total", type=float, default=3600, help="seconds of all runs together")
    parser.add_argument("--no-warm-up", action="store_true", help="leave out the runs that fill the caches")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files")
    given = parser.parse_args(arguments)
    unknown = [run for run in given.runs if run not in RUNS]
    if unknown:
        parser.error(f"RUN must be one of {', '.join(RUNS)}, got {', '.join(unknown)}")
    return given


def command(run: str, given: argparse.Namespace, on_gpu: bool, file: Path, seconds: str) -> list[str]:
    """The `styleforge bench` of a run."""
    operators = dict.fromkeys(operator for operator, _ in SHOWN)  # in this order
    found = [sys.executable, "-m", "styleforge", "bench", *operators]
    found += ["--config", given.config, "--seconds", seconds]
    found += ["--against", given.against, "--device", given.device, "--json", str(file), *RUNS[run]]
    if given.suite:
        return [*found, "--suite"]
    for operator, shape in SHOWN:
        if on_gpu or _operations(operator, shape) <= MOST_ON_CPU:
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


def _fill_caches(runs: list[str], given: argparse.Namespace, folder: Path, most: float) -> None:
    begin = time.monotonic()
    started = []
    for run in runs:
        line = command(run, given, True, folder / f"{run}.json", "0")
        log = (folder / f"{run}.txt").open("w")
        started.append(subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT))
    for process in started:
        try:
            process.wait(max(1.0, begin + most - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"caches of torch.compile: {time.monotonic() - begin:.0f} s", flush=True)


def _measure(run: str, given: argparse.Namespace, on_gpu: bool, folder: Path, most: float) -> bool:
    """Measures a run and keeps its file; whether it came to its end with every result right."""
    file, log = folder / f"{run}.json", folder / f"{run}.txt"
    file.unlink(missing_ok=True)
    begin = time.monotonic()
    line = command(run, given, on_gpu, file, given.seconds)
    with log.open("w") as output:
        try:
            done = subprocess.run(line, stdout=output, stderr=subprocess.STDOUT, timeout=most)
            code, ended = done.returncode, f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            code, ended = 1, f"ended after {most:.0f} s"
    if not file.is_file():
        print(f"{run}: nothing measured, {ended}\n{log.read_text()[-2000:]}", flush=True)
        return False
    try:
        data = json.loads(file.read_text())
    except ValueError:  # ended while it was writing
        print(f"{run}: its file is broken, {ended}", flush=True)
        return False
    device = re.sub(r"[^a-z0-9]+", "-", data["environment"]["device"].lower()).strip("-")
    kept = given.out / f"{device}-{run}.json"
    kept.write_text(compact(data))
    count = sum(len(table["cases"]) for table in data["tables"])
    losses = sum(len(table["losses"]) for table in data["tables"])
    seconds = time.monotonic() - begin
    print(f"{run}: {count} cases, {losses} losses, {seconds:.0f} s, {ended}: {kept}", flush=True)
    return code == 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit code."""
    import torch

    given = parse_arguments(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    on_gpu = given.device.startswith("cuda") or (given.device == "auto" and torch.cuda.is_available())
    runs = given.runs or list(RUNS if on_gpu else CPU_RUNS)
    stop = time.monotonic() + given.total
    right = True
    with tempfile.TemporaryDirectory() as folder:
        if on_gpu and not given.no_warm_up and "compile" in given.against:
            _fill_caches(runs, given, Path(folder), min(given.limit, given.total / 2))
        for run in runs:
            left = stop - time.monotonic()
            if left < LEAST_SECONDS:
                print(f"{run}: no time left", flush=True)
                right = False
            else:
                right &= _measure(run, given, on_gpu, Path(folder), min(given.limit, left))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
