"""How much memory it takes to prune a checkpoint block by block, from shapes alone, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import DataError, ModelError
from ..graph.run import Executing
from ..in_layers import LayerSolver
from ..solvers import call_levels, matrix_shape, parts_of

__all__ = ["Matrix", "beside", "matrices_of"]

# Bytes of a piece of inputs in float64, and how many such there are while its moments are taken; see `Gram`.
_PIECE, _PIECES = 2**26, 4
# Bytes for each column of what is worked on strip by strip: 256 rows in float64, four times.
_STRIP = 2**13


@dataclass(frozen=True)
class Matrix:
    """What is solved at a time, or the groups of a convolution one after the other.

    Args:
        entries: of all groups.
        groups: how many.
        columns: of each.
        source: a name; matrices with the same one share the second moments of their inputs.
    """

    entries: int
    groups: int
    columns: int
    source: str

    @property
    def products(self) -> int:
        """Bytes of the second moments."""
        return 8 * self.groups * self.columns**2


def matrices_of(model: nn.Module, layers: Sequence[str], batch: Any) -> dict[str, list[Matrix]]:
    """Per layer its matrices: one, or one an expert of a stack.

    Which layers read one tensor is seen by running the batch through a model without numbers. Where its way depends on
    numbers that cannot be, and each layer stands for itself.

    Args:
        model: parameters on meta.
        layers: names, in the order in which they are solved.
        batch: one of the calibration data.
    """
    parts = {layer: parts_of(model, layer) for layer in layers}
    single = all(list(inside) == [layer] for layer, inside in parts.items())
    leaders = _leaders(model, layers, batch) if single else {}
    return {
        layer: [_matrix(module, leaders.get(layer, part)) for part, module in inside.items()]
        for layer, inside in parts.items()
    }


def beside(layers: Sequence[Sequence[Matrix]], solver: LayerSolver, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes at the peak of a block beside its own tensors: activations, second moments, masks and the solver's work.

    Args:
        layers: of the block, each with its matrices, in the order in which they are solved.
        solver: what is done to them.
        tokens, batch: how many of all batches, and of the largest.
        itemsize: bytes of a number of the activations.
    """
    matrices = [matrix for layer in layers for matrix in layer]
    if not matrices:
        return 0
    # What goes from block to block is read by the first layer; it is there before and after the block.
    activations = 2 * tokens * matrices[0].columns * itemsize
    widest = max(matrix.columns for matrix in matrices)
    peak = _products(matrices, solver) + _PIECES * min(batch * widest * 8, _PIECE) + _STRIP * widest
    # A byte an entry of the masks, until the block is done; then they are sent and joined.
    solved = 0
    for number, matrix in enumerate(matrices):
        solved += matrix.entries
        left, entries = _products(matrices[number:], solver), matrix.entries // matrix.groups
        peak = max(peak, left + solved + solver.workspace.bytes(entries, matrix.columns))
    return activations + max(peak, solved + 2 * max(sum(matrix.entries for matrix in layer) for layer in layers))


def _products(matrices: Iterable[Matrix], solver: LayerSolver) -> int:
    return sum({matrix.source: matrix.products for matrix in matrices}.values()) if solver.full else 0


def _matrix(module: nn.Module, source: str) -> Matrix:
    groups, columns = matrix_shape(module)
    return Matrix(module.get_parameter("weight").numel(), groups, columns, source)


def _leaders(model: nn.Module, layers: Sequence[str], batch: Any) -> dict[str, str]:
    try:
        with Executing():
            levels = call_levels(model, [batch], layers)
    except (DataError, ModelError, RuntimeError):
        return {}
    return {layer: level[0] for level in levels for layer in level}
