"""TorchScript: fused operators in models that are saved already.

Modules of styleforge, and models that ``styleforge.fuse`` has rewritten, script and trace as they are.
"""

from __future__ import annotations

from styleforge.jit._fuse_script import fuse_script

__all__ = ["fuse_script"]
