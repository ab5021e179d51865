"""Fused operators for models as they are: ``styleforge.fuse(model)`` and ``backend="styleforge"``.

``styleforge.fuse`` is the function itself; ``from styleforge.fuse import FusionReport`` reaches the rest.
"""

# In ``styleforge``, the package's name is the function that users call (as ``styleforge.ops.fused_ffn`` is a
# function and its file). Python finds submodules by their full names, so imports from here, and
# ``styleforge.fuse.backend`` in an entry point, work as usual.
#
# ``_operations`` describes steps of a network, ``_layers`` and ``_functions`` make descriptions,
# ``_patterns`` finds the sites, ``_graph`` rewrites fx graphs with ``_calls`` and ``_attention``; ``_trace``,
# ``_forward``, ``_swap`` and ``_fuse`` do so for modules, ``backend`` for what torch.compile captures.

from __future__ import annotations

from styleforge.fuse import backend
from styleforge.fuse._fuse import fuse, unfuse
from styleforge.fuse._report import Fused, FusionReport, NotFused

__all__ = ["Fused", "FusionReport", "NotFused", "fuse", "unfuse"]

backend.register()
