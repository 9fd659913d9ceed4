"""Optimal brain surgery on the inputs of a layer: what a weight costs, and how the others best make up for it.

A layer with weight W [rows, columns] and inputs x has the error ½·Σ_rows (w - w')·H·(w - w')ᵀ when W becomes W', with
H = (2/S)·Σ x·xᵀ (Hassibi and Stork 1993; Frantar and Alistarh 2022, arXiv 2208.11580). Everything here is exact for
that error, in float64, and knows neither models nor layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.batch import double
from ..core.errors import ModelError, OptionError
from ..core.finite import all_finite
from .triangle import mirror

__all__ = [
    "check_layer",
    "damp",
    "damped",
    "factor",
    "factored",
    "inverse",
    "owned",
    "quadratic_error",
    "remove_columns",
    "saliency",
]

# Tenfold damping at most this many times, before an inverse is refused.
_RUNGS = 3
# A pivot of the factorisation below this share of its diagonal entry is rounding error, not curvature.
_SINGULAR = 1e-13
# Columns that a factorisation finishes at a time.
_BLOCK = 256
# Rows of a matrix whose error is taken at a time.
_ROWS = 256


def damped(hessian: Tensor, share: float = 0.01) -> Tensor:
    """H + share·mean(diag H)·I, and 1 on the diagonal where it was 0: float64 [columns, columns].

    A column whose diagonal is 0 met only zeros, so nothing is known about it: it is coupled to no other.

    Args:
        hessian: [columns, columns], symmetric.
        share: of the mean of the diagonal (0.01, SparseGPT's code); 0 for none.

    Raises:
        OptionError: a negative share, or a hessian that is not square.

    >>> damped(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 0.5).tolist()
    [[5.0, 0.0], [0.0, 1.0]]
    """
    return damp(owned(hessian), share)


def damp(matrix: Tensor, share: float) -> Tensor:
    """`matrix`, float64, as `damped` makes it, in place; that says what is raised."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise OptionError(f"a hessian is square, [columns, columns]; got shape {tuple(matrix.shape)}.")
    if not 0 <= share < float("inf"):
        raise OptionError(f"the damping must be a number of at least 0, got {share}.")
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal += share * diagonal.mean()
    diagonal[dead] = 1
    return matrix


def factor(hessian: Tensor, *, share: float = 0.01, where: str = "the layer") -> Tensor:
    """The lower triangular L with L·Lᵀ = `damped(hessian, share)`: float64 [columns, columns].

    Where that is not positive definite, ten times the damping is tried, up to three times, with a warning; without
    damping nothing is tried.

    Args:
        hessian, share: see `damped`.
        where: the layer, for messages.

    Raises:
        ModelError: NaN or infinite entries, or no damping was enough; the latter has the condition number.
    """
    _check_finite(hessian, where)
    root = owned(hessian)
    _climb(root, share, where)
    return root.tril_()


@contextmanager
def factored(hessian: Tensor, *, share: float = 0.01, where: str = "the layer") -> Iterator[float]:
    """Inside, the lower triangle of `hessian` is that of its `factor`; gives the share of damping that was enough.

    What is above the diagonal never changes, and afterwards the hessian is what it was, so that no second matrix of
    its size is held.

    Args:
        hessian: float64 [columns, columns], symmetric to the bit, as that of a `Gram` is.
        share, where: see `factor`, which also says what is raised.
    """
    _check_finite(hessian, where)
    plain = hessian.diagonal().clone()
    try:
        yield _climb(hessian, share, where)
    finally:
        _restore(hessian, plain)


def owned(hessian: Tensor) -> Tensor:
    """A copy of `hessian` in float64, in its order or in PyTorch's own."""
    wide = double(hessian)
    return wide.clone() if wide is hessian else wide


def inverse(hessian: Tensor, *, share: float = 0.01, where: str = "the layer", in_place: bool = False) -> Tensor:
    """The inverse of `damped(hessian, share)`, from its Cholesky factor: float64 [columns, columns].

    Args:
        hessian, share, where: see `factor`, which also says what is raised.
        in_place: work in the memory of the hessian, as `factored` does; otherwise in a copy.
    """
    work = hessian if in_place else owned(hessian)
    with factored(work, share=share, where=where):
        return torch.cholesky_inverse(work)


def saliency(weight: Tensor, hessian: Tensor, *, share: float = 0.01, where: str = "the layer") -> Tensor:
    """w²/(2·[H⁻¹]_qq), by how much the error grows when one weight goes and its row makes up for it: float64, as W.

    A weight that met only zeros costs nothing.

    Args:
        weight: [rows, columns].
        hessian, share, where: see `inverse`.
    """
    _check_columns(weight, hessian)
    spread = inverse(hessian, share=share, where=where).diagonal()
    cost = double(weight).square() / (2 * spread)
    return cost.masked_fill(hessian.diagonal().to(cost.device) == 0, 0)


def remove_columns(
    weight: Tensor, hessian: Tensor, columns: Tensor, *, share: float = 0.01, where: str = "the layer"
) -> Tensor:
    """`weight` without the columns S and the others moved to where the error is least: [rows, columns], its dtype.

    W - W_S·([H⁻¹]_SS)⁻¹·[H⁻¹]_S,: in one step for all of S, with exact zeros at S. Columns that met only zeros keep
    their weights.

    Args:
        weight: [rows, columns].
        hessian, share, where: see `inverse`; with share 0 the result is the least-squares fit W·H_:,K·(H_KK)⁻¹.
        columns: bool [columns], those that go.

    Raises:
        OptionError: sizes that do not fit.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> remove_columns(torch.ones(1, 2), h, torch.tensor([False, True]), share=0)
    tensor([[1.5000, 0.0000]])
    """
    _check_columns(weight, hessian)
    if columns.shape != weight.shape[1:] or columns.dtype != torch.bool:
        raise OptionError(
            f"columns must be bool [{weight.shape[1]}], one for each column of {where}; got {columns.dtype} "
            f"{list(columns.shape)}."
        )
    if not bool(columns.any()):
        return weight.clone()
    spread = inverse(hessian, share=share, where=where)
    gone = columns.to(spread.device)
    wide = double(weight).to(spread.device)
    root = torch.linalg.cholesky(spread[gone][:, gone])
    out = wide - wide[:, gone] @ torch.cholesky_solve(spread[gone], root)
    out[:, gone] = 0
    return out.to(weight)


def quadratic_error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """½·tr((W - W')·H·(W - W')ᵀ): half the summed squared error of the outputs, over S and times 2.

    Args:
        before, after: [rows, columns].
        hessian: not damped.
    """
    total = 0.0
    # In pieces, since the matrices may be the largest of a model.
    for old, new in zip(before.split(_ROWS), after.split(_ROWS), strict=True):
        gap = double(old) - double(new)
        total += float((gap @ double(hessian) * gap).sum() / 2)
    return total


def check_layer(weight: Tensor, hessian: Tensor, where: str = "the layer") -> None:
    """None; refuses what no solver can work on, before anything is computed.

    Raises:
        OptionError: sizes that do not fit.
        ModelError: NaN or infinite weights.
    """
    _check_columns(weight, hessian)
    if not all_finite(weight):
        raise ModelError(f"NaN or infinite values among the weights of {where}: mend the model before it is pruned.")


def _check_columns(weight: Tensor, hessian: Tensor) -> None:
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise OptionError(
            f"a weight [rows, columns] needs a hessian [columns, columns]; got {list(weight.shape)} and "
            f"{list(hessian.shape)}."
        )


def _check_finite(hessian: Tensor, where: str) -> None:
    if not all_finite(hessian):
        raise ModelError(
            f"NaN or infinite values among the inputs of {where}: look at the data, or run the model in float32."
        )


def _restore(matrix: Tensor, diagonal: Tensor) -> None:
    """None; a matrix whose lower triangle was worked in is symmetric again."""
    matrix.diagonal().copy_(diagonal)
    mirror(matrix)


def _climb(matrix: Tensor, share: float, where: str) -> float:
    """The first share of damping on the ladder with which there is a factor, now the lower triangle of `matrix`."""
    plain = matrix.diagonal().clone()
    tried = [share * 10**rung for rung in range(_RUNGS + 1)] if share else [0.0]
    for step in tried:
        if _factor_in_place(damp(matrix, step)):
            if step > share:
                text = f"{where}: its hessian is inverted with damping {step:g}, as {share:g} is too little."
                warnings.warn(text, stacklevel=4)
            return step
        _restore(matrix, plain)
    raise ModelError(
        f"the hessian of {where} is not positive definite with damping up to {tried[-1]:g} (condition number "
        f"{_condition(damped(matrix, tried[-1])):.1e}): give more calibration data or more damping, or leave the "
        "layer out with ignore=."
    )


def _factor_in_place(matrix: Tensor) -> bool:
    """Whether the matrix is positive definite to working precision; if so, its lower triangle is its factor.

    What is above the diagonal stays, and is never read. Columns are finished in blocks, by products with all that
    stand before them. LAPACK does as much arithmetic and is no slower at it, but PyTorch hands it a copy by columns
    whose upper half is cleared number by number across memory, which at 4096 columns takes half of the time.
    """
    least = _SINGULAR * matrix.diagonal()
    for a in range(0, len(matrix), _BLOCK):
        b = min(a + _BLOCK, len(matrix))
        corner, below = matrix[a:b, a:b], matrix[b:, a:b]
        above = corner.clone()
        matrix[a:, a:b].addmm_(matrix[a:, :a], matrix[a:b, :a].T, alpha=-1)
        root, info = torch.linalg.cholesky_ex(corner)
        if bool(info):
            corner.copy_(above)
            return False
        corner.copy_(torch.where(torch.ones_like(corner, dtype=torch.bool).tril(), root, above))
        below.copy_(torch.linalg.solve_triangular(root.T, below, upper=True, left=False))
    return bool((matrix.diagonal().square() > least).all())


def _condition(matrix: Tensor) -> float:
    sizes = torch.linalg.eigvalsh(matrix).abs()
    return float(sizes.max() / sizes.min())
