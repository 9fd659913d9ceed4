"""Closed-form repair of a cut: second moments of a layer's inputs, and the weights that are best for them."""

from __future__ import annotations

from .gram import Gram, from_matrix, solvable, to_matrix
from .obs import damped, inverse, quadratic_error, remove_columns, saliency
from .sequential import call_levels, solve_in_order

__all__ = [
    "Gram",
    "call_levels",
    "damped",
    "from_matrix",
    "inverse",
    "quadratic_error",
    "remove_columns",
    "saliency",
    "solvable",
    "solve_in_order",
    "to_matrix",
]
