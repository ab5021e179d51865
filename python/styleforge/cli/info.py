"""`styleforge info`: everything that a bug report needs."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from styleforge.cli._errors import with_clear_errors
from styleforge.cli._memory import meminfo

if TYPE_CHECKING:
    from rich.table import Table

_PACKAGES = (
    "numpy",
    "pillow",
    "safetensors",
    "typer",
    "rich",
    "av",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "torchvision",
)
_VARIABLES = (
    "STYLEFORGE_",
    "TORCH",
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "MKL_",
    "KMP_",
    "CXX",
    "LD_LIBRARY_PATH",
    "PYTORCH_",
)
_COMMAND_SECONDS = 10


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@with_clear_errors
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, libraries, settings."""
    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2, default=str))
    else:
        _print_tables(report)


def collect() -> dict[str, Any]:
    """Gathers the report; a part that cannot be had holds its error instead.

    Returns:
        Sections by name; each maps names to strings, numbers, lists or further mappings.
    """
    parts: dict[str, Callable[[], Any]] = {
        "styleforge": _styleforge,
        "python": _python,
        "pytorch": _pytorch,
        "system": _system,
        "cpu": _cpu,
        "gpus": _gpus,
        "compilers": _compilers,
        "packages": lambda: {name: package_version(name) or "not installed" for name in _PACKAGES},
        "styles": _styles,
        "environment": lambda: {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }
    return {name: _guarded(part) for name, part in parts.items()}


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # a report about a broken installation must not break
        return {"error": f"{type(error).__name__}: {error}"}


def _styleforge() -> dict[str, Any]:
    import styleforge
    from styleforge._version import __version__

    report: dict[str, Any] = {
        "version": __version__,
        "installed": package_version("styleforge") or "no",
        "package": str(Path(styleforge.__path__[0])),
    }
    report |= _guarded(_library)
    return report


def _library() -> Any:
    from styleforge._library import diagnostics

    return diagnostics()


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
    }


def _pytorch() -> dict[str, Any]:
    import torch

    backends: Any = torch.backends  # partly untyped
    cudnn = backends.cudnn.version() if backends.cudnn.is_available() else None
    return {
        "version": torch.__version__,
        "path": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda or "no (CPU build)",
        "cuda_usable": torch.cuda.is_available(),
        "cudnn": cudnn or "no",
        "cuda_archs": torch.cuda.get_arch_list() if torch.cuda.is_available() else [],
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "mkl": backends.mkl.is_available(),
        "onednn": backends.mkldnn.is_available(),
        "openmp": backends.openmp.is_available(),
        "cudnn_tf32": backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _system() -> dict[str, Any]:
    report: dict[str, Any] = {"platform": platform.platform(), "machine": platform.machine()}
    release = _guarded(platform.freedesktop_os_release) if sys.platform == "linux" else {}
    if "PRETTY_NAME" in release:
        report["distribution"] = release["PRETTY_NAME"]
    if platform.libc_ver()[0]:
        report["libc"] = " ".join(platform.libc_ver())
    memory = meminfo()
    if memory:
        report["memory"] = (
            f"{memory['MemTotal'] / 2**30:.1f} GiB, {memory['MemAvailable'] / 2**30:.1f} GiB available"
        )
    return report


def _cpu() -> dict[str, Any]:
    report: dict[str, Any] = {"model": cpu_model(), "logical_cpus": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        report["usable_cpus"] = len(os.sched_getaffinity(0))
    import torch

    return report | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
    }


def cpu_model() -> str:
    """The CPU's name as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or platform.machine()


def _gpus() -> dict[str, Any]:
    report: dict[str, Any] = {"driver": _driver()}
    import torch

    if torch.version.cuda is None:
        return report | {"devices": "none: PyTorch was built without CUDA"}
    if not torch.cuda.is_available():
        return report | {"devices": "none usable"}
    for index in range(torch.cuda.device_count()):
        report[f"cuda:{index}"] = _guarded(functools.partial(_gpu, index))
    return report


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free",
    }


def _driver() -> str:
    """The NVIDIA driver's version."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return first.partition(":")[2].strip()
    except (OSError, IndexError):
        return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _compilers() -> dict[str, str]:
    """What building on first use and torch.compile would find."""
    nvcc = "nvcc"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        nvcc = str(Path(home) / "bin" / "nvcc")
    found = {"c++": _first_line([os.environ.get("CXX", "c++"), "--version"]), "nvcc": "not found"}
    if shutil.which(nvcc):
        output = _output([nvcc, "--version"]).splitlines()
        release = [line.strip() for line in output if "release" in line]
        found["nvcc"] = f"{shutil.which(nvcc)}: {release[0] if release else 'unknown version'}"
    return found | {
        "ninja": _first_line(["ninja", "--version"]),
        "cmake": _first_line(["cmake", "--version"]),
    }


def _output(command: list[str]) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    return (finished.stdout or finished.stderr).strip()


def _first_line(command: list[str]) -> str:
    """Path and first output line of a program, or why there is none."""
    program = shutil.which(command[0])
    if program is None:
        return "not found"
    try:
        lines = _output([program, *command[1:]]).splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program}: {type(error).__name__}"
    return f"{program}: {lines[0] if lines else 'no output'}"


def _styles() -> Any:
    from styleforge.models import available_styles

    return [style.name for style in available_styles()]


def _print_tables(report: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for section, content in report.items():
        console.print(_table(section, content))


def _table(title: str, content: Any) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE_HEAD
    )
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("value", overflow="fold")
    rows = _rows(content)
    for name, value in rows or [("", "none")]:
        failed = name.endswith(("error", "errors")) and value != "none"
        table.add_row(Text(name), Text(value, style="red" if failed else ""))
    return table


def _rows(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flattens nested mappings to dotted names; a list is one row, or one row an entry if it is long."""
    if isinstance(content, Mapping):
        rows: list[tuple[str, str]] = []
        for name, value in content.items():
            rows += _rows(value, f"{prefix}.{name}" if prefix else str(name))
        return rows or [(prefix, "none")] * bool(prefix)
    if isinstance(content, list | tuple | set | frozenset):
        entries = [str(entry) for entry in content]
        if any(isinstance(entry, Mapping) for entry in content):
            return [
                row for number, entry in enumerate(content) for row in _rows(entry, f"{prefix}[{number}]")
            ]
        if sum(map(len, entries)) > 80:
            return [(f"{prefix}[{number}]", entry) for number, entry in enumerate(entries)]
        return [(prefix, ", ".join(entries) or "none")]
    return [(prefix, "yes" if content is True else "no" if content is False else _text(content))]


def _text(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)
