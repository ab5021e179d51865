"""The reference: every public name says what it is; pages and Markdown files link to what is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import styleforge

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import links  # noqa: E402

PUBLIC = ("", ".ops", ".nn", ".models", ".fuse", ".jit", ".onnx", ".build", ".io")
# Alike but for the design that they fix: the first one says it all, the others refer to it.
SAME_AS = {"fused_attention_v1": "fused_attention", "fused_attention_v2": "fused_attention"}


def _module(name: str) -> Any:
    # styleforge.fuse is the function; the package of that name is found by its full name alone.
    importlib.import_module(f"styleforge{name}")
    return sys.modules[f"styleforge{name}"]


def _public() -> dict[str, tuple[Any, Any]]:
    """From each public name to the module that exports it, and the thing itself."""
    found: dict[str, tuple[Any, Any]] = {}
    for suffix in PUBLIC:
        module = _module(suffix)
        found[module.__name__] = (module, module)
        for name in module.__all__:
            found[f"{module.__name__}.{name}"] = (module, getattr(module, name))
    return found


NAMES = _public()
CODE = {n: v for n, (_, v) in NAMES.items() if inspect.isfunction(v) or inspect.isclass(v)}


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class itself defines."""
    for name, value in vars(cls).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            if inspect.isfunction(value) and not value.__module__.startswith("styleforge"):
                continue  # taken over from PyTorch
            yield name, value


def _documented_variables(module: Any) -> set[str]:
    """Names that are assigned in the file and followed by a string."""
    body = ast.parse(inspect.getsource(module)).body
    found = set()
    for statement, after in pairwise(body):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _where_assigned(module: Any, name: str) -> Any:
    """The module that assigns a variable: this one, or the one it is imported from."""
    for statement in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(statement, ast.ImportFrom) and any(a.name == name for a in statement.names):
            package = module.__name__ if module.__file__.endswith("__init__.py") else module.__package__
            dots = "." * statement.level
            return importlib.import_module(f"{dots}{statement.module}", package)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring(name: str) -> None:
    module, value = NAMES[name]
    short = name.rpartition(".")[2]
    if inspect.ismodule(value) or name in CODE:
        assert value.__doc__ and value.__doc__.strip(), f"{name} has no docstring"
    elif short != "__version__":
        assert short in _documented_variables(_where_assigned(module, short)), (
            f"{name} has no docstring: a string on the line after its assignment"
        )


def _arguments(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name not in ("self", "cls") and not p.name.startswith("_")]


def _sections(text: str) -> set[str]:
    return set(re.findall(r"^ *(\w+):\n", text, re.MULTILINE))


@pytest.mark.parametrize("name", CODE)
def test_docstring_is_complete(name: str) -> None:
    value = CODE[name]
    text = inspect.getdoc(value) or ""
    same = SAME_AS.get(name.rpartition(".")[2])
    if same is not None:
        assert f"``{same}``" in text
        assert _arguments(value) == _arguments(_module(".ops").__dict__[same])
        return
    if inspect.isfunction(value):
        _is_complete(name, value, text)
        return
    own_constructor = "__init__" in vars(value) and not issubclass(value, BaseException)
    if own_constructor and "dataclass" not in text and not hasattr(value, "__dataclass_fields__"):
        _names_all(name, _arguments(value.__init__), text)
    for field in getattr(value, "__dataclass_fields__", ()):
        assert re.search(rf"\b{field}\b", text), f"{name}: the docstring does not speak of {field}"
    for method, function in _methods(value):
        inner = inspect.getdoc(function) or ""
        assert inner, f"{name}.{method} has no docstring"
        if inspect.isfunction(function) and method != "extra_repr":
            _names_all(f"{name}.{method}", _arguments(function), inner)


def _names_all(name: str, arguments: list[str], text: str) -> None:
    for argument in arguments:
        found = re.search(rf"(?i)\b{argument}\b", text)
        assert found, f"{name}: the docstring does not say what {argument} is"


def _is_complete(name: str, function: Any, text: str) -> None:
    arguments = _arguments(function)
    _names_all(name, arguments, text)
    assert not arguments or "Args" in _sections(text), f"{name} has no section Args"
    returned = inspect.signature(function).return_annotation
    if returned not in (None, "None"):
        assert _sections(text) & {"Returns", "Yields"}, f"{name} has no section Returns"
    if ".ops.fused_" in name:
        assert {"Raises", "Source"} <= _sections(text), f"{name} needs errors and source"
        assert re.search(r"^    output = ", text, re.MULTILINE), f"{name} needs its formula"


# --- links ----------------------------------------------------------------------------------------


def test_markdown_links_lead_somewhere() -> None:
    files = links.markdown_files(ROOT)
    assert {"README.md", "CONTRIBUTING.md"} <= {file.name for file in files}
    assert links.dead_links(files, ROOT) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "page.html").write_text('<a id="here"></a><a href="../a.md#two-words">x</a>')
    (tmp_path / "a.md").write_text(
        "# Two words\n\n[ok](folder/page.html#here) ![no](none.png) [no](#three) [ok](#two-words)\n"
        "[no](folder/page.html#there) [no](https://nowhere) [ok](https://example.org/x) [no](../../x)\n"
        '[no](ftp://example.org) <img src="lost.jpg"> `folder/page.html` `folder/*.html` `folder/lost.html`\n'
        "`other/thing` is no folder of this one; `folder/<name>.html` is a pattern.\n"
    )
    page = '<a href="#x">x</a><p id="x">x</p><a href="page.html#here"></a><img src="../../up.png">'
    (tmp_path / "folder" / "other.html").write_text(page)
    found = links.dead_links(sorted(tmp_path.rglob("*.*")), tmp_path)
    assert [line.removeprefix(f"{tmp_path}/") for line in found] == [
        "a.md: none.png: there is no such file",
        "a.md: #three: a.md has no such anchor",
        "a.md: folder/page.html#there: page.html has no such anchor",
        "a.md: https://nowhere: not a well-formed address",
        "a.md: ../../x: leads out of the folder",
        "a.md: ftp://example.org: links of the kind ftp are not expected",
        "a.md: lost.jpg: there is no such file",
        "a.md: `folder/lost.html`: there is no such file",
        "folder/other.html: ../../up.png: leads out of the folder",
    ]


def test_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pdoc")
    import reference

    assert [f"styleforge{suffix}" for suffix in PUBLIC] == list(reference.MODULES)
    monkeypatch.setattr(styleforge, "cmake_prefix_path", "")  # comes back afterwards
    assert reference.main(str(tmp_path / "site")) == 0, capsys.readouterr().err
    for name, (module, value) in NAMES.items():
        page = (tmp_path / "site" / f"{module.__name__.replace('.', '/')}.html").read_text()
        short = name.rpartition(".")[2]
        if not inspect.ismodule(value) and short != "__version__":
            assert f'id="{short}"' in page, f"{name} is not on its page"
    for page in (tmp_path / "site").rglob("*.*"):
        text = page.read_text()
        assert str(ROOT) not in text and not re.search(r'(src|<link[^>]* href)="\w+://', text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError):
        reference.render(tmp_path / "mine")
