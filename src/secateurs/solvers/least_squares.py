"""The best weights on a support that is already chosen: exactly, row by row, and cheaply, by conjugate gradients.

With M the support S of each row, min ½·tr((W - W')·H·(W - W')ᵀ) has the solution W'_S = (W·H)_S·(H_SS)⁻¹. Both
solvers look for the correction W'_S - W_S, which is driven only by what was removed: a row that lost nothing, and a
column that met only zeros, keep their weights to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.batch import double
from .obs import check_layer
from .problem import Problem, check_mask, pose, positive

__all__ = ["conjugate_gradients", "descend", "least_squares"]

# Numbers of the systems that are held at a time: 128 MiB in float64.
_CHUNK = 2**24


def least_squares(
    weight: Tensor, hessian: Tensor, mask: Tensor, *, damping: float = 1e-8, where: str = "the layer"
) -> Tensor:
    """The weights of least error on the support `mask`, W'_S = (W·H)_S·(H_SS)⁻¹: [rows, columns], its dtype.

    Exact, in float64. Rows with one support are solved together, as those of a removed column are; else each row
    costs the cube of its support. Memory: 256 MiB beside the matrices, or two systems where one is larger than that.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], of the inputs, not damped; a constant factor does not matter.
        mask: bool [rows, columns], what stays.
        damping: see `damped`. So small (1e-8) it only decides, for the least change, where the inputs leave a choice;
            0 refuses such inputs.
        where: the layer, for messages.

    Raises:
        OptionError: sizes that do not fit.
        ModelError: NaN or infinite entries, or a hessian that no damping makes positive definite; see `factor`.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> least_squares(torch.ones(1, 2), h, torch.tensor([[True, False]]))
    tensor([[1.5000, 0.0000]])
    """
    check_layer(weight, hessian, where)
    check_mask(weight, mask, where)
    matrix = positive(hessian, damping, where)
    kept, wide = mask.to(matrix.device), double(weight).to(matrix.device)
    push = wide.masked_fill(kept, 0) @ matrix
    supports, of_row = kept.unique(dim=0, return_inverse=True)
    if 2 * len(supports) <= len(kept):
        shift = _together(matrix, push, supports, of_row)
    else:
        shift = _apart(matrix, push, kept)
    return torch.where(kept, wide + shift, 0).to(weight)


def conjugate_gradients(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    *,
    steps: int = 10,
    damping: float = 1e-8,
    dtype: torch.dtype = torch.float32,
    where: str = "the layer",
) -> Tensor:
    """`least_squares`, approached in `steps` products with the hessian: [rows, columns], the weight's dtype.

    Conjugate gradients on the support from the weights that stay, with columns scaled to equal energy; the damped error
    falls with each step (ALPS, Meng et al. 2024, arXiv 2406.07831, section 3.3).

    Args:
        weight, hessian, mask, where: see `least_squares`, which also says what is raised.
        steps: 10, as ALPS.
        damping: see `damped`; 1e-8.
        dtype: of the iterations.
    """
    check_layer(weight, hessian, where)
    check_mask(weight, mask, where)
    matrix = positive(hessian, damping, where)
    problem = pose(weight, matrix, hessian.diagonal() == 0, dtype)
    kept = mask.to(matrix.device)
    return problem.answer(descend(problem, problem.target * kept, kept, steps), kept).weight


def descend(problem: Problem, start: Tensor, mask: Tensor, steps: int) -> Tensor:
    """`steps` of conjugate gradients from `start`, zero outside `mask`, to the best weights on it: scaled, as `start`.

    Each row has step sizes of its own, as it is a system of its own; the residual is multiplied by the mask.
    """
    gram = problem.gram.to(start)
    made, support = start, mask.to(start)
    residual = (problem.target - start) @ gram * support
    direction, energy = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ gram
        length = energy / _nonzero((direction * image).sum(1, keepdim=True))
        made = made + length * direction
        residual = residual - length * (image * support)
        energy, before = residual.square().sum(1, keepdim=True), energy
        direction = residual + energy / _nonzero(before) * direction
    return made


def _nonzero(values: Tensor) -> Tensor:
    """1e-8 for what is exactly 0, as in ALPS's code: a row that is solved moves no more."""
    return values.masked_fill(values == 0, 1e-8)


def _together(matrix: Tensor, push: Tensor, supports: Tensor, of_row: Tensor) -> Tensor:
    """The corrections [rows, columns] where few supports are shared by many rows: one factorisation a support."""
    shift = torch.zeros_like(push)
    for number, support in enumerate(supports):
        rows, columns = (of_row == number).nonzero(), support.nonzero()[:, 0]
        factor = torch.linalg.cholesky(matrix[columns][:, columns])
        shift[rows, columns] = torch.cholesky_solve(push[rows, columns].T, factor).T
    return shift


def _apart(matrix: Tensor, push: Tensor, kept: Tensor) -> Tensor:
    """The corrections [rows, columns] where each row has a support of its own: batches of systems of equal size."""
    shift = torch.zeros_like(push)
    # The support's columns first, in order; behind them come others, up to the longest support of the batch.
    order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    sizes = kept.sum(1)
    for rows in _batches(sizes):
        columns = order[rows, : int(sizes[rows].max())]
        real = kept[rows].gather(1, columns)
        systems = matrix[columns[:, :, None], columns[:, None, :]]
        systems.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).add_((~real).to(systems))
        known = push[rows].gather(1, columns).masked_fill_(~real, 0)
        found = torch.cholesky_solve(known[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
        shift[rows] = shift[rows].scatter(1, columns, found)
    return shift


def _batches(sizes: Tensor) -> Iterator[Tensor]:
    """Numbers of rows whose systems fit into one chunk when padded to the largest, by falling size."""
    falling = sizes.argsort(descending=True, stable=True)
    lengths = sizes[falling].tolist()
    start = 0
    while start < len(lengths) and lengths[start]:
        stop = start + max(_CHUNK // lengths[start] ** 2, 1)
        yield falling[start:stop]
        start = stop
