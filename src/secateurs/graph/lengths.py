"""Weight norm: a weight is a direction times a length, and a cut keeps the weights, not the lengths.

Where some of a direction's entries go, those that stay would grow until the direction has the old length again. So the
length shrinks by as much as its direction does. Along the axis that the lengths run over, the direction itself has no
say: a unit is zero if its length is, and zeros in its direction would be divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["WeightNorm", "adjusted", "weight_norms"]


@dataclass(frozen=True)
class WeightNorm:
    """A weight norm by the qualified names of its parameters.

    Args:
        length, direction: the parameters.
        axis: that of the direction with a length for each position; -1 where one length is for all.
    """

    length: str
    direction: str
    axis: int


def weight_norms(model: nn.Module) -> Iterator[WeightNorm]:
    """The weight norms (`torch.nn.utils.parametrizations.weight_norm`) of a model."""
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], _WeightNorm):
            yield WeightNorm(f"{path}.original0", f"{path}.original1", module[0].dim)


def adjusted(model: nn.Module, left: Callable[[WeightNorm, Tensor], Tensor]) -> dict[str, Tensor]:
    """The lengths for which all weights that stay have the values they had, by name; none where all of them stay.

    Args:
        left: of a weight norm and its direction that direction without what goes, itself if all of it stays; along
            `axis` nothing goes.
    """
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for norm in weight_norms(model):
            whole = model.get_parameter(norm.direction)
            less = left(norm, whole)
            if less is not whole:
                share = torch.norm_except_dim(less, 2, norm.axis) / torch.norm_except_dim(whole, 2, norm.axis)
                found[norm.length] = model.get_parameter(norm.length).detach() * share
    return found
