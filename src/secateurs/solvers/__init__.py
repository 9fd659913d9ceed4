"""Closed-form repair of a cut: second moments of a layer's inputs, and the weights that are best for them."""

from __future__ import annotations

from .admm import admm
from .alps import alps
from .bias import compensation
from .blocks import block_of, blocks_of, walk, weight_of
from .dsnot import dsnot
from .exact_obs import exact_obs
from .gram import Gram, from_matrix, matrix_shape, solvable, to_matrix
from .layerwise import BlockDone, Gathering, Propagate, layers_by_block, solve_blocks
from .least_squares import conjugate_gradients, least_squares
from .obs import damped, inverse, quadratic_error, remove_columns, saliency
from .permutation import channel_order
from .scores import relative_importance, wanda_scores
from .sequential import call_levels, grams_of, recorded, solve_in_order
from .solved import Solved
from .sparsegpt import sparsegpt
from .stacks import layer_of, parts_of, tensor_of
from .structured_obs import Level, structured_obs

__all__ = [
    "BlockDone",
    "Gathering",
    "Gram",
    "Level",
    "Propagate",
    "Solved",
    "admm",
    "alps",
    "block_of",
    "blocks_of",
    "call_levels",
    "channel_order",
    "compensation",
    "conjugate_gradients",
    "damped",
    "dsnot",
    "exact_obs",
    "from_matrix",
    "grams_of",
    "inverse",
    "layer_of",
    "layers_by_block",
    "least_squares",
    "matrix_shape",
    "parts_of",
    "quadratic_error",
    "recorded",
    "relative_importance",
    "remove_columns",
    "saliency",
    "solvable",
    "solve_blocks",
    "solve_in_order",
    "sparsegpt",
    "structured_obs",
    "tensor_of",
    "to_matrix",
    "walk",
    "wanda_scores",
    "weight_of",
]
