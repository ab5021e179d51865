"""What the built files promise: the C shim alone of PyTorch, no Python: one wheel serves every version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from styleforge import _library

ROOT = Path(__file__).resolve().parents[1]
STYLES = ROOT / "python" / "styleforge" / "styles"
SHIM = re.compile(r"(aoti_)?torch_\w+")
RECORD_PATH = "_ZN10styleforge11record_pathEPKcS1_"  # styleforge::record_path(char const*)
TOOLCHAIN = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
SYSTEM_LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libpthread.so.0",
    "libdl.so.2",
}


def _main_library() -> Path:
    assert _library.library_path is not None
    return _library.library_path


def _cuda_library() -> Path:
    named = os.environ.get("STYLEFORGE_CUDA_LIBRARY")
    if named:
        return Path(named)  # a name that is wrong fails the test
    name = "libstyleforge_cuda.so"
    folders = [_main_library().parent, ROOT / "build" / "cuda", ROOT / "build"]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        pytest.skip(f"no {name} was built (make cuda)")
    return found


@pytest.fixture(params=["main", "cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    return _main_library() if request.param == "main" else _cuda_library()


def _symbols(library: Path, kind: str) -> list[str]:
    command = ["nm", "-D", f"--{kind}-only", "--format=posix", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[0] for line in lines]


def _undefined(library: Path) -> set[str]:
    """Names that are neither the C or C++ run time's (those carry a version, name@GLIBC_2.34) nor std::'s."""
    unversioned = {name for name in _symbols(library, "undefined") if "@" not in name}
    # libtorch_cpu.so exports what its builder's older libstdc++ lacked; the linker takes that, unversioned.
    return {name for name in unversioned if not re.match(r"_Z(N[KVRO]*)?S[tsoid]", name)} - TOOLCHAIN


def _defined(library: Path) -> set[str]:
    return {name.partition("@")[0] for name in _symbols(library, "defined")}


def _dynamic(library: Path, tag: str) -> list[str]:
    command = ["readelf", "--dynamic", "--wide", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(rf"\({tag}\).*\[(.*)\]", output)


def test_the_audit_sees_the_shim(library: Path) -> None:
    """The other tests would pass on an empty list."""
    assert "aoti_torch_get_dtype" in _undefined(library)


def test_only_the_c_shim_of_pytorch_is_used(library: Path) -> None:
    """No C++ symbol of at::, c10:: or torch::, no Python symbol: nothing but the shim and our own."""
    foreign = {name for name in _undefined(library) if not SHIM.fullmatch(name)}
    assert foreign - {RECORD_PATH} == set()


def test_libraries_that_the_main_library_needs() -> None:
    needed = set(_dynamic(_main_library(), "NEEDED"))
    needed = {name for name in needed if not name.startswith("ld-linux")}
    assert needed - SYSTEM_LIBRARIES == {"libtorch_cpu.so", "libc10.so"}


def test_libraries_that_the_cuda_library_needs() -> None:
    """libtorch_cuda.so must be named (the stream shim lives there); the CUDA runtime is inside."""
    needed = {name for name in _dynamic(_cuda_library(), "NEEDED") if not name.startswith("ld-linux")}
    needed -= SYSTEM_LIBRARIES | {"librt.so.1"}
    assert needed == {"libstyleforge.so", "libtorch_cpu.so", "libc10.so", "libtorch_cuda.so"}


def test_libraries_are_looked_for_next_to_each_other(library: Path) -> None:
    assert _dynamic(library, "RUNPATH") + _dynamic(library, "RPATH") == ["$ORIGIN"]


def test_what_exists_once_is_in_the_main_library() -> None:
    """A second copy of the last path would be written by the CUDA operators and never be read."""
    once = {RECORD_PATH, "styleforge_last_path"}
    assert once <= _defined(_main_library())
    assert once & _defined(_cuda_library()) == set()


def test_the_cuda_runtime_is_not_exported() -> None:
    """It would be taken for PyTorch's own by whoever loads after it."""
    assert {name for name in _defined(_cuda_library()) if name.startswith(("cuda", "__cuda"))} == set()


