"""SparseGPT: one sweep over the columns of a matrix, each removed weight made up for by the columns to its right.

Frantar and Alistarh 2023, arXiv 2301.00774. With U the upper Cholesky factor of H⁻¹ the paper removes a weight of
column j at the price w_j²/U_jj² and subtracts e·U_j,: from its row, e = w_j/U_jj. The sum of these steps is
W - W' = E·U, and with R = U⁻ᵀ, lower triangular, H = Rᵀ·R and (W - W')·Rᵀ = E, which is zero where a weight stays. That
is forward substitution: with M = diag(R)⁻¹·R, a weight of column j that stays changes by minus the sum of M_ji times
what those of its row with i < j have changed by, and one that goes changes by itself. So no inverse is formed: one
Cholesky factor is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budget import units_kept
from ..core.comparison import Comparison
from ..core.errors import OptionError
from ..core.select import per_row, top
from .obs import check_layer, factored, owned
from .problem import check_mask
from .solved import Solved
from .triangle import turn

__all__ = ["sparsegpt"]

# Columns that are finished one by one before a matrix product carries their changes on.
_PANEL = 32


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    comparison: Comparison | None = None,
    *,
    mask: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
    where: str = "the layer",
    with_scores: bool = False,
    in_place: bool = False,
) -> Solved:
    """`weight` pruned by one sweep, with `loss` = ½·Σe², which is its whole error under the damped hessian.

    The mask of a block is chosen when the sweep reaches it, by w²/U_jj² of the weights as they are by then: over all
    rows or within each, for every block its share, so that the counts of the whole matrix are exact. Of a pattern, each
    group is chosen when its first column is reached. The factor is computed in float64, the sweep in the dtype of the
    weight, at least float32.

    Columns that met only zeros (H_jj = 0) have score 0, cost nothing and so go first; those that need not go keep their
    weights. SparseGPT's code zeroes them all, whatever was asked for.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], not damped.
        comparison: how many go, and what is compared; None with a mask.
        mask: bool [rows, columns], what stays, for the update alone.
        block: columns that are chosen together (128, the paper); with a pattern, a speed only.
        damping: see `factor`.
        where: the layer, for messages.
        with_scores: w²/U_jj² as the mask was chosen by (with a mask, as it would have been), in the sweep's dtype.
        in_place: work in the memory of the hessian, which is float64 and symmetric to the bit as a `Gram` has it, and
            leave it as it was; otherwise in a copy.

    Raises:
        OptionError: sizes that do not fit, a pattern that does not divide the columns, or not exactly one of
            `comparison` and `mask`.
        ModelError: NaN or infinite numbers, or a hessian that no damping makes positive definite.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> made = sparsegpt(torch.ones(1, 2), h, mask=torch.tensor([[False, True]]), damping=0)
    >>> made.weight, round(made.loss, 4)
    (tensor([[0.0000, 1.5000]]), 0.75)
    """
    check_layer(weight, hessian, where)
    _check_choice(weight, comparison, mask, block, where)
    pattern = None if comparison is None else comparison.pattern
    panel = _PANEL if pattern is None else pattern.of
    width = block if pattern is None else max(block // panel, 1) * panel
    dead = hessian.diagonal() == 0
    with _turned(hessian if in_place else owned(hessian)) as work, factored(work, share=damping, where=where):
        sweep = _begin(weight, dead, comparison, mask, work, with_scores)
        loss = sum(
            _sweep_block(sweep, a, min(a + width, weight.shape[1]), panel) for a in range(0, weight.shape[1], width)
        )
    scores = None if sweep.scores is None else sweep.scores.T.to(weight.device)
    # Rows and columns are exchanged in one pass each: arithmetic across memory is several times slower.
    kept = sweep.keep.T.contiguous().to(weight.device)
    change = sweep.change.T.contiguous().to(weight.device)
    # A sweep that removes nothing changes nothing, but -0.0 minus -0.0 is 0.0.
    nothing = bool(kept.all())
    made = weight.clone() if nothing else torch.sub(weight, change, out=change).masked_fill_(~kept, 0).to(weight)
    return Solved(made, kept, loss, scores)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """What is worked on, transposed so that a column lies in one piece: `change`, `keep`, `scores` [columns, rows].

    `change` is W in the columns not reached yet and W - W' in the others. R is the lower triangle of `root`, with rows
    and columns reversed, and `scale` its diagonal; `pivots` are 1/U_jj².
    """

    comparison: Comparison | None
    root: Tensor
    scale: Tensor
    pivots: Tensor
    change: Tensor
    keep: Tensor
    scores: Tensor | None

    def lower(self, a: int, b: int) -> Tensor:
        """M in the rows from a to b and the columns before b, in the dtype of `change`."""
        rows = slice(len(self.root) - b, len(self.root) - a)
        part = self.root[rows.start :, rows].tril() / self.scale[rows]
        return part.to(self.change.dtype).flip(0, 1).T


@contextmanager
def _turned(hessian: Tensor) -> Iterator[Tensor]:
    """Inside, the hessian has its rows and columns reversed: then Cholesky's L·Lᵀ is Rᵀ·R."""
    try:
        yield turn(hessian)
    finally:
        turn(hessian)


