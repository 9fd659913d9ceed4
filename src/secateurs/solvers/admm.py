"""L-ADMM: weights and mask in turn, with the mask growing on the way (Boža 2024, arXiv 2401.02938).

With columns scaled to equal energy (G, unit diagonal, plus damping), W₀ the scaled weight, Z the pruned copy and U
the scaled dual: Z = (W + U)∘M, U ← U + W - Z, W = (W₀·G + ρ·(Z - U))·(G + ρI)⁻¹. The answer is (W + U)∘M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.comparison import Comparison
from ..core.errors import OptionError
from .obs import check_layer, damped, inverse
from .problem import check_mask, pose
from .solved import Solved

__all__ = ["admm"]


def admm(
    weight: Tensor,
    hessian: Tensor,
    comparison: Comparison | None,
    *,
    mask: Tensor | None = None,
    iterations: int = 20,
    refreshes: int = 15,
    gradual: bool = True,
    damping: float = 0.1,
    rho: float = 1.0,
    dtype: torch.dtype = torch.float32,
    where: str = "the layer",
) -> Solved:
    """The pruned matrix after `iterations` of L-ADMM.

    One product of the matrix with an inverse an iteration. Where nothing goes, the weight comes back to the bit. A
    column that met only zeros is the first to go, and what must stay of it keeps its weights.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], of the inputs, not damped; a constant factor does not matter.
        comparison: what competes, and how much goes; None with a mask.
        mask: bool [rows, columns], what stays: then only the weights are moved. None to choose it.
        iterations: 20, as in the released code.
        refreshes: in how many of the first iterations the mask is chosen anew, 15; at least 1, at most all.
        gradual: 1 - (1 - t/refreshes)³ of the removals in refresh t. The released code computes this, and yet asks for
            all of them at once when the whole matrix competes: False is that.
        damping: share of the unit diagonal that is added to it, 0.1.
        rho: ρ, 1.
        dtype: of the iterations; the inverse is computed in float64.
        where: the layer, for messages.

    Raises:
        OptionError: both or none of comparison and mask, numbers outside their range, or sizes that do not fit.
        ModelError: NaN or infinite entries, or a hessian that damping does not make positive definite.
    """
    check_layer(weight, hessian, where)
    _check(weight, comparison, mask, iterations, refreshes, rho, where)
    problem = pose(weight, damped(hessian, 0.0), hessian.diagonal() == 0, dtype)
    pull = (problem.target.double() @ damped(problem.gram, damping)).to(dtype)
    # The scaled diagonal is 1, so that a share of its mean is the number itself.
    spread = inverse(problem.gram, share=damping + rho, where=where, in_place=True).to(dtype)
    dense, dual = problem.target, torch.zeros_like(problem.target)
    support = torch.ones_like(dense, dtype=torch.bool) if mask is None else mask.to(spread.device)
    for turn in range(1, iterations + 1):
        raised = dense + dual
        if comparison is not None and turn <= refreshes:
            progress = 1 - (1 - turn / refreshes) ** 3 if gradual else 1.0
            support = comparison.eased(progress).keep(raised.abs())
        pruned = raised * support
        dual = raised - pruned
        dense = (pull + rho * (pruned - dual)) @ spread
    return problem.answer(dense + dual, support)


def _check(
    weight: Tensor,
    comparison: Comparison | None,
    mask: Tensor | None,
    iterations: int,
    refreshes: int,
    rho: float,
    where: str,
) -> None:
    if (comparison is None) == (mask is None):
        raise OptionError("L-ADMM needs either a comparison, to choose a mask, or a mask to keep; give one of the two.")
    if comparison is not None:
        comparison.check(weight, where)
    if mask is not None:
        check_mask(weight, mask, where)
    if comparison is not None and not 1 <= refreshes <= iterations:
        raise OptionError(f"refreshes must lie between 1 and iterations ({iterations}), got {refreshes}.")
    if not rho > 0:
        raise OptionError(f"rho must be positive, got {rho}.")
