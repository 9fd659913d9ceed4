"""What the layers that consume a unit see of it: the inputs that they multiply, and the weights they multiply by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import double
from ..core.errors import ModelError
from ..core.units import ChannelGroup, Member, Reduce, combine, reduce_rows, reduce_units
from ..solvers.gram import Gram, from_matrix, solvable, to_matrix
from ..solvers.layerwise import seen_of
from ..solvers.sequential import grams_of
from .lifting import Lift, owner, select
from .preserve import preserved

__all__ = ["Consumer", "consumed", "consumers", "unit_scores"]


@dataclass(frozen=True, eq=False)
class Consumer:
    """One layer that contracts the units of a group, with moments of its inputs over all tokens or pixels.

    Args:
        member: the axis of its weight that runs over its inputs.
        module: the layer.
        weight: float64 [groups, rows, columns], a column is what one input is multiplied by (`solvers.to_matrix`).
        variance: of each input, float64 [groups, columns].
        norm: the root of the mean square of each input, float64 [groups, columns].
    """

    member: Member
    module: nn.Module
    weight: Tensor
    variance: Tensor
    norm: Tensor

    def along(self, entries: Tensor, reduce: Reduce = "sum") -> Tensor:
        """`entries`, which broadcast to the weight's matrix, reduced for each position of the member's axis."""
        shape = self.module.get_parameter("weight").shape
        full = from_matrix(self.module, entries.expand(self.weight.shape), shape)
        return reduce_rows(full.movedim(self.member.axis, 0), reduce)


def consumed(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, ChannelGroup]:
    """Each group with only those members that are the inputs of a layer with columns (`solvers.solvable`).

    Raises:
        ModelError: a group has none.
    """
    found: dict[str, ChannelGroup] = {}
    for group in groups:
        inputs = select(group, model, Lift(members="in"))
        assert isinstance(inputs, ChannelGroup)
        known = tuple(m for m in inputs.members if m.tensor.endswith("weight") and solvable(owner(model, m.tensor)))
        if not known:
            raise ModelError(
                f"what consumes group {group.name!r} ({', '.join(inputs.tensors)}) is no linear layer or convolution, "
                "so that the inputs it sees are unknown; use another criterion for it, or leave it out."
            )
        found[group.name] = replace(group, members=known)
    return found


def consumers(
    model: nn.Module, groups: Sequence[ChannelGroup], data: Sequence[Any], *, seed: int = 0
) -> dict[str, tuple[Consumer, ...]]:
    """Per group the layers that consume its units; tokens that an "attention_mask" leaves out do not count.

    Args:
        model, data: see `activation.input_norms`.
        groups: of channels or heads.
        seed: see `preserved`.

    Raises:
        ModelError: a group that no known layer consumes, or a layer that the data never reaches.
    """
    found = consumed(model, groups)
    names = list(dict.fromkeys(_module(m) for group in found.values() for m in group.members))
    with preserved(model, seed=seed):
        grams, _ = grams_of(model, data, names, full=False, seen=seen_of(data))
    return {name: tuple(_consumer(model, m, grams) for m in group.members) for name, group in found.items()}


def unit_scores(
    group: ChannelGroup,
    found: Sequence[Consumer],
    values: Callable[[Consumer], Tensor],
    scaled: Callable[[Tensor], Tensor] = lambda inside: inside,
) -> Tensor:
    """One score a unit: the mean of `values` over its positions in each consumer, and over consumers: [size].

    Args:
        group: the units.
        found: its consumers.
        values: of a consumer, one for each position of its member's axis.
        scaled: applied to the values of those positions that belong to the group.
    """
    return combine([_unit_means(group, one.member, values(one), scaled) for one in found])


def _unit_means(group: ChannelGroup, member: Member, values: Tensor, scaled: Callable[[Tensor], Tensor]) -> Tensor:
    units = group.units_along(member).to(values.device)
    inside = units >= 0
    return reduce_units(scaled(values[inside]), units[inside], group.size, "mean")


def _consumer(model: nn.Module, member: Member, grams: Mapping[str, Gram]) -> Consumer:
    name = _module(member)
    module, gram = model.get_submodule(name), grams[name]
    if not gram.count:
        raise ModelError(
            f"no call of {name} was seen on this data, so its inputs are unknown: the model uses its weights without "
            "calling it (as nn.MultiheadAttention does), or the data never reaches it; give more data, use a criterion "
            "without activations, or leave its group out."
        )
    with torch.no_grad():
        weight = double(to_matrix(module, module.get_parameter("weight").detach()))
    return Consumer(member, module, weight, gram.variance.to(weight), gram.norm.to(weight))


def _module(member: Member) -> str:
    return member.tensor.rpartition(".")[0]
