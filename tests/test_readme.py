"""Every Python block and every `styleforge` command of the README runs; the rest of it is there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from styleforge.cli import app
from styleforge.models import TorchTransformerNet, TransformerNet

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def _commands() -> list[str]:
    lines = (line.split("#")[0].strip() for block in _blocks("sh") for line in block.splitlines())
    return [line for line in lines if line.startswith("styleforge ")]


def _name(block: str) -> str:
    return next(line for line in block.splitlines() if "styleforge" in line).split("#")[0].strip()[:60]


def _given() -> dict[str, Any]:
    """What the blocks take for granted: torch, styleforge, the user's model and picture, a saved script."""
    import styleforge

    torch.manual_seed(0)
    model = TorchTransformerNet().eval()
    x = torch.rand(2, 3, 32, 48)
    torch.jit.trace(model, x).save("model.pt")
    return {"torch": torch, "styleforge": styleforge, "model": model, "x": x}


@pytest.mark.parametrize("block", [b for b in _blocks("python") if ".cuda()" not in b], ids=_name)
def test_python_block(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = _given()
    if "onnx" in block:
        pytest.importorskip("onnxscript")
        names["model"] = TransformerNet().eval()
    exec(compile(block, "README.md", "exec"), names)
    if "torch.compile(" in block:
        model, x = names["model"], names["x"]
        torch.testing.assert_close(model(x), model._orig_mod(x), rtol=1e-3, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("block", [b for b in _blocks("python") if ".cuda()" in b], ids=_name)
def test_python_block_on_the_gpu(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = torch.rand(1, 3, 64, 64).half().cuda()
    exec(compile(block, "README.md", "exec"), {**_given(), "model": TransformerNet(), "frame": frame})


LONG = ("--mode full", "styleforge bench")  # minutes: their options are read, the rest is for their own tests


@pytest.mark.parametrize("command", [c for c in _commands() if any(part in c for part in LONG)])
def test_options_of_long_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bench.json").write_text("{}")
    _, name, *arguments = shlex.split(command)
    commands: Any = typer.main.get_command(app)
    commands.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("command", [c for c in _commands() if not any(part in c for part in LONG)])
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "photos" / "photo.jpg", "photo.jpg")
    torch.save(TorchTransformerNet().state_dict(), "my_style.pth")
    if "onnx" in command:
        pytest.importorskip("onnxscript")
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("language", ["cpp", "cmake"])
def test_other_blocks_are_cut_out_of_examples_that_are_built(language: str) -> None:
    """``test_cpp.py`` builds and runs them."""
    names = {"cpp": "*.cpp", "cmake": "CMakeLists.txt"}
    files = [path.read_text() for path in (ROOT / "examples" / "cpp").glob(names[language])]
    lines = [{line.strip() for line in text.splitlines()} for text in files]
    assert _blocks(language)
    for block in _blocks(language):
        wanted = {
            line.strip() for line in block.splitlines() if not line.startswith("#") or "include" in line
        }
        assert any(wanted - {""} <= found for found in lines), block


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert set(re.findall(r"^```(\w*)$", TEXT, re.MULTILINE)) == {"", "sh", "python", "cpp", "cmake"}
    known = ("styleforge ", "make ", "pip install", ".ci/run", "#")
    for line in "".join(_blocks("sh")).splitlines():
        assert line.startswith(known), line


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([\w-]+)", TEXT, re.MULTILINE):
        assert target in targets


def test_picture() -> None:
    from PIL import Image

    before, _, _ = TEXT.partition("## Try it")
    (path,) = re.findall(r"!\[[^\]]+\]\((\S+)\)", before)
    assert (ROOT / path).stat().st_size <= 200_000
    with Image.open(ROOT / path) as picture:
        assert picture.format == "JPEG" and picture.width > 2 * picture.height


def test_there_are_blocks_and_commands() -> None:
    assert len(_blocks("python")) >= 10 and len(_commands()) >= 4
