"""First-use building: an installed package makes the CUDA library that it lacks.

The sources that stand in for ours make a library that registers nothing, in a second. Ours are built where
``STYLEFORGE_TEST_FIRST_USE=1`` asks for it: that takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import _toolchain
from styleforge import _library
from styleforge._version import __version__
from styleforge.build import CompilerError, StyleforgeBuildError, cache, compiler, cuda_library, first_use

PACKAGE = Path(first_use.__file__).parents[1]

# What the real CMakeLists.txt is given and has to make; it also counts how often it was run.
CMAKE = """
cmake_minimum_required(VERSION 3.26)
project(tiny LANGUAGES CXX)
file(APPEND {runs} "${{STYLEFORGE_CUDA}} ${{STYLEFORGE_CUDA_ARCHS}} ${{CMAKE_CUDA_COMPILER}}\\n")
if(NOT EXISTS "${{STYLEFORGE_MAIN_LIBRARY}}")
  message(FATAL_ERROR "the main library is not given")
endif()
add_library(styleforge_cuda SHARED tiny.cpp)
"""
INFO = {"styleforge": __version__, "cuda": "13.0.88", "cuda_archs": "90a-real"}


def _sources(folder: Path, runs: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(CMAKE.format(runs=runs))
    text = json.dumps(f"STYLEFORGE_BUILD_INFO={json.dumps(INFO)}")
    source = f'extern "C" {{ extern const char info[]; const char info[] = {text}; }}\n'
    (folder / "tiny.cpp").write_text(source)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A file with a line for each build."""
    (tmp_path / "runs").touch()
    return tmp_path / "runs"


