"""Building on the user's machine: one's own operators, and the CUDA library where none was installed.

What is built lies in a per-user cache (``$XDG_CACHE_HOME/styleforge``, else ``~/.cache/styleforge``) and is
built once, also where many processes start at the same time. ``STYLEFORGE_BUILD=0`` forbids building; what is
in the cache is used all the same.
"""

from __future__ import annotations

from styleforge.build.errors import CompilerError, StyleforgeBuildError
from styleforge.build.first_use import cuda_library
from styleforge.build.inline import compile_inline

__all__ = ["CompilerError", "StyleforgeBuildError", "compile_inline", "cuda_library"]
