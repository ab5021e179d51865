"""A run as JSON, and back: settings, machine, rates, every case with every contender's statistics."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import styleforge
from styleforge.bench.cases import parse
from styleforge.bench.correctness import Check
from styleforge.bench.floors import Rates
from styleforge.bench.measure import CaseResult, Settings, Timing
from styleforge.bench.stats import Statistics
from styleforge.bench.tables import absent, losses

FORMAT = 1
"""Rises when a key changes its meaning or goes."""


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of what was measured with, and the device (its name only where it is a GPU)."""
    found: dict[str, Any] = {
        "styleforge": styleforge.__version__,
        "pytorch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        backends: Any = torch.backends  # partly untyped
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": backends.cudnn.version(),
        }
    return found


def report(
    tables: Mapping[str, Sequence[CaseResult]],
    settings: Settings,
    rates: Rates,
    chosen: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole run as plain data.

    Args:
        tables: results by title.
        settings: how they were measured.
        rates: the floors' rates.
        chosen: further settings of the command line.
        machine: what is known of it beyond ``environment``; takes precedence.
    """
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(settings.device) | dict(machine),
        "settings": {
            **chosen,
            "device": str(settings.device),
            "dtype": str(settings.dtype)[6:],
            "precision": settings.precision,
            "backward": settings.backward,
            "autocast": settings.autocast,
            "warmup": settings.warmup,
            "iterations": settings.iterations,
            "seconds": settings.seconds,
            "against": list(settings.against),
        },
        "rates": asdict(rates),
        "tables": [
            {
                "title": title,
                "cases": [result.as_dict() for result in results],
                "not_measured": absent(results),
                "losses": losses(results),
            }
            for title, results in tables.items()
        ],
        "passed": not any(result.failures for results in tables.values() for result in results),
    }


def read(data: Mapping[str, Any]) -> tuple[dict[str, list[CaseResult]], Rates]:
    """The results that ``report`` wrote, for tables and pages made later or on another machine.

    Raises:
        ValueError: the data are of another format.
    """
    if data.get("format") != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {data.get('format')}")
    tables = {table["title"]: [_case(entry) for entry in table["cases"]] for table in data["tables"]}
    return tables, Rates(**data["rates"])


def _case(entry: Mapping[str, Any]) -> CaseResult:
    result = CaseResult(
        parse(entry["operator"], entry["mode"], entry["case"]),
        entry["bytes"],
        entry["operations"],
        entry["floor_us"],
        entry["floor_is"],
        missing=dict(entry["missing"]),
        failures=list(entry["failures"]),
        buffers=entry["buffers"],
    )
    for name, timing in entry["contenders"].items():
        clocks = {clock: timing[clock] and Statistics(**timing[clock]) for clock in ("wall", "gpu", "host")}
        result.timings[name] = Timing(
            timing["memory_format"],
            Check(**timing["check"]),
            gpu_clock=timing["gpu_clock"],
            path=timing["path"],
            formats=dict(timing.get("formats", {})),
            hosts=dict(timing.get("hosts", {})),
            peak_bytes=timing.get("peak_bytes"),
            **clocks,
        )
    return result
