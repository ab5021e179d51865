"""Builds and runs C++ programs as a user of LibTorch does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from torch import Tensor

import styleforge
from styleforge import _library

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent  # where pip puts cmake and ninja


def tool(name: str) -> str:
    """The path of cmake or ninja."""
    found = shutil.which(name, path=f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        if torch.cuda.is_available():
            pytest.skip(f"no {name} here")
        raise FileNotFoundError(f"{name} is needed: pip install {name}")
    return found


def library_folder() -> Path:
    """Where the libraries in use are."""
    assert _library.library_path is not None
    return _library.library_path.parent


def build(folder: Path) -> None:
    """Builds the programs of ``tests/cpp`` into a folder; once, also where several workers test."""
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not (folder / "built").is_file():
            prefixes = f"{torch.utils.cmake_prefix_path};{styleforge.cmake_prefix_path}"
            configure = [
                *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
                *("-S", str(ROOT / "tests" / "cpp"), "-B", str(folder)),
                *(f"-DCMAKE_PREFIX_PATH={prefixes}", "-DCMAKE_CXX_FLAGS=-O1 -Wall -Wextra -Werror"),
            ]
            for arguments in (configure, ["--build", str(folder)]):
                done = subprocess.run([tool("cmake"), *arguments], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
            (folder / "built").touch()


def run(program: Path, *arguments: object, libraries: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program without the caller's environment: nothing of Python can be found."""
    environment = {"PATH": "/nowhere", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if "LD_LIBRARY_PATH" in os.environ:  # where some machines have the GPU's driver
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    if libraries is not None:
        environment["STYLEFORGE_LIBRARY_PATH"] = str(libraries)
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def output(program: Path, model: Path, x: Tensor, *rest: object, libraries: Path | None = None) -> Tensor:
    """What a program makes of a tensor."""
    given, written = model.with_suffix(".input.pt"), model.with_suffix(".output.pt")
    torch.save(x, given)
    done = run(program, model, given, written, *rest, libraries=libraries)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    return torch.load(written)
