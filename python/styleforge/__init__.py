"""styleforge: fused PyTorch operators for real-time style transfer.

``styleforge.ops`` holds the operators as functions (``torch.ops.styleforge.*`` by schema), ``styleforge.nn``
the modules, ``styleforge.models`` the networks.
"""

from __future__ import annotations

from styleforge import jit, ops
from styleforge._library import StyleforgeCudaWarning, StyleforgeLibraryError, diagnostics, last_path
from styleforge._version import __version__
from styleforge.fuse import fuse, unfuse
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
    "diagnostics",
    "fuse",
    "jit",
    "last_path",
    "ops",
    "unfuse",
]
