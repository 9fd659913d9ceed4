"""What a layer-wise solver gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Solved"]


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned matrix.

    Args:
        weight: [rows, columns], in the dtype of what was given; exactly zero where the mask is False.
        mask: bool [rows, columns], what stays; a weight that stays may happen to be zero.
        loss: ½·tr((W - W')·H·(W - W')ᵀ) for the hessian as it was damped; None where the solver has it not for free.
        scores: [rows, columns], what the mask was chosen by; None unless asked for.
    """

    weight: Tensor
    mask: Tensor
    loss: float | None = None
    scores: Tensor | None = None