def _begin(
    weight: Tensor,
    dead: Tensor,
    comparison: Comparison | None,
    mask: Tensor | None,
    root: Tensor,
    with_scores: bool,
) -> _Sweep:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = torch.empty(weight.shape[::-1], dtype=dtype, device=root.device)
    change.copy_(weight.T)[dead.to(root.device)] = 0
    keep = torch.ones_like(change, dtype=torch.bool) if mask is None else mask.T.to(change.device).contiguous()
    scores = torch.empty_like(change) if with_scores else None
    scale = root.diagonal().clone()
    return _Sweep(comparison, root, scale, scale.flip(0).square(), change, keep, scores)


def _sweep_block(sweep: _Sweep, a: int, b: int, panel: int) -> float:
    """½·Σe² of the columns from a to b, after they are chosen and `change` is final there."""
    lower, change = sweep.lower(a, b), sweep.change
    by_group = sweep.comparison is not None and sweep.comparison.pattern is not None
    # What a column changes by if it stays, from those before the block; the columns of the block are added below.
    drift = (lower[:, :a] @ change[:a]).neg_()
    if not by_group:
        _choose(sweep, lower[:, a:], drift, a, b)
    for c in range(a, b, panel):
        d = min(c + panel, b)
        rows = lower[c - a : d - a]
        part = drift[c - a : d - a].addmm_(rows[:, a:c], change[a:c], alpha=-1)
        if by_group:
            _choose(sweep, rows[:, c:d], part, c, d)
        _finish(sweep, rows[:, c:d], part, c, d)
    # e·U_jj is 0 where a weight stays, and where it goes the value it had when its column was reached.
    squares = (change[a:b] - drift).square_().sum(1, dtype=torch.float64)
    return float((squares * sweep.pivots[a:b]).sum() / 2)


def _finish(sweep: _Sweep, corner: Tensor, drift: Tensor, c: int, d: int) -> None:
    """Makes `change` final in the columns from c to d, one after the other; `corner` is M there."""
    change = sweep.change
    for i in range(c, d):
        column = drift[i - c]
        if i > c:
            column.addmv_(change[c:i].T, corner[i - c, : i - c], alpha=-1)
        torch.where(sweep.keep[i], column, change[i], out=change[i])


def _choose(sweep: _Sweep, corner: Tensor, drift: Tensor, c: int, d: int) -> None:
    """Sets `keep` of the columns from c to d, where M is `corner`, by the weights that the columns before leave."""
    if sweep.comparison is None and sweep.scores is None:
        return
    change = sweep.change[c:d]
    # From the right, so that what comes back lies in memory as `change` does.
    moved = torch.linalg.solve_triangular(corner.T, drift.T, upper=True, left=False, unitriangular=True).T
    now = change - moved
    # |w|/U_jj ranks as its square does, and cannot overflow where that would.
    costs = now.abs_().mul_(sweep.pivots[c:d, None].sqrt().to(now.dtype))
    if sweep.scores is not None:
        torch.square(costs, out=sweep.scores[c:d])
    if sweep.comparison is not None:
        sweep.keep[c:d] = _highest(sweep.comparison, costs.T.contiguous(), c, d).T


def _highest(comparison: Comparison, scores: Tensor, c: int, d: int) -> Tensor:
    """The mask of the columns from c to d; counts are rounded so that those of all blocks add up to the matrix's."""
    if comparison.pattern is not None:
        return comparison.keep(scores)
    each = 1 if comparison.within == "row" else len(scores)
    k = units_kept(comparison.sparsity, each * d) - units_kept(comparison.sparsity, each * c)
    return per_row(scores, k) if comparison.within == "row" else top(scores, k)


def _check_choice(weight: Tensor, comparison: Comparison | None, mask: Tensor | None, block: int, where: str) -> None:
    if (comparison is None) == (mask is None):
        raise OptionError(
            f"give either a comparison or a mask for {where}; got {'neither' if mask is None else 'both'}."
        )
    if mask is not None:
        check_mask(weight, mask, where)
    if block < 1:
        raise OptionError(f"a block has at least 1 column, got {block}.")
    if comparison is not None:
        comparison.check(weight, where)
