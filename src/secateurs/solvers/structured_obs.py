"""Structured OBS: whole groups of columns of a matrix go, the cheapest first, and all other columns make up for them.

The step of ZipLM (Kurtic, Frantar and Alistarh 2023, arXiv 2302.04089, equations 2 and 3). One inverse serves all rows,
and it follows every removal, so that of two equal structures the second becomes dear once the first has gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.batch import double
from ..core.errors import OptionError
from .obs import check_layer, inverse
from .problem import positive

__all__ = ["Level", "structured_obs"]

# Columns that go before the inverse is computed anew from the hessian of those that are left: until then the pivot
# columns of those that went are held beside it.
_REFRESH = 256


@dataclass(frozen=True, eq=False)
class Level:
    """A matrix without some of its structures.

    Args:
        removed: the structures that went, in the order in which they went.
        weight: [rows, columns], in the dtype of what was given; exactly zero in the columns of those structures.
        loss: ½·tr((W - W')·H·(W - W')ᵀ) for the hessian as it was damped: the sum of what the removals cost.
    """

    removed: tuple[int, ...]
    weight: Tensor
    loss: float


def structured_obs(
    weight: Tensor,
    hessian: Tensor,
    structures: Tensor,
    counts: Sequence[int],
    *,
    damping: float = 0.01,
    where: str = "the layer",
) -> list[Level]:
    """One level for each of `counts`, all from one pass: `weight` after so many structures went one by one.

    A structure S costs ½·tr(W_S·(C_SS)⁻¹·W_Sᵀ) over all rows, with C the inverse hessian and W as they are by then. The
    cheapest goes (of equals the later), W ← W - W_S·(C_SS)⁻¹·C_S,:, and C follows. After any number of removals W is
    the least-squares fit on the columns that are left. Everything is in float64. Columns in no structure stay and help.

    Columns that met only zeros cost nothing; while their structure stays they keep their weights.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], not damped.
        structures: integers [structures, size], the columns of each; no column twice.
        counts: how many structures go, ascending, each 0 … structures.
        damping: see `factor`.
        where: the layer, for messages.

    Raises:
        OptionError: sizes, structures or counts that do not fit.
        ModelError: NaN or infinite numbers, or a hessian that no damping makes positive definite.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> levels = structured_obs(torch.tensor([[1.0, 0.9]]), h, torch.tensor([[0], [1]]), [0, 1, 2], damping=0)
    >>> [level.removed for level in levels], levels[1].weight
    ([(), (1,), (1, 0)], tensor([[1.4500, 0.0000]]))
    """
    check_layer(weight, hessian, where)
    _check_structures(structures, weight.shape[1], where)
    _check_counts(counts, len(structures), where)
    matrix = positive(hessian, damping, where)
    dead = hessian.diagonal().to(matrix.device) == 0
    wide = double(weight).to(matrix.device)
    columns = structures.to(matrix.device, torch.int64)
    passing = _Pass(wide.masked_fill(dead, 0), matrix, columns, where)
    idle = wide.masked_fill(~dead, 0)
    removed: list[int] = []
    losses = 0.0
    levels = []
    for count in counts:
        while len(removed) < count:
            chosen, cost = passing.remove()
            removed.append(chosen)
            losses += cost
        made = passing.matrix() + idle
        made[:, columns[removed].flatten()] = 0
        levels.append(Level(tuple(removed), made.to(weight) if removed else weight.clone(), losses))
    return levels


class _Pass:
    """The structures that are left, between one refresh of the inverse and the next.

    The columns of the matrix are laid out structure by structure, then those in no structure.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, structures: Tensor, where: str) -> None:
        self.where = where
        self.hessian = hessian
        self.structures = structures
        self.names = torch.arange(len(structures), device=weight.device)
        loose = torch.ones_like(hessian[0], dtype=torch.bool)
        loose[structures.flatten()] = False
        self.columns = torch.cat([structures.flatten(), loose.nonzero()[:, 0]])
        # A column in one piece: [columns, rows].
        self.weight = weight.T[self.columns].contiguous()
        self._invert()

    def remove(self) -> tuple[int, float]:
        """The structure that costs least, and its cost; it is gone, and the others have made up for it."""
        if self.held >= _REFRESH:
            self._refresh()
        roots = self._roots()
        prices = self._prices(roots).masked_fill_(self.gone, torch.inf)
        # Of equals the earlier stays, and `argmin` finds the first.
        k = len(prices) - 1 - int(prices.flip(0).argmin())
        self._take(k, roots[k])
        return int(self.names[k]), float(prices[k] / 2)

    def matrix(self) -> Tensor:
        """[rows, columns], in the order of the columns that was given."""
        out = self.weight.new_zeros(self.weight.shape[1], len(self.hessian))
        out[:, self.columns] = self.weight.T
        return out

    @property
    def size(self) -> int:
        return self.structures.shape[1]

    def _prices(self, roots: Tensor) -> Tensor:
        inside = self.weight[: len(self.names) * self.size].view(len(self.names), self.size, -1)
        if self.size == 1:
            norms: Tensor = torch.linalg.vector_norm(inside[:, 0], dim=1)
            return (norms / roots[:, 0, 0]).square_()
        steps: Tensor = torch.linalg.solve_triangular(roots, inside, upper=False)
        return steps.square_().sum((1, 2))

    def _take(self, k: int, root: Tensor) -> None:
        columns = slice(k * self.size, (k + 1) * self.size)
        held = self.pivots[: self.held]
        cross = self.spread[columns].addmm(held[:, columns].T, held, alpha=-1)
        pivot = torch.linalg.solve_triangular(root, cross, upper=False)
        step = torch.linalg.solve_triangular(root, self.weight[columns], upper=False)
        self.weight.addmm_(pivot.T, step, alpha=-1)
        inside = pivot[:, : len(self.names) * self.size].view(self.size, -1, self.size).permute(1, 2, 0)
        self.blocks -= inside @ inside.mT
        self.pivots[self.held : self.held + self.size] = pivot
        self.held += self.size
        self.gone[k] = True
        # Exactly so, and a block with a factor of its own.
        self.weight[columns] = 0
        self.blocks[k] = torch.eye(self.size).to(self.blocks)

    def _roots(self) -> Tensor:
        """The Cholesky factors of all C_SS."""
        roots: Tensor
        roots, failed = torch.linalg.cholesky_ex(self.blocks)
        if bool(failed.any()):
            # Rounding has eaten what little curvature there is; afresh, the blocks are those of a definite matrix.
            self._refresh()
            roots = torch.linalg.cholesky(self.blocks)
        return roots

    def _refresh(self) -> None:
        stays = torch.ones_like(self.columns, dtype=torch.bool)
        stays[: self.gone.numel() * self.size] = ~self.gone.repeat_interleave(self.size)
        self.names = self.names[~self.gone]
        self.columns, self.weight = self.columns[stays], self.weight[stays]
        self._invert()

    def _invert(self) -> None:
        """C from the hessian of what is left."""
        left = self.hessian[self.columns][:, self.columns]
        self.spread = inverse(left, share=0, where=self.where, in_place=True)
        m = len(self.names)
        grid = torch.arange(m * self.size, device=left.device).view(m, self.size)
        self.blocks = self.spread[grid[:, :, None], grid[:, None]]
        self.gone = torch.zeros_like(self.names, dtype=torch.bool)
        self.pivots = left.new_empty(_REFRESH + self.size, len(left))
        self.held = 0


def _check_structures(structures: Tensor, columns: int, where: str) -> None:
    whole = structures.dim() == 2 and not structures.is_floating_point() and structures.dtype != torch.bool
    if not whole or not structures.shape[1]:
        raise OptionError(
            f"structures must be integers [structures, size] of at least 1 column each; got {structures.dtype} "
            f"{list(structures.shape)} for {where}."
        )
    found = structures.flatten()
    if bool(((found < 0) | (found >= columns)).any()) or len(found.unique()) < len(found):
        raise OptionError(f"structures must name columns 0 to {columns - 1} of {where}, each at most once.")


def _check_counts(counts: Sequence[int], structures: int, where: str) -> None:
    rising = all(before < after for before, after in itertools.pairwise(counts))
    if not rising or any(not 0 <= count <= structures for count in counts):
        raise OptionError(
            f"counts must rise, each at least 0 and at most the {structures} structures of {where}; got {list(counts)}."
        )
