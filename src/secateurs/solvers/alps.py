"""ALPS: the mask by ADMM with a growing penalty, then the weights by conjugate gradients (Meng et al. 2024).

arXiv 2406.07831, algorithm 1. With columns scaled to equal energy (G, damped, unit diagonal) and the scaled weight B₀:

    B ← (B₀·G - V + ρD)·(G + ρI)⁻¹,    D ← the highest of |B + V/ρ|,    V ← V + ρ(B - D).

With D₋ the D and ρ₋ the ρ of the iteration before, V = (B₀ - B)·G - ρ₋(D - D₋), so that the first is

    B ← B - (B - D - (ρ₋/ρ)(D - D₋))·ρ(G + ρI)⁻¹:

one product with a matrix that lasts until ρ changes, in place of two through the eigenvectors, and one whose rounding
errors in float32 are those of a small step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.comparison import Comparison
from ..core.errors import OptionError
from .least_squares import descend
from .obs import check_layer
from .problem import Problem, pose, positive
from .solved import Solved

__all__ = ["alps"]

# The released code's: how often the support is looked at, how large a change of it is, and what ρ then does.
_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_SEARCH = 5.0
_HIGHEST = 1e6
_PATIENCE, _SETTLED = 30, 3e-4


def alps(
    weight: Tensor,
    hessian: Tensor,
    comparison: Comparison,
    *,
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
    steps: int = 10,
    dtype: torch.dtype = torch.float32,
    where: str = "the layer",
) -> Solved:
    """The pruned matrix, with a mask that ADMM settled on and weights that are close to the best on it.

    The first mask, that of |w|·√H_jj, is given the same last steps and taken where its error is smaller: where inputs
    hardly correlate it is the best there is, and a small ρ leads away from it. The released code does not look back.

    Where nothing goes, the weight comes back to the bit. A column that met only zeros is the first to go, and what must
    stay of it keeps its weights. Defaults are those of the released code.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], of the inputs, not damped; a constant factor does not matter.
        comparison: what competes, and how much goes.
        damping: see `factor`; 0.01.
        rho: ρ at the start, 0.1. Every third iteration it grows by 1.3, 1.2 or 1.1 after a change of the support by
            more than 0.1, more than 0.005 or less of its size; before the first change above 0.005 it falls by 5
            instead, and the iteration starts again. It is over when nothing changes, or little after 30 iterations.
        iterations: at most, 300.
        steps: of conjugate gradients at the end, 10.
        dtype: of the iterations; the eigenvectors are computed in float64.
        where: the layer, for messages.

    Raises:
        OptionError: numbers outside their range, or sizes that do not fit.
        ModelError: NaN or infinite entries, or a hessian that no damping makes positive definite; see `factor`.
    """
    check_layer(weight, hessian, where)
    comparison.check(weight, where)
    if not rho > 0:
        raise OptionError(f"rho must be positive, got {rho}.")
    problem = pose(weight, positive(hessian, damping, where), hessian.diagonal() == 0, dtype)
    first = comparison.keep(problem.target.abs())
    if bool(first.all()):
        return problem.answer(problem.target, first)
    dense = _search(problem, comparison, first, rho, iterations)
    mask = comparison.keep(dense.abs())
    made = descend(problem, dense * mask, mask, steps)
    plain = descend(problem, problem.target * first, first, steps)
    if _error(problem, plain) < _error(problem, made):
        return problem.answer(plain, first)
    return problem.answer(made, mask)


def _error(problem: Problem, made: Tensor) -> float:
    """The squared error under the damped hessian, up to the scale that the problem has lost."""
    gap = problem.target - made
    return float((gap @ problem.gram.to(gap) * gap).sum(dtype=torch.float64))


def _search(problem: Problem, comparison: Comparison, first: Tensor, rho: float, iterations: int) -> Tensor:
    """B of the last iteration, scaled; `first` is the mask to start from."""
    target = problem.target
    kept = max(int(first.sum()), 1)
    shrink = _shrinking(problem.gram, target)
    step, found = shrink(rho), False
    dense, pruned, dual, measured = target, target * first, torch.zeros_like(target), first
    gap = dense - pruned
    for turn in range(1, iterations + 1):
        dense = step(dense, gap)
        raised = torch.add(dense, dual, alpha=1 / rho)
        support = comparison.keep(raised.abs())
        before, pruned = pruned, raised.mul_(support)
        gap, moved = dense - pruned, (pruned - before).mul_(rho)
        dual.add_(gap, alpha=rho)
        if turn % _EVERY == 0:
            changed = int((support ^ measured).sum())
            measured, found = support, found or changed > 0.005 * kept
            if found and not changed:
                break
            rho = min(rho * _growth(changed / kept), _HIGHEST) if found else rho / _SEARCH
            if changed and not found:
                dense, pruned, dual = target, target * first, torch.zeros_like(target)
                gap, moved = dense - pruned, torch.zeros_like(target)
            if turn > _PATIENCE and changed < _SETTLED * kept:
                break
            step = shrink(rho)
        gap.sub_(moved, alpha=1 / rho)
    return dense


def _growth(changed: float) -> float:
    return next(factor for share, factor in _GROWTH if changed > share)


def _shrinking(gram: Tensor, like: Tensor) -> Callable[[float], Callable[[Tensor, Tensor], Tensor]]:
    """By ρ, the function of B and B - D that gives B - (B - D)·ρ(G + ρI)⁻¹."""
    values, vectors = torch.linalg.eigh(gram)
    narrow = vectors.to(like)
    columns, rows = len(values), len(like)

    def at(rho: float) -> Callable[[Tensor, Tensor], Tensor]:
        shares = (rho / (values.clamp(min=0) + rho)).to(like)
        if columns > _EVERY * rows:  # Two thin products cost less than the matrix.
            return lambda dense, gap: torch.addmm(dense, (gap @ narrow) * shares, narrow.T, alpha=-1)
        matrix = (narrow * shares) @ narrow.T
        return lambda dense, gap: torch.addmm(dense, gap, matrix, alpha=-1)

    return at
