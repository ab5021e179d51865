"""The `styleforge` command itself: help, versions, errors, `info`, `styles`."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import styleforge
from styleforge.cli import app
from styleforge.cli import info as info_module
from styleforge.cli._errors import WorkError, with_clear_errors

runner = CliRunner()


@dataclass
class _Style:
    name: str
    description: str


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("styleforge.models")
    module.available_styles = lambda: [_Style("mosaic", "tiles [of] glass"), _Style("brush", "oil")]
    monkeypatch.setitem(sys.modules, "styleforge.models", module)
    return module


def test_help_names_every_command() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("stylize", "export", "styles", "verify", "profile", "info"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["stylize", "export", "styles", "verify", "profile", "bench", "info"])
def test_no_help_is_cut_off(command: str) -> None:
    """A terminal of 80 columns, where a long word ends in an ellipsis."""
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    text = result.stdout.replace("...", "")
    assert "│" in text and "\N{HORIZONTAL ELLIPSIS}" not in text


def test_the_command_modules_import_no_heavy_package() -> None:
    """Only the package's own ``__init__`` may cost time; here it is replaced by an empty one."""
    package = Path(styleforge.__path__[-1])
    code = (
        "import sys, types\n"
        "package = types.ModuleType('styleforge')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "sys.modules['styleforge'] = package\n"
        "import styleforge.cli\n"
        "print([name for name in ('torch', 'PIL', 'av', 'numpy') if name in sys.modules])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("styleforge ")


def test_unknown_command_and_option_are_usage_errors() -> None:
    assert runner.invoke(app, ["paint"]).exit_code == 2
    assert runner.invoke(app, ["info", "--colour"]).exit_code == 2


def test_styles_table(models: types.ModuleType) -> None:
    result = runner.invoke(app, ["styles"])
    assert result.exit_code == 0
    assert "mosaic" in result.stdout
    assert "tiles [of] glass" in result.stdout  # not taken for markup


def test_styles_without_any(models: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_styles", list)
    result = runner.invoke(app, ["styles"])
    assert result.exit_code == 0
    assert "--checkpoint" in result.stdout


def test_info_json_has_every_section(models: types.ModuleType) -> None:
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert {"styleforge", "python", "pytorch", "system", "cpu", "gpus", "packages", "environment"} <= set(
        report
    )
    assert report["python"]["version"] == sys.version.split()[0]
    assert report["pytorch"]["version"]
    assert report["cpu"]["torch_threads"] >= 1
    assert report["styles"] == ["mosaic", "brush"]


def test_info_prints_the_library_diagnostics(
    models: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = types.ModuleType("styleforge._library")
    library.diagnostics = lambda: {
        "library": "/somewhere/libstyleforge.so",
        "cuda_archs": ["sm_80", "sm_90a"],
        "built_with": {"torch": "2.13.0", "nvcc": "13.0"},
        "errors": ["CUDA library [sm_75] does not fit"],
        "nothing": {},
    }
    monkeypatch.setitem(sys.modules, "styleforge._library", library)
    monkeypatch.setenv("COLUMNS", "200")
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    for text in (
        "/somewhere/libstyleforge.so",
        "sm_80, sm_90a",
        "built_with.nvcc",
        "CUDA library [sm_75] does not",
    ):
        assert text in result.stdout


def test_info_survives_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise OSError("libstyleforge.so: undefined symbol")

    library = types.ModuleType("styleforge._library")
    library.diagnostics = broken
    monkeypatch.setitem(sys.modules, "styleforge._library", library)
    monkeypatch.setitem(sys.modules, "styleforge.models", None)  # makes the import fail
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    assert "undefined symbol" in result.stdout
    report = json.loads(runner.invoke(app, ["info", "--json"]).stdout)
    assert report["styles"]["error"].startswith("ModuleNotFoundError")
    assert report["pytorch"]["version"]
    assert report["styleforge"]["version"] and "undefined symbol" in report["styleforge"]["error"]


def test_info_survives_programs_that_hang_or_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(info_module.subprocess, "run", hang)
    assert "TimeoutExpired" in info_module._first_line([sys.executable])
    assert info_module._first_line(["no-such-program-here"]) == "not found"
    assert runner.invoke(app, ["info"]).exit_code == 0


def test_rows_flatten_nested_values() -> None:
    rows = info_module._rows({"a": {"b": 1, "c": [1, 2]}, "d": True, "e": [{"f": "x"}], "g": [], "h": None})
    assert rows == [
        ("a.b", "1"),
        ("a.c", "1, 2"),
        ("d", "yes"),
        ("e[0].f", "x"),
        ("g", "none"),
        ("h", "none"),
    ]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (WorkError("first\nsecond"), 1, "error: first"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero"),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("STYLEFORGE_DEBUG", raising=False)

    @with_clear_errors
    def command(debug: bool = False) -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("by_variable", [False, True])
def test_debug_shows_the_traceback(
    by_variable: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_DEBUG", "1" if by_variable else "0")

    @with_clear_errors
    def command(debug: bool = False) -> None:
        raise WorkError("it broke")

    with pytest.raises(typer.Exit):
        command(debug=not by_variable)
    assert "Traceback" in capsys.readouterr().err
