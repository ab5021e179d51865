"""Finding and loading the libraries; each case in a process of its own, since a process loads them once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import styleforge
from styleforge import _library

# `python -c` with the modules of this process, and torch.version.cuda as the case wants it.
PRELUDE = "import sys, json, warnings, torch\nsys.path[:0] = {path!r}\ntorch.version.cuda = {cuda!r}\n"
IMPORT = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import styleforge
    from styleforge import _library
ours = [w for w in caught if "styleforge" in str(w.message)]
print(json.dumps({
    "warnings": [[w.category.__name__, isinstance(w.message, RuntimeWarning), str(w.message)] for w in ours],
    "report": _library.diagnostics(),
    "cuda_operators": [
        schema.name.removeprefix("styleforge::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("styleforge::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")
    ],
    "value": torch.ops.styleforge.fused_instance_norm(torch.ones(1, 1, 2, 2)).sum().item(),
}))
"""


def _run(code: str, cuda: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("STYLEFORGE_")}
    prelude = PRELUDE.format(path=[str(Path(styleforge.__path__[0]).parent)], cuda=cuda)
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _import(cuda: str | None = None, **environment: str) -> dict[str, Any]:
    finished = _run(IMPORT, cuda, **environment)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert result["value"] == 0.0
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A library folder with the real main library and no CUDA library."""
    assert _library.library_path is not None
    (tmp_path / "libstyleforge.so").symlink_to(_library.library_path)
    return tmp_path


def _cuda_library(folder: Path, **fields: str) -> None:
    """A file with the build information of a CUDA library that no loader accepts."""
    info = {
        "styleforge": styleforge.__version__,
        "pytorch": "2.13.0",
        "cuda": "13.0.88",
        "cuda_archs": "90a-real",
    }
    text = b"\x7fELF....STYLEFORGE_BUILD_INFO=" + json.dumps(info | fields).encode() + b"\0more"
    (folder / "libstyleforge_cuda.so").write_bytes(text)


def _only_warning(result: dict[str, Any]) -> str:
    ((category, is_runtime_warning, message),) = result["warnings"]
    assert category == "StyleforgeCudaWarning"
    assert is_runtime_warning
    assert not result["report"]["cuda_available"]
    assert result["report"]["cuda_error"] in message
    assert "\n" not in message
    return str(message)


def test_missing_main_library(tmp_path: Path) -> None:
    finished = _run("import styleforge", STYLEFORGE_LIBRARY_PATH=str(tmp_path))
    assert finished.returncode != 0
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("styleforge._library.StyleforgeLibraryError: libstyleforge.so was not found in ")
    assert str(tmp_path) in last
    assert "pip install --no-build-isolation ." in last
    assert "STYLEFORGE_LIBRARY_PATH" in last


def test_main_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "libstyleforge.so").write_bytes(b"not a library")
    finished = _run("import styleforge", STYLEFORGE_LIBRARY_PATH=str(tmp_path))
    assert "StyleforgeLibraryError" in finished.stderr
    assert f"{tmp_path}/libstyleforge.so cannot be loaded" in finished.stderr
    assert torch.__version__ in finished.stderr


def test_the_error_is_an_import_error() -> None:
    assert issubclass(_library.StyleforgeLibraryError, ImportError)


def test_pytorch_without_cuda_ignores_the_cuda_library(folder: Path) -> None:
    _cuda_library(folder)
    result = _import(None, STYLEFORGE_LIBRARY_PATH=str(folder))
    assert result["warnings"] == []
    assert not result["report"]["cuda_available"]
    assert result["report"]["cuda_error"] is None


def test_missing_cuda_library(folder: Path) -> None:
    message = _only_warning(_import("13.0", STYLEFORGE_LIBRARY_PATH=str(folder)))
    assert f"libstyleforge_cuda.so was not found in {folder}" in message
    assert "build it for CUDA 13.0" in message


def test_cuda_library_for_another_toolkit(folder: Path) -> None:
    _cuda_library(folder)
    message = _only_warning(_import("12.6", STYLEFORGE_LIBRARY_PATH=str(folder)))
    assert "was built for CUDA 13.0.88" in message
    assert f"found PyTorch {torch.__version__} with CUDA 12.6" in message


def test_cuda_library_of_another_version(folder: Path) -> None:
    _cuda_library(folder, styleforge="0.0.1")
    message = _only_warning(_import("13.0", STYLEFORGE_LIBRARY_PATH=str(folder)))
    assert "styleforge 0.0.1" in message


def test_cuda_library_that_the_loader_refuses(folder: Path) -> None:
    _cuda_library(folder)
    message = _only_warning(_import("13.0", STYLEFORGE_LIBRARY_PATH=str(folder)))
    assert "libstyleforge_cuda.so cannot be loaded" in message
    assert "built for CUDA 13.0.88" in message


def test_file_that_is_no_library(folder: Path) -> None:
    (folder / "libstyleforge_cuda.so").write_bytes(b"")
    message = _only_warning(_import("13.0", STYLEFORGE_LIBRARY_PATH=str(folder)))
    assert "is not a CUDA library of styleforge" in message


@pytest.fixture
def real_cuda_library() -> Path:
    named = os.environ.get("STYLEFORGE_CUDA_LIBRARY")
    if named is None or torch.version.cuda is not None:
        pytest.skip("needs STYLEFORGE_CUDA_LIBRARY (a file) and a PyTorch without CUDA")
    return Path(named)


def test_real_cuda_library_under_a_pytorch_without_one(folder: Path, real_cuda_library: Path) -> None:
    """libtorch_cuda.so is missing then: the loader's own error is passed on."""
    (folder / "libstyleforge_cuda.so").symlink_to(real_cuda_library)
    cuda = _library.build_info(real_cuda_library)["cuda"]
    message = _only_warning(_import(cuda, STYLEFORGE_LIBRARY_PATH=str(folder)))
    assert "libtorch_cuda.so: cannot open shared object file" in message