def test_build_info_names_toolkit_and_architectures() -> None:
    info = _library.build_info(_cuda_library())
    assert int(info["cuda"].partition(".")[0]) >= 12
    assert all(re.fullmatch(r"\d+[af]?-(real|virtual)", arch) for arch in info["cuda_archs"].split())
    assert info["cuda_archs"]


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., str]:
    """What cmake/cuda_archs.cmake makes of a list of architectures."""
    script = tmp_path / "resolve.cmake"
    script.write_text(
        f"include({ROOT / 'cmake' / 'cuda_archs.cmake'})\n"
        'styleforge_resolve_archs(result "${REQUESTED}" "${KNOWN}")\n'
        'message(STATUS "=${result}=")\n'
    )

    def run(requested: str, known: str) -> str:
        command = [
            sys.executable,
            "-m",
            "cmake",
            f"-DREQUESTED={requested}",
            f"-DKNOWN={known}",
            "-P",
            str(script),
        ]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            return " ".join(finished.stderr.split())
        return finished.stdout.split("=")[1]

    return run


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("80;90a", "80-real;90a-real;80-virtual"),
        ("8.0,9.0a", "80-real;90a-real;80-virtual"),
        ("8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"),
        ("7.5 12.0", "75-real;120-real;120-virtual"),
        ("90a", "90a-real"),
        ("8.0;9.0", "80-real;90a-real;90-virtual"),
        ("9.0+PTX", "90a-real;90-virtual"),
        ("90;90a", "90a-real;90-virtual"),
        ("90-virtual", "90-virtual"),
        ("", "75-real;80-real;90a-real;120-real;120-virtual"),
    ],
)
def test_cuda_archs(resolve: Callable[..., str], requested: str, expected: str) -> None:
    assert resolve(requested, "75;80;90;120") == expected


def test_cuda_archs_that_the_toolkit_does_not_know(resolve: Callable[..., str]) -> None:
    assert resolve("", "70;75;80") == "75-real;80-real;80-virtual"
    assert "cannot compile for architecture 120; it knows 75 80" in resolve("80;120", "75;80")
    assert '"Hopper" is not understood' in resolve("Hopper", "90")


def test_wheel() -> None:
    named = os.environ.get("STYLEFORGE_WHEEL")
    wheels = [Path(named)] if named else sorted((ROOT / "dist").glob("styleforge-*.whl"))
    if not wheels:
        pytest.skip("no wheel was built (make wheel)")
    wheel = wheels[-1]
    assert re.fullmatch(r"styleforge-[^-]+-py3-none-(many)?linux\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requirements = re.findall(r"^Requires-Dist: (torch\b.*)$", archive.read(metadata).decode(), re.M)
    assert {"styleforge/lib/libstyleforge.so", "styleforge/py.typed", "styleforge/__main__.py"} <= names
    cmake = "styleforge/lib/cmake/styleforge/styleforge-config"
    assert {f"{cmake}.cmake", f"{cmake}-version.cmake", "styleforge/include/styleforge/load.h"} <= names
    assert {name for name in names if name.endswith(".so")} <= {
        "styleforge/lib/libstyleforge.so",
        "styleforge/lib/libstyleforge_cuda.so",
    }
    # First-use building: all that the CUDA library is made of.
    needed = {path.relative_to(ROOT) for path in (ROOT / "csrc" / "cuda").rglob("*.*")}
    needed |= {path.relative_to(ROOT) for path in [*ROOT.glob("ops/*.*"), *ROOT.glob("ops/cuda/*.*")]}
    needed |= {Path("CMakeLists.txt"), Path("cmake/cuda.cmake"), Path("python/styleforge/_version.py")}
    assert {f"styleforge/_sources/{path}" for path in needed} <= names
    styles = {name for name in names if name.startswith("styleforge/styles/")}
    shipped = {
        f"styleforge/styles/{path.name}"
        for path in STYLES.iterdir()
        if path.suffix in (".safetensors", ".md")
    }
    assert shipped <= styles
    assert [requirement.replace(" ", "") for requirement in requirements] == ["torch>=2.10"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("arch", "whole"), [("90a", True), ("90", False), ("80", False)])
def test_the_probe_tells_code_with_wgmma(arch: str, whole: bool, tmp_path: Path) -> None:
    """90 and 90a have one version, but in code for plain 90 the kernels that need wgmma are empty."""
    ptx = tmp_path / "probe.ptx"
    source = ROOT / "csrc" / "cuda" / "common" / "device_facts.cu"
    subprocess.run(["nvcc", "-std=c++20", "-ptx", f"-arch=compute_{arch}", source, "-o", ptx], check=True)
    assert (".maxntid" in ptx.read_text()) == whole
