"""styleforge.build.compile_inline: a user's operators from source text, and the cache of what was built."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import _toolchain
import styleforge
from styleforge.build import CompilerError, StyleforgeBuildError, cache, compile_inline, compiler, inline

ROOT = Path(__file__).resolve().parents[1]

TWICE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

Tensor twice(const Tensor& input) {
  Tensor output = torch::stable::empty_like(input);
  const float* from = static_cast<const float*>(input.data_ptr());
  float* to = static_cast<float*>(output.data_ptr());
  for (int64_t i = 0; i < input.numel(); ++i) to[i] = 2 * from[i];
  return output;
}

STABLE_TORCH_LIBRARY(NAME, m) { m.def("twice(Tensor input) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(NAME, CPU, m) { m.impl("twice", TORCH_BOX(&twice)); }
"""

# The kernel apart from torch's headers, the operator in C++.
KERNEL = """
#include <cuda_runtime.h>
namespace {
__global__ void twice(const float* from, float* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = 2 * from[i];
}
}  // namespace
void launch_twice(const float* from, float* to, int count, cudaStream_t stream) {
  twice<<<(count + 255) / 256, 256, 0, stream>>>(from, to, count);
}
"""
CUDA_OPERATOR = """
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
void launch_twice(const float* from, float* to, int count, cudaStream_t stream);
Tensor twice_cuda(const Tensor& input) {
  Tensor output = torch::stable::empty_like(input);
  void* stream = STREAM;
  launch_twice(static_cast<const float*>(input.data_ptr()), static_cast<float*>(output.data_ptr()),
               static_cast<int>(input.numel()), static_cast<cudaStream_t>(stream));
  return output;
}
STABLE_TORCH_LIBRARY_IMPL(NAME, CUDA, m) { m.impl("twice", TORCH_BOX(&twice_cuda)); }
"""
STREAM = """[&] {
    void* current = nullptr;
    aoti_torch_get_current_cuda_stream(input.get_device_index(), &current);
    return current;
  }()"""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STYLEFORGE_BUILD", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "cache" / "styleforge"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C++ compiler that writes a line for each file that it compiles."""
    log = tmp_path / "calls"
    log.touch()
    real = shutil.which("c++") or shutil.which("g++")
    wrapper = f'case "$*" in *" -c "*) echo compiled >> {log};; esac\nexec {real} "$@"'
    monkeypatch.setenv("CXX", str(_toolchain.script(tmp_path / "bin" / "counted", wrapper)))
    return log


def _source(name: str, text: str = TWICE) -> str:
    return text.replace("NAME", name)


def _calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_processes_at_once_compile_once(counted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def use() -> Any:
        name = "sf_inline_once"
        operators = compile_inline(name, cpp_source=_source(name), functions=["twice"])
        return operators.twice(torch.tensor([1.0, 2.5])).tolist()

    assert _toolchain.at_once(use, 3) == ["[2.0, 5.0]"] * 3
    assert _calls(counted) == 1
    said = capfd.readouterr().err
    assert said.count("styleforge: building sf_inline_once") == 1
    assert "another process builds sf_inline_once (compile_inline): waiting" in said

    assert use() == [2.0, 5.0]  # this process: from the cache
    assert torch.ops.sf_inline_once.twice(torch.ones(1)).item() == 2.0
    assert _calls(counted) == 1
    with pytest.raises(StyleforgeBuildError, match="was loaded from another source in this process"):
        compile_inline("sf_inline_once", cpp_source=_source("sf_inline_once") + "// changed\n", verbose=False)


def test_other_flags_are_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[cache.Entry] = []

    def record(entry: cache.Entry, *args: Any, **kwargs: Any) -> Path:
        entries.append(entry)
        raise StyleforgeBuildError("recorded")

    monkeypatch.setattr(cache, "build_once", record)
    for source, flags in (("int a;", []), ("int a;", ["-O1"]), ("int b;", []), ("int a;", [])):
        with pytest.raises(StyleforgeBuildError, match="recorded"):
            compile_inline("sf_inline_key", cpp_source=source, extra_cflags=flags)
    names = [entry.name for entry in entries]
    assert len(set(names)) == 3
    assert names[0] == names[3]


def test_failing_compiler(own_cache: Path) -> None:
    with pytest.raises(CompilerError) as caught:
        compile_inline("sf_inline_bad", cpp_source="int main() { return missing; }\n", verbose=False)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"says: \S*sf_inline_bad\.cpp:1:\d+: error: .*missing", message)
    log = re.search(r"the whole log is (\S+build\.log)\)", message)
    assert log is not None
    assert Path(log[1]).is_relative_to(own_cache)
    assert "missing" in Path(log[1]).read_text()


def test_source_without_the_operator() -> None:
    with pytest.raises(
        StyleforgeBuildError, match=r"registers no operator sf_inline_none::\*.*STABLE_TORCH_LIBRARY"
    ):
        compile_inline("sf_inline_none", cpp_source="int nothing = 0;\n", verbose=False)


def test_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEFORGE_BUILD", "0")
    with pytest.raises(StyleforgeBuildError, match="STYLEFORGE_BUILD=0 forbids it"):
        compile_inline("sf_inline_forbidden", cpp_source="int a;")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="an identifier, got 'my-ops'"):
        compile_inline("my-ops", cpp_source="int a;")
    with pytest.raises(ValueError, match="cuda_source or cpp_source is needed"):
        compile_inline("sf_inline_empty")
    with pytest.raises(StyleforgeBuildError, match=r"torch\.ops\.styleforge has operators already"):
        compile_inline("styleforge", cpp_source="int a;")


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_nvcc_candidates", list)
    with pytest.raises(StyleforgeBuildError, match=r"nvcc was not found in .* set CUDA_HOME to its folder"):
        compile_inline("sf_inline_cuda", KERNEL)