def test_real_cuda_library_registers_its_operators(folder: Path, real_cuda_library: Path) -> None:
    """With the stub that it was linked against in libtorch_cuda.so's place it loads without a GPU."""
    (folder / "libstyleforge_cuda.so").symlink_to(real_cuda_library)
    stub = real_cuda_library.parent / "link_stub"
    cuda = _library.build_info(real_cuda_library)["cuda"]
    result = _import(cuda, STYLEFORGE_LIBRARY_PATH=str(folder), LD_LIBRARY_PATH=str(stub))
    assert result["warnings"] == []
    assert result["report"]["cuda_available"]
    assert result["report"]["cuda_archs"]
    assert result["report"]["cuda_library"] == str(folder / "libstyleforge_cuda.so")
    assert {"fused_instance_norm", "fused_conv_instance_norm_relu", "fused_ffn"} <= set(
        result["cuda_operators"]
    )


def test_cuda_library_switched_off(folder: Path) -> None:
    _cuda_library(folder)
    result = _import("12.6", STYLEFORGE_LIBRARY_PATH=str(folder), STYLEFORGE_DISABLE_CUDA="1")
    assert result["warnings"] == []
    assert result["report"]["cuda_error"] == "disabled by STYLEFORGE_DISABLE_CUDA"
    assert result["report"]["environment"] == {
        "STYLEFORGE_DISABLE_CUDA": "1",
        "STYLEFORGE_LIBRARY_PATH": str(folder),
    }


def test_library_that_the_program_loaded_itself(folder: Path) -> None:
    """A second copy under another path would register every operator twice, which ends the process."""
    copy = folder / "copy" / "libstyleforge.so"
    copy.parent.mkdir()
    copy.write_bytes((folder / "libstyleforge.so").read_bytes())
    finished = _run(f"torch.ops.load_library({str(copy)!r})" + IMPORT, STYLEFORGE_LIBRARY_PATH=str(folder))
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1])["report"]["library"] == str(copy)


def test_importing_twice_loads_once() -> None:
    before = _library.library_path
    _library.load()
    assert _library.library_path is before


def test_last_path() -> None:
    torch.ops.styleforge.fused_instance_norm(torch.ones(1, 1, 2, 2))
    assert _library.last_path().startswith("instance_norm:cpu")


def test_build_info() -> None:
    assert _library.library_path is not None
    info = _library.build_info(_library.library_path)
    assert info["styleforge"] == styleforge.__version__
    assert info["pytorch"]
    assert info["compiler"]
    assert _library.build_info(Path(__file__)) == {}
    assert _library.build_info(Path("missing")) == {}


def test_diagnostics() -> None:
    report = _library.diagnostics()
    assert set(report) == {
        "version",
        "library",
        "library_build",
        "cuda_library",
        "cuda_library_build",
        "cuda_archs",
        "cuda_available",
        "cuda_error",
        "searched",
        "torch",
        "torch_cuda",
        "last_path",
        "environment",
    }
    assert report["version"] == styleforge.__version__
    assert report["library"] == str(_library.library_path)
    assert report["torch"] == torch.__version__
    json.dumps(report)