@pytest.fixture
def machine(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU of 9.0, CUDA 13.0 in PyTorch and nvcc, an empty cache; returns its programs."""
    for name in (
        "STYLEFORGE_BUILD",
        "STYLEFORGE_LIBRARY_PATH",
        "STYLEFORGE_CUDA_ARCHS",
        "TORCH_CUDA_ARCH_LIST",
    ):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "programs"
    _toolchain.script(programs / "nvidia-smi", "echo 9.0; echo 9.0")
    nvcc = _toolchain.nvcc(programs / "nvcc", "13.0.88")
    monkeypatch.setenv("PATH", _toolchain.path_with(programs))
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return programs


@pytest.fixture
def installed(machine: Path, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as that of an installed package; returns its sources."""
    sources = _sources(tmp_path / "_sources", runs)
    monkeypatch.setattr(first_use, "_installed", lambda: sources)
    monkeypatch.setattr(first_use, "_checkout", lambda: None)
    monkeypatch.setattr(_library, "cuda_available", False)
    return sources


@pytest.fixture
def site(machine: Path, tmp_path: Path, runs: Path) -> Path:
    """The folder of an installed package with the real main library and no CUDA library."""
    assert _library.library_path is not None
    site = tmp_path / "site"
    no_data = shutil.ignore_patterns("*.safetensors", "__pycache__", "lib", "_sources")
    shutil.copytree(PACKAGE, site / "styleforge", ignore=no_data)
    (site / "styleforge" / "lib").mkdir()
    (site / "styleforge" / "lib" / "libstyleforge.so").symlink_to(_library.library_path)
    _sources(site / "styleforge" / "_sources", runs)
    return site


IMPORT = """
import json, sys, warnings
sys.path.insert(0, {site!r})
import torch
torch.version.cuda = "13.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from styleforge import diagnostics
ours = [str(w.message) for w in caught if "Styleforge" in w.category.__name__]
print(json.dumps([ours, diagnostics()]))
"""


def _start(site: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", IMPORT.format(site=str(site))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=site)


def _finish(process: subprocess.Popen[str]) -> tuple[list[str], dict[str, Any], str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    warnings, report = json.loads(output.splitlines()[-1])
    return warnings, report, errors


def test_imports_at_once_build_once(site: Path, runs: Path, machine: Path, tmp_path: Path) -> None:
    processes = [_start(site), _start(site)]
    outcomes = [_finish(process) for process in processes]
    (built,) = (tmp_path / "cache" / "styleforge").glob("*/libstyleforge_cuda.so")
    for warnings, report, _ in outcomes:
        assert warnings == []
        assert report["cuda_available"]
        assert report["cuda_library"] == str(built)
        assert report["cuda_archs"] == ["90a-real"]
    assert runs.read_text() == f"ON 9.0a {machine / 'nvcc'}\n"
    said = [errors for _, _, errors in outcomes if "building the CUDA library for CUDA 13.0.88" in errors]
    assert len(said) == 1
    assert "architectures 9.0a: once, this takes minutes (log: " in said[0]


def test_import_where_it_is_forbidden(
    site: Path, runs: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_BUILD", "0")
    ((warning,), report, _) = _finish(_start(site))
    assert "libstyleforge_cuda.so was not found in " in warning
    assert "not built on first use: the CUDA library was not built: STYLEFORGE_BUILD=0 forbids it" in warning
    assert report["cuda_error"] in warning
    assert not report["cuda_available"]
    assert runs.read_text() == ""


def test_what_was_built_for_more_gpus_is_taken(
    installed: Path, runs: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without an nvcc and where building is forbidden."""
    loaded: list[Path] = []
    monkeypatch.setattr(_library, "use_cuda", loaded.append)
    path = cuda_library(archs="80;90a", verbose=False)
    assert loaded == [path]
    assert path.parent.name.startswith(f"cuda13-{__version__}-")
    assert path.parent.name.endswith("-80_90a")
    assert _library.build_info(path) == INFO

    (machine / "nvcc").unlink()
    monkeypatch.setenv("STYLEFORGE_BUILD", "0")
    assert first_use.at_import() == path
    _toolchain.script(machine / "nvidia-smi", "echo 12.0")
    with pytest.raises(StyleforgeBuildError, match="STYLEFORGE_BUILD=0 forbids it"):
        first_use.at_import()
    _toolchain.script(machine / "nvidia-smi", "echo 9.0")
    (installed / "CMakeLists.txt").write_text((installed / "CMakeLists.txt").read_text() + "# newer\n")
    with pytest.raises(StyleforgeBuildError, match="STYLEFORGE_BUILD=0 forbids it"):
        first_use.at_import()
    assert len(runs.read_text().splitlines()) == 1


def test_without_a_gpu_an_import_builds_nothing(installed: Path, machine: Path) -> None:
    _toolchain.script(machine / "nvidia-smi", "exit 9")
    with pytest.raises(StyleforgeBuildError, match="there is no GPU here"):
        first_use.at_import()
    with pytest.raises(StyleforgeBuildError, match=r"name its architectures: cuda_library\(archs="):
        cuda_library()


def test_a_checkout_and_a_named_folder_build_nothing(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_LIBRARY_PATH", str(tmp_path))
    assert first_use.at_import() is None
    monkeypatch.delenv("STYLEFORGE_LIBRARY_PATH")
    monkeypatch.setattr(first_use, "_checkout", lambda: tmp_path)
    assert first_use.at_import() is None


def test_no_nvcc(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_nvcc_candidates", list)
    with pytest.raises(
        StyleforgeBuildError, match=r"nvcc was not found in .*toolkit of CUDA 13 and set CUDA_HOME"
    ):
        first_use.at_import()


def test_nvcc_of_another_major_version(installed: Path, machine: Path) -> None:
    nvcc = _toolchain.nvcc(machine / "nvcc", "12.6.85")
    message = (
        rf"no nvcc of CUDA 13, which this PyTorch needs \({nvcc} is of CUDA 12.6.85\): install the toolkit"
    )
    with pytest.raises(StyleforgeBuildError, match=message):
        first_use.at_import()


def test_the_nvcc_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _toolchain.nvcc(tmp_path / "12" / "bin" / "nvcc", "12.6.85")
    new = _toolchain.nvcc(tmp_path / "13" / "bin" / "nvcc", "13.1.2")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "12"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "13"))
    assert compiler.find_nvcc("12.8") == compiler.Nvcc(old, "12.6.85")
    assert compiler.find_nvcc("13.0") == compiler.Nvcc(new, "13.1.2")
    assert compiler.find_nvcc().path == old


def test_failing_build_is_tried_once(installed: Path, runs: Path) -> None:
    (installed / "tiny.cpp").write_text("int broken = missing;\n")
    for _ in range(2):
        with pytest.raises(
            CompilerError, match=r"ninja says: \S*tiny\.cpp:1:\d+: error: .*missing.*the whole log is"
        ):
            first_use.at_import()
    assert len(runs.read_text().splitlines()) == 1
    with pytest.raises(CompilerError):  # asked for, it is tried again
        cuda_library(verbose=False)
    assert len(runs.read_text().splitlines()) == 2


def test_no_cmake(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "cmake", None)
    monkeypatch.setattr(compiler, "gpu_archs", lambda: ["9.0a"])
    monkeypatch.setattr(compiler, "find_nvcc", lambda cuda=None: compiler.Nvcc(Path("nvcc"), "13.0"))
    with pytest.raises(StyleforgeBuildError, match="cmake was not found: pip install cmake ninja"):
        first_use.at_import()


def test_gpu_archs(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.gpu_archs() == ["9.0a"]
    _toolchain.script(machine / "nvidia-smi", "echo 8.0; echo 12.0; echo '[N/A]'")
    assert compiler.gpu_archs() == ["12.0", "8.0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compiler.gpu_archs() == []


def test_loaded_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "cuda_available", True)
    monkeypatch.setattr(_library, "cuda_library_path", tmp_path)
    monkeypatch.setattr(cache, "build_once", None)
    assert cuda_library() == tmp_path


@pytest.mark.skipif(
    os.environ.get("STYLEFORGE_TEST_FIRST_USE", "0") in ("", "0"),
    reason="builds the CUDA library, which takes minutes: STYLEFORGE_TEST_FIRST_USE=1 asks for it",
)
def test_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_library, "cuda_available", False)
    monkeypatch.setattr(_library, "use_cuda", lambda path: None)
    path = cuda_library(archs="80")
    assert _library.build_info(path)["cuda_archs"] == "80-real 80-virtual"
    assert _library.build_info(path)["styleforge"] == __version__
