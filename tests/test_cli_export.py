"""`styleforge export`: files that run elsewhere, and what it says when it cannot write one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from _onnx import load, needs_onnx, run
from styleforge.cli import app
from styleforge.models import TransformerNet, load_checkpoint, load_style, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "small.safetensors"
    path.parent.mkdir()
    save_checkpoint(TransformerNet(4), path)
    return path


def _export(*arguments: object) -> str:
    result = runner.invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def _error(code: int, *arguments: object) -> str:
    result = runner.invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def _photo(*sizes: int) -> Tensor:
    return 255 * torch.rand(sizes)


def test_torchscript_of_a_style(tmp_path: Path) -> None:
    said = _export("mosaic", "--to", "torchscript", "--output", tmp_path / "out" / "style.pt")
    assert f"wrote {tmp_path}/out/style.pt: 6.8 MB, any batch, height and width, cpu, float32" in said
    loaded = torch.jit.load(tmp_path / "out" / "style.pt")
    net = load_style("mosaic", device="cpu")
    for sizes in ((1, 3, 40, 52), (2, 3, 17, 30)):
        x = _photo(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), net(x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_name_follows_from_the_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _export(checkpoint, "--to", "torchscript", "--dtype", "bfloat16")
    loaded = torch.jit.load(tmp_path / "small.pt")
    x = _photo(1, 3, 16, 20).bfloat16()
    with torch.no_grad():
        assert torch.equal(loaded(x), load_checkpoint(checkpoint).bfloat16()(x))
    assert "the output exists already: small.pt (--force" in _error(2, checkpoint, "--to", "torchscript")
    _export(checkpoint, "--to", "torchscript", "--force")
    assert next(torch.jit.load(tmp_path / "small.pt").parameters()).dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.pt", "weights"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnx(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    needs_onnx()
    path = tmp_path / "net.onnx"
    said = _export(checkpoint, "--to", "onnx", "-o", path, "--dtype", dtype, "--size", "32x48")
    assert f"any batch, height and width, cpu, {dtype}" in said
    graph = load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["picture", "stylised"]
    net = load_checkpoint(checkpoint).to(getattr(torch, dtype))
    for sizes in ((1, 3, 40, 52), (3, 3, 17, 30)):
        x = _photo(*sizes).to(net.conv1.conv2d.weight.dtype)
        with torch.no_grad():
            torch.testing.assert_close(
                run(path, x), net(x), rtol=1e-2, atol=1e-4 if dtype == "float32" else 0.02
            )


def test_onnx_of_one_size(checkpoint: Path, tmp_path: Path) -> None:
    needs_onnx()
    path = tmp_path / "net.onnx"
    assert "1x3x32x48" in _export(checkpoint, "--to", "onnx", "-o", path, "--fixed", "--size", "32x48")
    x = _photo(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), load_checkpoint(checkpoint)(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(Exception, match="invalid dimensions"):
        run(path, _photo(1, 3, 48, 32))


def test_aoti(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    said = _export(checkpoint, "--to", "aoti", "-o", path, "--device", "cpu", "--size", "32")
    assert "any batch, height and width, cpu, float32" in said
    loaded, net = torch._inductor.aoti_load_package(str(path)), load_checkpoint(checkpoint)
    with torch.no_grad():
        for sizes in ((2, 3, 32, 32), (1, 3, 45, 60), (3, 3, 17, 128)):
            x = _photo(*sizes)
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_aoti_takes_the_gpu_where_there_is_one(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    assert "cuda:0, float16" in _export(checkpoint, "--to", "aoti", "-o", path)
    loaded, net = torch._inductor.aoti_load_package(str(path)), load_checkpoint(checkpoint).cuda().half()
    with torch.no_grad():
        for sizes in ((2, 3, 256, 256), (1, 3, 44, 60)):
            x = _photo(*sizes).cuda().half()
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-2, atol=1e-2)


# --- wrong usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mosaik", "--to", "onnx"), "unknown style 'mosaik': the styles are brush, mosaic; did you mean"),
        (("none.pth", "--to", "onnx"), "no such file: none.pth"),
        (("folder/none", "--to", "onnx"), "no such file: folder/none"),
        (("mosaic", "--to", "onnx", "-o", "net.pt"), "--output must end in .onnx for --to onnx, got net.pt"),
        (("mosaic", "--to", "torchscript", "-o", "net"), "must end in .pt or .ts for --to torchscript"),
        (("mosaic", "--to", "aoti", "-o", "net.pt"), "--output must end in .pt2"),
        (("mosaic", "--to", "onnx", "--size", "big"), "--size must be HEIGHTxWIDTH in pixels, such as"),
        (("mosaic", "--to", "onnx", "--size", "64x8"), "--size must be at least 16x16, got '64x8'"),
        (("mosaic", "--to", "torchscript", "--fixed"), "--fixed: TorchScript files take any size"),
        (("mosaic", "--to", "aoti", "--dtype", "int8"), "--dtype must be auto, float32"),
        (("mosaic", "--to", "aoti", "--device", "tpu"), "--device must be auto, cpu"),
    ],
)  # fmt: skip
def test_wrong_usage(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    monkeypatch.chdir(tmp_path)
    assert message in _error(2, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(TransformerNet(2), tmp_path / "net.pt")
    before = (tmp_path / "net.pt").read_bytes()
    assert "would overwrite MODEL itself: net.pt" in _error(2, "net.pt", "--to", "torchscript", "--force")
    assert (tmp_path / "net.pt").read_bytes() == before


def test_a_broken_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(b"nothing")
    line = _error(1, tmp_path / "net.safetensors", "--to", "torchscript", "-o", tmp_path / "x.pt")
    assert "cannot load the checkpoint" in line and line.count("net.safetensors") == 1


def test_a_missing_package_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("styleforge.onnx._packages.find_spec", lambda name: None)
    line = _error(2, "mosaic", "--to", "onnx", "-o", "unwritten.onnx")
    assert "ONNX export needs onnx and onnxscript" in line and "pip install 'styleforge[onnx]'" in line


def test_a_failing_exporter_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        Path(str(args[2])).write_bytes(b"half a file")
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr("styleforge.cli.export._aoti", fail)
    line = _error(1, checkpoint, "--to", "aoti", "-o", tmp_path / "net.pt2")
    assert line == "error: cannot export to aoti: no C++ compiler"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


# --- the example scripts --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchscript", "aoti", "onnx"])
def test_example_script(name: str, tmp_path: Path) -> None:
    if name == "onnx":
        needs_onnx()
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / f"export_{name}.py", tmp_path / "file.pt2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference = float(done.stdout.split()[-1])
    assert difference < (1e-3 if not torch.cuda.is_available() else 2.0)


@pytest.mark.parametrize("name", ["torchscript", "aoti", "onnx"])
def test_an_example_shows_its_help(name: str) -> None:
    if name == "onnx":
        needs_onnx()
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / f"export_{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
