"""Finds compilers and build tools, and runs them with their output in a log."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from styleforge.build.errors import CompilerError, StyleforgeBuildError

# gcc, clang, nvcc ("error:" or "error :"), ptxas, ld, CMake, ninja.
_ERROR_LINE = re.compile(
    r"(\berror ?:|\bfatal( error)? ?:|: error\b|\bCMake Error|undefined reference|cannot find -l|"
    r"ninja: error|command not found)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its ``path`` and its ``version``, "13.0.88" say."""

    path: Path
    version: str

    @property
    def major(self) -> str:
        """The toolkit's major version, "13" say."""
        return self.version.partition(".")[0]


def find_nvcc(cuda: str | None = None) -> Nvcc:
    """The first nvcc that works and has the major version of ``cuda``.

    Looked for in ``CUDACXX``, ``CUDA_HOME``, ``CUDA_PATH``, ``PATH`` and ``/usr/local/cuda*``, as CMake and
    PyTorch's extensions do.

    Args:
        cuda: PyTorch's CUDA version, "13.0" say; None for any.

    Raises:
        StyleforgeBuildError: There is none, or none of that major version.
    """
    others = []
    for path in _nvcc_candidates():
        version = _nvcc_version(path)
        if version is None:
            others.append(f"{path} does not run")
        elif cuda is None or version.partition(".")[0] == cuda.partition(".")[0]:
            return Nvcc(path, version)
        else:
            others.append(f"{path} is of CUDA {version}")
    wanted = f"CUDA {cuda.partition('.')[0]}" if cuda else "CUDA >= 12.0"
    if others:
        reason = f"no nvcc of {wanted}, which this PyTorch needs" if cuda else "no nvcc that works"
        raise StyleforgeBuildError(
            f"{reason} ({'; '.join(others)}): install the toolkit of {wanted} and set CUDA_HOME to its folder"
        )
    raise StyleforgeBuildError(
        f"nvcc was not found in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda: install the toolkit of "
        f"{wanted} and set CUDA_HOME to its folder"
    )


def _nvcc_candidates() -> list[Path]:
    # One that is named is the one that is meant.
    if os.environ.get("CUDACXX"):
        return [Path(os.environ["CUDACXX"])]
    found = [
        Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(Path(on_path))
    toolkits = Path("/usr/local")
    found += [toolkits / "cuda" / "bin" / "nvcc", *sorted(toolkits.glob("cuda-*/bin/nvcc"), reverse=True)]
    return list(dict.fromkeys(path for path in found if path.is_file()))


def _nvcc_version(path: Path) -> str | None:
    text = _output([str(path), "--version"])
    found = re.search(r"\bV(\d+\.\d+(\.\d+)?)", text) or re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else None


def find_cxx() -> tuple[Path, str]:
    """The C++ compiler (``CXX``, else c++, g++, clang++) and the first line of its ``--version``.

    Raises:
        StyleforgeBuildError: There is none.
    """
    for name in [os.environ.get("CXX", ""), "c++", "g++", "clang++"]:
        found = shutil.which(name) if name else None
        if found:
            return Path(found), _output([found, "--version"]).partition("\n")[0]
    raise StyleforgeBuildError("no C++ compiler was found: install g++ >= 11 or clang++ >= 14, or set CXX")


def find_tool(name: str) -> Path:
    """cmake or ninja: next to Python, on ``PATH``, or inside the PyPI package of that name.

    Raises:
        StyleforgeBuildError: It is in none of these.
    """
    here = Path(sys.executable).parent
    found = shutil.which(name, path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        try:
            package = importlib.import_module(name)
        except ImportError:
            package = None
        folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
        found = shutil.which(name, path=folder) if folder else None
    if found is None:
        raise StyleforgeBuildError(f"{name} was not found: pip install cmake ninja")
    return Path(found)


def gpu_archs() -> list[str]:
    """The architectures of the GPUs here as ``STYLEFORGE_CUDA_ARCHS`` takes them, "9.0a" say; [] without.

    Asks ``nvidia-smi``: CUDA in this process stays uninitialised, so that it can still be forked.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    text = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = sorted({line.strip() for line in text.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())})
    return [f"{arch}a" if arch == "9.0" else arch for arch in found]  # wgmma is in 9.0a alone


def run(
    command: Sequence[str], log: Path, *, what: str, on_line: Callable[[str], None] | None = None
) -> None:
    """Runs a command to its end, its output appended to a log.

    Args:
        command: The program and its arguments.
        log: Receives the command and its output.
        what: The thing that is built, for the message.
        on_line: Called with each line of output.

    Raises:
        CompilerError: The command failed.
    """
    lines = []
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise CompilerError(f"{what} was not built: {command[0]} cannot be run: {error}") from error
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                lines.append(line.rstrip())
                if on_line is not None:
                    on_line(line.rstrip())
            code = process.wait()
        except BaseException:  # Ctrl-C too: no compiler runs on behind the user's back
            process.kill()
            process.wait()
            raise
    if code:
        name = Path(command[0]).name
        raise CompilerError(
            f"{what} was not built: {name} says: {first_error(lines) or f'nothing (exit status {code})'} "
            f"(the whole log is {log}); correct what it names and try again"
        )


def first_error(lines: Sequence[str]) -> str:
    """The line of a compiler's output to read first."""
    texts = [line.strip() for line in lines if line.strip()]
    for number, text in enumerate(texts):
        if _ERROR_LINE.search(text):
            # CMake says what is wrong on the lines that follow.
            follows = text.startswith("CMake Error") and text.endswith(":") and number + 1 < len(texts)
            return f"{text} {texts[number + 1]}" if follows else text
    return texts[-1] if texts else ""


def _output(command: Sequence[str]) -> str:
    """What a command prints; "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
