"""styleforge: fused PyTorch operators for real-time style transfer.

``styleforge.ops`` holds the operators as functions (``torch.ops.styleforge.*`` by schema), ``styleforge.nn``
the modules, ``styleforge.models`` the networks, ``styleforge.onnx`` the export to ONNX.
"""

from __future__ import annotations

from styleforge import _library, build, jit, onnx, ops
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
