"""Checks the operators against float64 on the user's machine: what ``styleforge verify`` runs."""

from __future__ import annotations

from styleforge.verify.cases import Case, grid, specific
from styleforge.verify.operators import OPERATORS, Operator
from styleforge.verify.run import Outcome, Timing, run_case
from styleforge.verify.tolerance import Comparison, compare

__all__ = [
    "OPERATORS",
    "Case",
    "Comparison",
    "Operator",
    "Outcome",
    "Timing",
    "compare",
    "grid",
    "run_case",
    "specific",
]
