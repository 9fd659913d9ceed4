"""Neurons by what their consumers see of them: their norm alone, or their norm and their share of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import double
from ..core.units import ChannelGroup, reduce_units
from .consumers import Consumer, consumers, unit_scores
from .lifting import Lift, resolve, select
from .registry import criterion

__all__ = ["input_norm", "weight_aware"]


@criterion(
    "input-norm",
    kind="unit",
    groups=("channel",),
    needs=("data",),
    paper="Wang et al. 2025, arXiv 2409.13199, as released",
)
def input_norm(
    model: nn.Module, groups: Sequence[ChannelGroup], *, data: Sequence[Any], seed: int, power: float = 1.0
) -> dict[str, Tensor]:
    """||x_j||^power, with x_j what the layers that consume a unit see of it: the mean over its positions.

    The published score of a neuron multiplies this by shares of |W_down|, |W_up| and |W_gate|, each taken over the
    hidden size and then averaged over it, so that they cancel: whatever the weights, it is 3/d times this.

    Args:
        model, groups, data, seed: see `consumers.consumers`; norms are root mean squares over tokens.
        power: c of the paper, 1 by default. It never changes a ranking within a layer.
    """
    found = consumers(model, groups, data, seed=seed)
    return {g.name: unit_scores(g, found[g.name], lambda one: _norm(one).pow(power)) for g in groups}


@criterion(
    "weight-aware",
    kind="unit",
    groups=("channel",),
    needs=("data",),
    paper="after Wang et al. 2025, arXiv 2409.13199",
)
def weight_aware(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    data: Sequence[Any],
    seed: int,
    inner: float = 1.0,
    power: float = 1.0,
) -> dict[str, Tensor]:
    """||x_j||^power times the unit's mean shares of |w|·||x_j||^inner in its consumers and of |w| in its producers.

    The published score of a neuron with shares over neurons instead of over the hidden size, where they would
    cancel (see `input_norm`): |w_ij| over the sum of its row. A row of zeros has no shares and counts as zero.

    Args:
        model, groups, data, seed: see `consumers.consumers`.
        inner, power: b and c of the paper, 1 by default.
    """
    found = consumers(model, groups, data, seed=seed)
    scores: dict[str, Tensor] = {}
    for group in groups:
        norms = unit_scores(group, found[group.name], _norm)
        parts = [unit_scores(group, [one], lambda one: _input_share(one, inner)) for one in found[group.name]]
        parts += _output_shares(model, group)
        # Scores are reduced on the device of the weights, which may differ from layer to layer.
        scores[group.name] = torch.stack([part.cpu() for part in parts]).sum(0) * norms.cpu().pow(power)
    return scores


def _norm(one: Consumer) -> Tensor:
    return one.along(one.norm[:, None], "mean")


def _input_share(one: Consumer, inner: float) -> Tensor:
    return one.along(_shares(one.weight.abs() * one.norm[:, None].pow(inner), -1), "mean")


def _output_shares(model: nn.Module, group: ChannelGroup) -> list[Tensor]:
    """Per weight that produces the units the mean share of each in |w|."""
    produced = select(group, model, Lift(members="out"))
    assert isinstance(produced, ChannelGroup)
    found = []
    for member in produced.members:
        rows = double(resolve(model, [member.tensor])[member.tensor].detach().abs()).movedim(member.axis, 0).flatten(1)
        shares = _shares(rows, 0).mean(1)
        found.append(reduce_units(shares, group.units_along(member), group.size, "mean").float())
    return found


def _shares(values: Tensor, dim: int) -> Tensor:
    """`values` over their sum along `dim`; zeros where that is zero."""
    total = values.sum(dim, keepdim=True)
    return torch.where(total > 0, values / total, 0.0)
