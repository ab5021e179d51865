"""Runs `styleforge verify all --mode full` in every dtype, forward and backward, and keeps what it prints.

    python benchmarks/verify.py                # on the GPU if there is one
    python benchmarks/verify.py --device cpu   # float32 alone

Files: benchmarks/verify/DEVICE-DTYPE.txt. On a GPU the others than float32 run at the same time, so without
times; then float32 has the machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "verify"
TOGETHER = {
    "float16": ("--dtype", "float16", "--no-times"),
    "bfloat16": ("--dtype", "bfloat16", "--no-times"),
    "tf32": ("--precision", "tf32", "--no-times"),
}
ALONE = {"float32": ("--precision", "ieee")}


def start(options: tuple[str, ...], device: str) -> subprocess.Popen[str]:
    """A run that was started."""
    line = [sys.executable, "-m", "styleforge", "verify", "all", "--mode", "full", "--device", device]
    return subprocess.Popen([*line, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def keep(name: str, options: tuple[str, ...], run: subprocess.Popen[str], file: Path) -> bool:
    """Writes what a run printed, with the date before it; whether all cases passed."""
    text, _ = run.communicate()
    said = " ".join(["styleforge verify all --mode full", *options])
    lines = [f"{datetime.date.today()}: {said}: exit code {run.returncode}", *text.splitlines()]
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    totals = dict(re.findall(r"^([A-Z][a-z ]+): +(\S.*)$", text, re.MULTILINE))
    print(f"{name}: exit code {run.returncode}, {totals}: {file}", flush=True)
    return run.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit code."""
    import torch

    from styleforge.cli.info import cpu_model

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="of styleforge verify")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    on_gpu = given.device.startswith("cuda") or (given.device == "auto" and torch.cuda.is_available())
    device = torch.cuda.get_device_name() if on_gpu else cpu_model()
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    right = True
    for group in (TOGETHER, ALONE) if on_gpu else (ALONE,):
        runs = {name: start(options, given.device) for name, options in group.items()}
        for name, run in runs.items():
            right &= keep(name, group[name], run, given.out / f"{device}-{name}.txt")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
