"""ExactOBS: in every row of a matrix the weight that costs least goes, the row makes up for it, and so on.

Frantar, Singh and Alistarh 2022, arXiv 2208.11580. The inverse hessian of a row after t removals is C_t = C - Σ v·vᵀ
over its t pivot columns v = C_s[:, q]/√C_s[q, q]. They are all that is held of it, with the diagonal: a row of c
columns that loses k takes c·k numbers and c·k² operations in place of c² and c²·k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.batch import double
from ..core.budget import units_kept
from ..core.comparison import Comparison
from ..core.select import top
from .obs import check_layer, factor
from .solved import Solved

__all__ = ["exact_obs"]

# Numbers of pivot columns that are held at a time, over the rows that are worked on together: 256 MiB in float64.
_HELD = 2**25


def exact_obs(
    weight: Tensor,
    hessian: Tensor,
    comparison: Comparison,
    *,
    damping: float = 0.01,
    where: str = "the layer",
) -> Solved:
    """`weight` with each removal the cheapest in its row as that row is by then, and `loss`, the sum of their costs.

    A removal costs ½·w_q²/C_qq, which is by how much the error grows. Within rows each loses the same number. Within
    the matrix every row is taken down to nothing and the cheapest steps of all rows are made; a step behind a dearer
    one of its row counts as dear as that, for it cannot be had without. Of a pattern, a group that has lost its share
    loses no more. Everything is in float64; rows·columns³/2 operations within the matrix.

    Columns that met only zeros cost nothing and so go first; those that need not go keep their weights.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], not damped.
        comparison: how many go, and what is compared.
        damping: see `factor`.
        where: the layer, for messages.

    Raises:
        OptionError: sizes that do not fit, or a pattern that does not divide the columns.
        ModelError: NaN or infinite numbers, or a hessian that no damping makes positive definite.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> made = exact_obs(torch.tensor([[1.0, 0.9]]), h, Comparison(0.5), damping=0)
    >>> made.weight, round(made.loss, 4)
    (tensor([[1.4500, 0.0000]]), 0.6075)
    """
    check_layer(weight, hessian, where)
    comparison.check(weight, where)
    root = factor(hessian, share=damping, where=where)
    spread = torch.cholesky_inverse(root)
    wide = double(weight).to(root.device)
    live = wide.masked_fill(hessian.diagonal().to(root.device) == 0, 0)
    # No diagonal entry of an inverse is below the inverse of the matrix's own, whatever rounding says.
    order, costs = _removals(live, spread, 1 / root.square().sum(1), comparison)
    counts = _counts(costs, comparison, wide.numel())
    made, mask = wide.clone(), torch.ones_like(wide, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        gone = order[row, :count]
        mask[row, gone] = False
        made[row] -= _change(live[row], spread, gone)
    taken = torch.arange(costs.shape[1], device=costs.device) < counts[:, None]
    made.masked_fill_(~mask, 0)
    return Solved(made.to(weight), mask.to(weight.device), float(costs[taken].sum()))


def _removals(weight: Tensor, spread: Tensor, floors: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
    """For every row its columns in the order in which they go, and what each costs: both [rows, steps]."""
    columns = weight.shape[1]
    size, quota = columns, columns
    if comparison.pattern is not None:
        size = comparison.pattern.of
        quota = round(comparison.removed * size)
        steps = columns // size * quota
    elif comparison.within == "row":
        steps = columns - units_kept(comparison.sparsity, columns)
    else:
        steps = min(columns, weight.numel() - units_kept(comparison.sparsity, weight.numel()))
    held = max(_HELD // max(steps * columns, 1), 1)
    parts = [_greedy(some, spread, floors, steps, size, quota) for some in weight.split(held)]
    return torch.cat([order for order, _ in parts]), torch.cat([costs for _, costs in parts])


def _greedy(weight: Tensor, spread: Tensor, floors: Tensor, steps: int, size: int, quota: int) -> tuple[Tensor, Tensor]:
    """`_removals` of rows that fit into memory, with at most `quota` from every `size` consecutive columns."""
    rows, columns = weight.shape
    each = torch.arange(rows, device=weight.device)
    left, diagonal = weight.clone(), spread.diagonal().repeat(rows, 1)
    pivots = weight.new_empty(rows, steps, columns)
    lost = each.new_zeros(rows, columns // size)
    closed = torch.zeros_like(weight, dtype=torch.bool)
    order, costs = each.new_empty(rows, steps), weight.new_empty(rows, steps)
    for t in range(steps):
        prices = (left.square() / diagonal).masked_fill_(closed, torch.inf)
        # Of equals the earlier stays, and `argmin` finds the first.
        q = columns - 1 - prices.flip(1).argmin(1)
        order[:, t], costs[:, t] = q, prices[each, q] / 2
        scale = diagonal[each, q].sqrt()[:, None]
        past = torch.bmm(pivots[each, :t, q][:, None], pivots[:, :t])[:, 0]
        pivot = (spread[q] - past) / scale
        pivots[:, t] = pivot
        left -= left[each, q][:, None] / scale * pivot
        diagonal = torch.maximum(diagonal - pivot.square(), floors)
        group = q // size
        lost[each, group] += 1
        closed[each, q] = True
        closed.view(rows, -1, size)[each, group] |= (lost[each, group] >= quota)[:, None]
    return order, costs


def _counts(costs: Tensor, comparison: Comparison, total: int) -> Tensor:
    """How many of its steps each row takes: [rows]."""
    if comparison.pattern is not None or comparison.within == "row":
        return costs.new_full(costs.shape[:1], costs.shape[1], dtype=torch.int64)
    if not costs.numel():
        return costs.new_zeros(costs.shape[:1], dtype=torch.int64)
    # A row's cheap step behind a dear one is to be had only with that.
    stays = top(costs.cummax(1).values, costs.numel() - total + units_kept(comparison.sparsity, total))
    return (~stays).sum(1)


def _change(row: Tensor, spread: Tensor, gone: Tensor) -> Tensor:
    """w_S·(C_SS)⁻¹·C_S,: for one row: [columns]."""
    root = torch.linalg.cholesky(spread[gone][:, gone])
    return torch.cholesky_solve(row[gone, None], root)[:, 0] @ spread[gone]
