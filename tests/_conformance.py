"""The outcome of the conformance matrix, kept in ``conformance.json``, and the README's table made of it.

``make support-table`` runs the matrix and then this file, which takes over what the tests left in a folder:

    STYLEFORGE_CONFORMANCE=build/conformance pytest -m "not cuda" tests/test_conformance.py      # or -m cuda
    python tests/_conformance.py build/conformance
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("conformance.json")
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- support: begin (make support-table) -->\n", "<!-- support: end -->\n"
NAMES = {"cpu": "CPU", "cuda": "CUDA"}


def record(device: str, operator: str, way: str) -> None:
    """Notes that a cell passed, if STYLEFORGE_CONFORMANCE names a folder to note it in."""
    folder = os.environ.get("STYLEFORGE_CONFORMANCE")
    if not folder:
        return
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    cell = {"operator": operator, "way": way, "device": device, "pytorch": torch.__version__, "where": where}
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in f"{device} {operator} {way}")
    (Path(folder) / f"{name}.json").write_text(json.dumps(cell))


def load() -> dict[str, Any]:
    """By device: ``date``, ``pytorch``, ``where`` and ``passed``, the ways that passed for each operator."""
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    return kept


def collect(folder: Path) -> dict[str, Any]:
    """What is kept, with the devices that the folder has cells of replaced."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    kept = load()
    for device in sorted({cell["device"] for cell in cells}):
        of_device = [cell for cell in cells if cell["device"] == device]
        passed: dict[str, list[str]] = {}
        for cell in of_device:
            passed.setdefault(cell["operator"], []).append(cell["way"])
        kept[device] = {
            "date": datetime.date.today().isoformat(),
            "pytorch": of_device[0]["pytorch"],
            "where": of_device[0]["where"],
            "passed": {operator: sorted(ways) for operator, ways in sorted(passed.items())},
        }
    return kept


def render(kept: dict[str, Any], operators: list[str], ways: list[str]) -> str:
    """The table in Markdown: a row a way, a column an operator, in each cell the devices where it passed."""
    lines = ["| | " + " | ".join(f"`{operator}`" for operator in operators) + " |"]
    lines.append("|---" * (len(operators) + 1) + "|")
    for way in ways:
        cells = []
        for operator in operators:
            devices = [device for device in NAMES if way in _passed(kept, device, operator)]
            cells.append(", ".join(NAMES[device] for device in devices) or "-")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    runs = [
        f"{NAMES[device]}: {run['date']}, PyTorch {run['pytorch']}, {run['where']}"
        for device, run in sorted(kept.items())
    ]
    return "\n".join([*lines, "", "; ".join(runs) + "."]) + "\n"


def _passed(kept: dict[str, Any], device: str, operator: str) -> list[str]:
    ways: list[str] = kept.get(device, {}).get("passed", {}).get(operator, [])
    return ways


def table_in(readme: str) -> str:
    """The part of the README between the two marks."""
    return readme.partition(BEGIN)[2].partition(END)[0]


def main(folder: str) -> None:
    from test_conformance import OPERATORS, WAYS

    kept = collect(Path(folder))
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    README.write_text(before + BEGIN + render(kept, OPERATORS, list(WAYS)) + END + rest.partition(END)[2])
    print(f"wrote {KEPT} and the table in {README}")


if __name__ == "__main__":
    main(sys.argv[1])
