"""Scores of the entries of a matrix from its inputs: what masks are chosen by when no weight is moved."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import OptionError

__all__ = ["relative_importance", "wanda_scores"]


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """|w_ij|·‖x_j‖, float32 or wider [rows, columns] (Sun et al. 2024, arXiv 2306.11695, equation 1).

    Args:
        weight: [rows, columns].
        norm: [columns], of the inputs.
    """
    sizes = _sizes(weight)
    # In one dtype: a product of two would pass through copies in the wider.
    return sizes.mul_(norm.to(sizes))


def relative_importance(weight: Tensor, norm: Tensor, power: float = 0.5) -> Tensor:
    """(|w_ij|/Σ_i|w_ij| + |w_ij|/Σ_j|w_ij|)·‖x_j‖^power (Zhang et al. 2024, equation 4): float32 or wider, like W.

    Args:
        weight: [rows, columns].
        norm: [columns], of the inputs.
        power: of the norm (0.5); 0 is the relative importance alone.

    Raises:
        OptionError: a negative power.
    """
    if not 0 <= power < float("inf"):
        raise OptionError(f"power must be at least 0, got {power}.")
    sizes = _sizes(weight)
    tiny = torch.finfo(sizes.dtype).tiny
    shares = sizes / sizes.sum(0, keepdim=True).clamp(min=tiny) + sizes / sizes.sum(1, keepdim=True).clamp(min=tiny)
    return shares.mul_(norm.to(shares).pow(power))


def _sizes(weight: Tensor) -> Tensor:
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
