"""Importance of a frozen weight from the adapter beside it: no gradient of the weight itself is ever made.

LoRAPrune: Zhang et al., Findings of ACL 2024, arXiv 2305.18403. With A [rank, inputs] and B [outputs, rank] of an
adapter and their gradients, a step of size one would change the product B·A by -Ĝ,

    Ĝ = gB·A + B·gA - gB·gA,    B·A - (B - gB)·(A - gA) = Ĝ,                                                         (1)

and Ĝ stands for the gradient of the weight: I = |Ĝ ⊙ (W + s·B·A)|. Where B = 0, Ĝ = s·G·AᵀA, with G that gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.units import Cache, ChannelGroup
from .lifting import Lift, lifted

__all__ = ["EPSILON", "guided_gradient", "importance", "unit_scores"]

# Added to the norm by which a matrix's scores are divided (the released code).
EPSILON = 1e-8


def guided_gradient(down: Tensor, up: Tensor, down_gradient: Tensor, up_gradient: Tensor) -> Tensor:
    """Ĝ of (1): [outputs, inputs], in the dtype of the factors.

    Args:
        down, down_gradient: A and gA [rank, inputs].
        up, up_gradient: B and gB [outputs, rank].

    >>> one = torch.ones(1, 1)
    >>> guided_gradient(3 * one, 2 * one, one, one).item()
    4.0
    """
    # Two products in place of three: gB·(A - gA) + B·gA.
    return up_gradient @ (down - down_gradient) + up @ down_gradient


def importance(gradient: Tensor | None, weight: Tensor, change: Tensor) -> Tensor:
    """|gradient ⊙ (weight + change)|: [outputs, inputs], in float32 or wider.

    Args:
        gradient: of the weight, or what stands for it; None for ones, which gives magnitudes.
        weight: frozen.
        change: what the adapter adds to it, s·B·A.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(wide) + change.to(wide)
    return (whole if gradient is None else whole * gradient.to(wide)).abs()


def unit_scores(group: ChannelGroup, saliency: Mapping[str, Tensor], cache: Cache | None = None) -> Tensor:
    """One score a unit, float [units]: sums over its entries in each matrix, divided there by their L2 norm, added up.

    Args:
        group: its members count whose tensors are in `saliency`: rows where a matrix makes the units, columns where
            it consumes them.
        saliency: per parameter a tensor of its shape.
        cache: shared by the groups of one call; see `Group.lift`.
    """
    made = lifted(
        group, saliency, Lift(normalize="none", combine="sum"), finish=lambda sums: sums / (sums.norm() + EPSILON),
        cache=cache,
    )  # fmt: skip
    return torch.zeros(group.size) if made is None else made
