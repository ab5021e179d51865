"""C++ programs: found by CMake, built against the environment's LibTorch, run where there is no Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from _cpp import library_folder, output, run, tool
from styleforge.models import TransformerNet

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent  # where pip puts cmake and ninja


class Every(nn.Module):
    """Every operator, through its module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = styleforge.FusedConvInstanceNormReLU(3, 8, 3, padding_mode="reflect", upsample=2)
        self.block = styleforge.ResidualBlock(8)
        self.norm = styleforge.FusedInstanceNorm2d(8, affine=True)
        self.ffn = styleforge.FusedFFN(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.block(self.conv(x)))
        return self.ffn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


SIZES = ((2, 3, 16, 24), (1, 3, 33, 20))


# --- TorchScript ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_torchscript_gives_what_python_gives(how: str, programs: Path, tmp_path: Path) -> None:
    module = Every().eval()
    x = torch.randn(SIZES[0])
    compiled = torch.jit.trace(module, x) if how == "trace" else torch.jit.script(module)
    if how == "freeze":
        compiled = torch.jit.freeze(compiled)
    compiled.save(tmp_path / "model.pt")
    for sizes in SIZES:
        x = torch.randn(sizes)
        with torch.no_grad():
            expected = module(x)
        result = output(programs / "examples" / "run_torchscript", tmp_path / "model.pt", x)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_torchscript_transformer_net(programs: Path, tmp_path: Path) -> None:
    net = TransformerNet(8).eval()
    torch.jit.script(net).save(tmp_path / "net.pt")
    x = 255 * torch.rand(1, 3, 45, 60)
    with torch.no_grad():
        expected = net(x)
    result = output(programs / "examples" / "run_torchscript", tmp_path / "net.pt", x)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-5)


def test_several_threads(programs: Path, tmp_path: Path) -> None:
    """The same results in each, and errors that stay in the call that they belong to."""
    torch.jit.script(Every().eval()).save(tmp_path / "model.pt")
    torch.save(torch.randn(SIZES[0]), tmp_path / "x.pt")
    done = run(programs / "threads", tmp_path / "model.pt", tmp_path / "x.pt", 6, 10)
    assert done.stdout == "60 equal, 6 refused\n", done.stderr


@pytest.mark.cuda
def test_torchscript_on_the_gpu(programs: Path, tmp_path: Path) -> None:
    net = TransformerNet(32).eval().cuda().half()
    torch.jit.script(net).save(tmp_path / "net.pt")
    x = (255 * torch.rand(1, 3, 48, 64)).half()
    with torch.no_grad():
        expected = net(x.cuda()).cpu()
    result = output(programs / "examples" / "run_torchscript", tmp_path / "net.pt", x, "cuda")
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


# --- AOTInductor ----------------------------------------------------------------------------------


def _package(module: nn.Module, x: Tensor, path: Path) -> None:
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = Every().eval()
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    _package(module, torch.randn(SIZES[0]), path)
    return module, path


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_aotinductor_gives_what_python_gives(
    how: str, programs: Path, packaged: tuple[nn.Module, Path]
) -> None:
    module, path = packaged
    program = programs / "examples" / "run_aoti"
    for sizes in SIZES:
        x = torch.randn(sizes)
        with torch.no_grad():
            expected = module(x)
        if how == "environment":
            result = output(program, path, x, libraries=library_folder())
        else:
            result = output(program, path, x, "cpu", library_folder())
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
def test_aotinductor_on_the_gpu(programs: Path, tmp_path: Path) -> None:
    module = Every().eval().cuda()
    x = torch.randn(SIZES[0])
    _package(module, x.cuda(), tmp_path / "model.pt2")
    with torch.no_grad():
        expected = module(x.cuda()).cpu()
    result = output(
        programs / "examples" / "run_aoti", tmp_path / "model.pt2", x, "cuda", libraries=library_folder()
    )
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


# --- what is missing ------------------------------------------------------------------------------


def _error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_torchscript_without_the_library(programs: Path, tmp_path: Path) -> None:
    torch.jit.script(Every().eval()).save(tmp_path / "model.pt")
    torch.save(torch.randn(SIZES[0]), tmp_path / "x.pt")
    done = run(programs / "without_library", tmp_path / "model.pt", tmp_path / "x.pt", tmp_path / "y.pt")
    assert re.search(
        r"error: operator styleforge::fused_\w+ is not registered: load libstyleforge\.so", _error(done)
    )


