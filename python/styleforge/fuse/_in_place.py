"""``a += b`` and the like as functions that a traced graph can call.

``torch.fx`` itself writes down ``a = a + b``, which is something else where somebody holds ``a``; and its own
code for ``operator.iadd`` is something else for numbers.
"""

from __future__ import annotations

from typing import Any


def iadd(a: Any, b: Any) -> Any:
    """``a += b``."""
    a += b
    return a


def isub(a: Any, b: Any) -> Any:
    """``a -= b``."""
    a -= b
    return a


def imul(a: Any, b: Any) -> Any:
    """``a *= b``."""
    a *= b
    return a


def itruediv(a: Any, b: Any) -> Any:
    """``a /= b``."""
    a /= b
    return a
