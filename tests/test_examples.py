"""Random tests: their examples depend on the seed alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st


def _examples() -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []

    @seed(1)
    @settings(max_examples=100, database=None, phases=[Phase.generate])
    @given(st.integers(0, 2**31 - 1), st.sampled_from(("a", "b", "c")))
    def collect(number: int, letter: str) -> None:
        found.append((number, letter))

    collect()
    return found


def test_what_is_imported_changes_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _examples()
    file = tmp_path / "imported_between.py"
    file.write_text("NUMBERS = (" + ", ".join(str(1000 + 7 * i) for i in range(200)) + ")\n")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    assert _examples() == before
