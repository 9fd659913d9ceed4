"""The scale of the normalisation layer behind a channel: network slimming."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .evidence import values
from .lifting import Lift
from .registry import criterion

__all__ = ["norm_scale"]


@criterion(
    "norm-scale",
    groups=("channel",),
    lift=Lift(tensors="norms", normalize="none"),
    fixed=("tensors",),
    paper="Liu et al. 2017, arXiv 1708.06519",
)
def norm_scale(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """|gamma| of the batch, instance, group, layer or root-mean-square normalisation that a channel runs through.

    Only scales of `torch.nn` layers and their subclasses count. A group without one is refused: its channels have no
    such score. Where several norms carry the channel (a residual stream) their mean counts (option `combine`). Not
    normalised over the group, as the paper compares gamma over the whole network.
    """
    return {name: gamma.abs() for name, gamma in values(model, names).items()}