@needs_nvcc
def test_cuda_source() -> None:
    """Without a GPU, and in a PyTorch without CUDA, the operators are there all the same."""
    name = "sf_inline_cu"
    operator = CUDA_OPERATOR.replace("STREAM", "nullptr")
    operators = compile_inline(name, KERNEL, cpp_source=_source(name, TWICE + operator), verbose=False)
    assert operators.twice(torch.ones(3)).tolist() == [2.0] * 3
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}::twice", "CUDA")


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch without CUDA")
def test_stream_of_a_pytorch_without_cuda() -> None:
    name = "sf_inline_stream"
    operator = CUDA_OPERATOR.replace("STREAM", STREAM)
    with pytest.raises(
        StyleforgeBuildError, match=r"aoti_torch_get_current_cuda_stream .this PyTorch has no CUDA"
    ):
        compile_inline(name, KERNEL, cpp_source=_source(name, TWICE + operator), verbose=False)


@pytest.mark.cuda
@needs_nvcc
def test_cuda_source_on_the_gpu() -> None:
    name = "sf_inline_gpu"
    operator = CUDA_OPERATOR.replace("STREAM", STREAM)
    operators = compile_inline(name, KERNEL, cpp_source=_source(name, TWICE + operator), functions=["twice"])
    x = torch.randn(1000, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        y = operators.twice(x)
    torch.cuda.synchronize()
    assert torch.equal(y, 2 * x)


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "gpu_archs", lambda: ["9.0a"])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert inline._cuda_flags([]) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert inline._cuda_flags(["-arch=sm_80"]) == []
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;12.0+PTX")
    ptx = "-gencode=arch=compute_120,code=[sm_120,compute_120]"
    assert inline._cuda_flags([]) == ["-gencode=arch=compute_80,code=sm_80", ptx]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(StyleforgeBuildError, match="'Hopper' is not understood"):
        inline._cuda_flags([])


def test_target_version_is_the_library_s() -> None:
    assert f"TORCH_TARGET_VERSION={inline._TARGET_VERSION}" in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a.cu(3): warning #1: x\na.cu(4): error: no y\n1 error", "a.cu(4): error: no y"),
        ("ptxas fatal   : Unresolved extern function 'f'", "ptxas fatal   : Unresolved extern function 'f'"),
        ("x.o: in `f':\nx.cpp: undefined reference to `g'", "x.cpp: undefined reference to `g'"),
        ("-- ok\nCMake Error at x:3 (message):\n  no toolkit\n", "CMake Error at x:3 (message): no toolkit"),
        ("killed\n\n", "killed"),
        ("", ""),
    ],
)  # fmt: skip
def test_first_error(output: str, expected: str) -> None:
    assert compiler.first_error(output.splitlines()) == expected


# The cache by itself, with a "compiler" in Python.
ENTRY = cache.Entry("thing-1", "thing.so")


def _write(work: Path, log: Path) -> Path:
    (work / "made").write_text("library")
    return work / "made"


def _build_once(**options: Any) -> Path:
    build = options.pop("build", _write)
    return cache.build_once(ENTRY, build, what="the thing", say=lambda text: None, **options)


def test_cache_hit_needs_no_permission(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENTRY.find() is None
    assert _build_once() == own_cache / "thing-1" / "thing.so"
    assert not (own_cache / "thing-1" / "work").exists()
    monkeypatch.setenv("STYLEFORGE_BUILD", "0")
    assert _build_once(build=None).read_text() == "library"


def test_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fallback = tmp_path / f"styleforge-{os.getuid()}"
    assert _build_once() == fallback / "thing-1" / "thing.so"
    assert (
        f"{tmp_path}/file/styleforge: Not a directory cannot be used; building the thing in {fallback}"
        in caplog.text
    )
    assert ENTRY.find() == fallback / "thing-1" / "thing.so"
    assert fallback.stat().st_mode & 0o777 == 0o700

    fallback.chmod(0o777)  # anybody could have put a library there
    assert ENTRY.find() is None
    with pytest.raises(
        StyleforgeBuildError, match=r"no folder to build in .*by, somebody else.*set XDG_CACHE_HOME"
    ):
        _build_once()


def test_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container whose user id nobody knows "~" stays "~", which is no folder to make."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert _build_once().is_relative_to(tmp_path / f"styleforge-{os.getuid()}")
    assert not (tmp_path / "~").exists()

    def no_folder() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    with pytest.raises(StyleforgeBuildError, match="there is no home and no temporary folder"):
        _build_once()


def test_what_a_compiler_refused_is_not_tried_again_unasked(own_cache: Path) -> None:
    tried = []

    def refuse(work: Path, log: Path) -> Path:
        tried.append(work)
        raise CompilerError("refused")

    for retry in (False, False, True):
        with pytest.raises(CompilerError, match="refused"):
            _build_once(build=refuse, retry=retry)
    assert len(tried) == 2
    with pytest.raises(CompilerError, match=f"refused .not tried again: remove {own_cache}/thing-1/failed"):
        _build_once(build=refuse, retry=False)
    assert _build_once().is_file()


def test_a_build_that_was_killed_leaves_no_lock_and_no_library() -> None:
    def die(work: Path, log: Path) -> Path:
        (work / "half").write_text("half a library")
        os._exit(1)

    pid = os.fork()
    if pid == 0:
        _build_once(build=die)
    os.waitpid(pid, 0)
    assert ENTRY.find() is None
    begin = time.monotonic()
    assert _build_once().read_text() == "library"
    assert time.monotonic() - begin < 5


def test_the_package_has_it() -> None:
    assert styleforge.build.compile_inline is compile_inline
