"""A layer as an iterative solver wants it: checked, positive definite, and with columns that all weigh the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.batch import double
from ..core.errors import OptionError
from .obs import damp, factored, owned
from .solved import Solved
from .triangle import mirror

__all__ = ["Problem", "check_mask", "pose", "positive"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight and a hessian with columns divided by √H_jj, so that the hessian's diagonal is 1.

    Args:
        weight: [rows, columns], as it was given.
        target: the same times `norms`, in the dtype of the iterations; 0 in the columns that met only zeros, which
            cost nothing and so are the first to go.
        gram: float64 [columns, columns], with 1 on its diagonal.
        norms: float64 [columns], √H_jj as a share of their root mean square, so that no scale of H is left.
        dead: bool [columns], those that met only zeros.
    """

    weight: Tensor
    target: Tensor
    gram: Tensor
    norms: Tensor
    dead: Tensor

    def answer(self, scaled: Tensor, mask: Tensor) -> Solved:
        """`scaled` on `mask` in the units of the weight; what stays in a dead column stays as it was."""
        if bool(mask.all()):
            return Solved(self.weight.clone(), mask.to(self.weight.device))
        plain = torch.where(self.dead, double(self.weight).to(scaled.device), scaled.double() / self.norms)
        made = torch.where(mask, plain, 0)
        return Solved(made.to(self.weight), mask.to(self.weight.device))


def pose(weight: Tensor, matrix: Tensor, dead: Tensor, dtype: torch.dtype) -> Problem:
    """The problem with scaled columns.

    Args:
        weight: [rows, columns].
        matrix: float64 [columns, columns], a hessian whose diagonal is positive, as `damped` makes it; it becomes the
            problem's own and is scaled in place.
        dead: bool [columns], where the hessian that was given has 0 on its diagonal.
        dtype: of the iterations, float32 or float64.
    """
    dead = dead.to(matrix.device)
    norms = matrix.diagonal().sqrt()
    gram = matrix.div_(norms).div_(norms[:, None])
    # Without the dead columns, whose norm is 1 by convention and would be a scale of its own.
    shares = (norms / norms[~dead].square().mean().sqrt()).masked_fill(dead, 1)
    target = (double(weight).to(matrix.device) * shares).masked_fill(dead, 0)
    return Problem(weight, target.to(dtype), gram, shares, dead)


def positive(hessian: Tensor, share: float = 0.01, where: str = "the layer") -> Tensor:
    """`damped(hessian, share)`, or the first rung of the ladder of `factor` that is positive definite: float64.

    Raises:
        ModelError: as `factor`.
    """
    matrix = mirror(owned(hessian))
    with factored(matrix, share=share, where=where) as enough:
        pass
    return damp(matrix, enough)


def check_mask(weight: Tensor, mask: Tensor, where: str) -> None:
    """None; refuses a mask that is not bool, or not of the weight's shape.

    Raises:
        OptionError: names the layer.
    """
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise OptionError(
            f"a mask must be bool {list(weight.shape)}, as the weight of {where}; got {mask.dtype} {list(mask.shape)}."
        )
