"""The error of everything that builds."""

from __future__ import annotations


class StyleforgeBuildError(RuntimeError):
    """Something was not built: one line that says why, where the log is and what to do."""


class CompilerError(StyleforgeBuildError):
    """A compiler, a linker or CMake said no: the same attempt would fail again."""