def test_a_folder_without_the_library(
    programs: Path, packaged: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    torch.save(torch.randn(SIZES[0]), tmp_path / "x.pt")
    arguments = (packaged[1], tmp_path / "x.pt", tmp_path / "y.pt")
    done = run(programs / "examples" / "run_aoti", *arguments, libraries=tmp_path)
    line = _error(done)
    assert f"cannot load {tmp_path}/libstyleforge.so" in line
    assert "STYLEFORGE_LIBRARY_PATH" in line
    line = _error(run(programs / "examples" / "run_aoti", *arguments))  # where the system's loader looks
    assert "cannot load libstyleforge.so" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Unknown builtin op: styleforge::fused_ffn.\nHere are",
            r"styleforge::fused_ffn is not .* libstyleforge\.so",
        ),
        (
            "Could not find schema for styleforge::fused_ffn.",
            r"styleforge::fused_ffn is not .* libstyleforge\.so",
        ),
        (
            "Could not run 'styleforge::_reflect_conv2d' with arguments from the 'CUDA' backend. This",
            r"styleforge::_reflect_conv2d has no CUDA kernels .* libstyleforge_cuda\.so",
        ),
        ("fused_ffn: input must have\nException raised", r"^fused_ffn: input must have$"),
        ("styleforge::fused_ffn: something else", r"^styleforge::fused_ffn: something else$"),
    ],
)
def test_explanations(text: str, expected: str, programs: Path) -> None:
    assert re.search(expected, run(programs / "explain", text).stdout.rstrip("\n"))


def test_a_missing_model_is_one_line(programs: Path, tmp_path: Path) -> None:
    for program, rest in (("run_torchscript", ()), ("run_aoti", ("cpu", library_folder()))):
        done = run(programs / "examples" / program, tmp_path / "none.pt", "x.pt", "y.pt", *rest)
        assert _error(done) == f"error: cannot read {tmp_path / 'none.pt'}"
        assert run(programs / "examples" / program).returncode == 2


def test_find_package_says_where_it_looked(tmp_path: Path) -> None:
    script = tmp_path / "find.cmake"
    script.write_text("find_package(styleforge REQUIRED)\n")
    command = [tool("cmake"), f"-DCMAKE_PREFIX_PATH={styleforge.cmake_prefix_path}"]
    command += [f"-DSTYLEFORGE_LIBRARY_PATH={tmp_path}", "-P", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert f"libstyleforge.so is not in {tmp_path}; set STYLEFORGE_LIBRARY_PATH" in said


SPACES = """
cmake_minimum_required(VERSION 3.26)
project(spaces LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(Torch REQUIRED)
find_package(styleforge REQUIRED)
add_executable(explain "{source}")
target_link_libraries(explain PRIVATE ${{TORCH_LIBRARIES}} styleforge::styleforge)
"""


def test_a_folder_with_spaces(tmp_path: Path) -> None:
    libraries = tmp_path / "my libraries"
    libraries.mkdir()
    shutil.copy(library_folder() / "libstyleforge.so", libraries)
    (tmp_path / "CMakeLists.txt").write_text(SPACES.format(source=ROOT / "tests" / "cpp" / "explain.cpp"))
    configure = [
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DSTYLEFORGE_LIBRARY_PATH={libraries}"),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path};{styleforge.cmake_prefix_path}",
        *("-S", str(tmp_path), "-B", str(tmp_path / "built")),
    ]
    for arguments in (configure, ["--build", str(tmp_path / "built")]):
        done = subprocess.run([tool("cmake"), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "built" / "explain"
    assert "libstyleforge.so" in _needed(program)
    assert run(program, "some text").stdout == "some text\n"


# --- the programs themselves ----------------------------------------------------------------------


def _needed(program: Path) -> list[str]:
    output = subprocess.run(
        ["readelf", "--dynamic", str(program)], capture_output=True, text=True, check=True
    )
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output.stdout)


def test_the_programs_need_no_python(programs: Path) -> None:
    for name in ("run_torchscript", "run_aoti"):
        loaded = subprocess.run(
            ["ldd", programs / "examples" / name], capture_output=True, text=True, check=True
        )
        assert "libtorch_cpu" in loaded.stdout
        assert "python" not in re.sub(r"/\S*", "", loaded.stdout)
    assert "libstyleforge.so" in _needed(programs / "examples" / "run_torchscript")
    assert "libstyleforge.so" not in _needed(programs / "examples" / "run_aoti")


def test_the_folder_for_cmake_holds_the_configuration() -> None:
    folder = Path(styleforge.cmake_prefix_path)
    assert (folder / "styleforge" / "styleforge-config.cmake").is_file()
