"""AOTInductor packages: dynamic sizes, other dtypes, processes that know the library alone.

``test_entry_paths.py`` has a package of every operator, ``test_cpp.py`` packages in C++.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.export import Dim

import styleforge
from _reference import DEVICES, max_error
from styleforge import _library

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")


def _package(module: nn.Module, x: Tensor, dynamic: dict[int, Any], path: Path) -> Any:
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


@pytest.mark.parametrize("device", DEVICES)
def test_dynamic_batch_and_sequence(device: str, tmp_path: Path) -> None:
    """Of a transformer's feed-forward network, between operators that Inductor generates code for."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.ffn = styleforge.FusedFFN(16, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(self.norm(x), x) * 2

    module = Block().eval().to(device)
    dynamic = {0: Dim("batch", min=1, max=64), 1: Dim("sequence", min=1, max=4096)}
    loaded = _package(module, torch.randn(2, 7, 16, device=device), dynamic, tmp_path / "block.pt2")
    with torch.no_grad():
        for sizes in ((2, 7, 16), (1, 1, 16), (5, 300, 16)):
            x = torch.randn(sizes, device=device)
            assert max_error(loaded(x), module(x).double()) < 1e-5


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = nn.Sequential(
        styleforge.FusedConvInstanceNormReLU(3, 8, 3, stride=2, padding_mode="reflect"),
        styleforge.FusedConvInstanceNormReLU(8, 4, 3, upsample=2, activation="tanh"),
    )
    module = module.eval().bfloat16()
    path = tmp_path_factory.mktemp("aoti") / "half.pt2"
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    _package(module, torch.randn(2, 3, 16, 12).bfloat16(), sizes, path)
    return module, path


def test_half_precision(half: tuple[nn.Module, Path]) -> None:
    module, path = half
    loaded = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for sizes in ((2, 3, 16, 12), (1, 3, 33, 20)):
            x = torch.randn(sizes).bfloat16()
            result = loaded(x)
            assert result.dtype == torch.bfloat16
            torch.testing.assert_close(result, module(x))


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


RUN = """
import sys, torch
if len(sys.argv) > 4:
    torch.ops.load_library(sys.argv[4])
with torch.no_grad():
    torch.save(torch._inductor.aoti_load_package(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])
assert "styleforge" not in sys.modules
"""


def test_the_library_alone_is_enough(half: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Fakes and gradients are Python's; to run a package takes none of it."""
    module, path = half
    x = torch.randn(3, 3, 20, 28).bfloat16()
    torch.save(x, tmp_path / "x.pt")
    done = _python(RUN, path, tmp_path / "x.pt", tmp_path / "y.pt", _library.library_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), module(x))


def test_without_the_library_the_operator_is_named(half: tuple[nn.Module, Path], tmp_path: Path) -> None:
    torch.save(torch.randn(2, 3, 16, 12).bfloat16(), tmp_path / "x.pt")
    done = _python(RUN, half[1], tmp_path / "x.pt", tmp_path / "y.pt")
    assert done.returncode != 0
    assert "styleforge::fused_conv_instance_norm_relu" in done.stderr
