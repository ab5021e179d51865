"""styleforge: fused PyTorch operators for real-time style transfer.

``styleforge.ops`` holds the operators as functions (``torch.ops.styleforge.*`` by schema), ``styleforge.nn``
the modules, ``styleforge.models`` the networks, ``styleforge.onnx`` the export to ONNX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from styleforge import _library, build, ops
from styleforge._library import StyleforgeCudaWarning, StyleforgeLibraryError, diagnostics, last_path
from styleforge._version import __version__
from styleforge.fuse import fuse, unfuse
from styleforge.graphs import graphed
from styleforge.nn import (
    FusedAttention,
    FusedConvInstanceNormReLU,
    FusedFFN,
    FusedInstanceNorm2d,
    ResidualBlock,
)

__all__ = [
    "FusedAttention",
    "FusedConvInstanceNormReLU",
    "FusedFFN",
    "FusedInstanceNorm2d",
    "ResidualBlock",
    "StyleforgeCudaWarning",
    "StyleforgeLibraryError",
    "__version__",
    "build",
    "cmake_prefix_path",
    "diagnostics",
    "fuse",
    "graphed",
    "jit",
    "last_path",
    "onnx",
    "ops",
    "unfuse",
]

cmake_prefix_path: str = _library.cmake_prefix_path()
"""For ``CMAKE_PREFIX_PATH``: C++ programs then find the libraries with ``find_package(styleforge)``."""

if TYPE_CHECKING:
    from styleforge import jit, onnx


def __getattr__(name: str) -> Any:
    """Imports what only some programs use when it is first asked for."""
    if name in ("jit", "onnx"):
        return importlib.import_module(f"styleforge.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
