"""ONNX: whole networks in ONNX Runtime, and what is said where packages are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from _onnx import load, needs_onnx, nodes, run
from _reference import max_error
from styleforge.io.errors import MissingPackageError
from styleforge.models import TransformerNet, load_style

needs_onnx()

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")


def _network() -> TransformerNet:
    net = TransformerNet(8).eval()
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def test_transformer_net_with_dynamic_batch_height_and_width(tmp_path: Path) -> None:
    net = _network()
    path = tmp_path / "net.onnx"
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    styleforge.onnx.export(
        net, (255 * torch.rand(2, 3, 24, 32),), path, dynamic_shapes=shapes, input_names=["picture"]
    )
    model = load(path)
    assert nodes(model) == {
        "Pad": 16, "Conv": 16, "InstanceNormalization": 15, "Relu": 10, "Add": 5, "Resize": 2
    }  # fmt: skip
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    assert model.graph.input[0].name == "picture"
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]  # weights are inside
    for sizes in ((2, 3, 24, 32), (1, 3, 45, 60), (3, 3, 16, 128)):
        x = 255 * torch.rand(sizes)
        with torch.no_grad():
            expected = net(x)
        assert max_error(run(path, x), expected.double()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_shipped_style(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its results are pictures in 0..255: ONNX Runtime is as close to float64 as eager PyTorch."""
    net = load_style("mosaic", device="cpu", dtype=dtype)
    path = tmp_path / "mosaic.onnx"
    styleforge.onnx.export(
        net, ((255 * torch.rand(2, 3, 32, 32)).to(dtype),), path, dynamic_shapes=({2: "h", 3: "w"},)
    )
    load(path)
    x = (255 * torch.rand(2, 3, 64, 48)).to(dtype)
    with torch.no_grad():
        eager = net(x)
        exact = net.double()(x.double())
    result = run(path, x)
    assert result.dtype == dtype
    assert max_error(result, exact) < 2 * max_error(eager, exact)
    if dtype == torch.float32:
        assert max_error(result, eager.double()) / 255 <= 1e-5


def test_modules_together_and_an_exported_program(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = styleforge.FusedConvInstanceNormReLU(4, 8, 3, stride=2, padding_mode="replicate")
            self.block = styleforge.ResidualBlock(8)
            self.norm = styleforge.FusedInstanceNorm2d(8, affine=True)
            self.ffn = styleforge.FusedFFN(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(self.norm(self.block(self.conv(x))).flatten(2).transpose(1, 2))

    module = Block().eval()
    x = torch.randn(2, 4, 12, 10)
    for name, model in (("module", module), ("program", torch.export.export(module, (x,)))):
        styleforge.onnx.export(model, (x,), tmp_path / name)
        load(tmp_path / name)
        assert max_error(run(tmp_path / name, x), module(x).double()) < 1e-5


@pytest.mark.cuda
def test_a_network_on_the_gpu(tmp_path: Path) -> None:
    net = _network().cuda().half()
    x = (255 * torch.rand(2, 3, 24, 32)).half()
    with torch.no_grad():
        expected = net(x.cuda()).cpu().double()
    styleforge.onnx.export(net, (x.cuda(),), tmp_path / "net.onnx")
    load(tmp_path / "net.onnx")
    assert max_error(run(tmp_path / "net.onnx", x), expected) < 0.02 * expected.abs().max()


# --- what is missing ------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "styleforge.onnx._packages.find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    for call in (
        styleforge.onnx.translation_table,
        lambda: styleforge.onnx.export(nn.ReLU(), (torch.ones(1),)),
    ):
        with pytest.raises(
            MissingPackageError, match=r"needs onnxscript, .*pip install 'styleforge\[onnx\]'"
        ):
            call()


def test_importing_styleforge_needs_no_onnx() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime', 'onnx_ir')))\n"
        "import styleforge; styleforge.onnx.register_symbolics()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
