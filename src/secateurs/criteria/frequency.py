"""Rows of embeddings: how often data looks each of them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import split
from ..core.errors import DataError
from ..core.ids import LABELS, column, located
from ..core.units import ChannelGroup
from .registry import criterion

__all__ = ["token_frequency"]


@criterion(
    "token-frequency",
    kind="unit",
    groups=("embedding",),
    needs=("data",),
    paper="Yang, Cui & Chen 2022, arXiv 2203.15996 (TextPruner), vocabulary pruning",
)
def token_frequency(model: nn.Module, groups: Sequence[ChannelGroup], *, data: Sequence[Any]) -> dict[str, Tensor]:
    """How often an id occurs in the data: its share of all ids there, as inputs and as labels.

    The model is not run. Negative ids, such as -100, count for nothing; padding counts, and stays anyway.

    Args:
        model: not looked at.
        groups: of granularity "embedding".
        data: batches, whose inputs stand where those of the example inputs do, by position or by name.

    Raises:
        DataError: the data holds no ids of a group, or one beyond its rows.
    """
    return {group.name: _share(group, data) for group in groups}


def _share(group: ChannelGroup, data: Sequence[Any]) -> Tensor:
    counts = torch.zeros(group.size, dtype=torch.float64)
    for batch in data:
        for ids in _ids(group, batch):
            if len(ids) and int(ids.max()) >= group.size:
                raise DataError(f"id {int(ids.max())} in the data is beyond the {group.size} rows of {group.name}.")
            counts += torch.bincount(ids, minlength=group.size)
    if not counts.sum():
        raise DataError(
            f"the data holds no ids of {group.name}: they are looked for at {', '.join(group.inputs)} of each batch."
        )
    return (counts / counts.sum()).float()


def _ids(group: ChannelGroup, batch: Any) -> list[Tensor]:
    """The ids of the group in a batch: int64 [ids] for each tensor that holds some, without negative ones."""
    inputs, target = split(batch)
    tensors = dict(located(inputs)) | ({LABELS: target} if isinstance(target, Tensor) else {})
    found = []
    for place in group.inputs:
        name, number = column(place)
        if name in tensors and not tensors[name].is_floating_point():
            ids = tensors[name] if number is None else tensors[name][..., number]
            found.append(ids[ids >= 0].cpu().long())
    return found
