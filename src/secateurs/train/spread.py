"""Values of units laid along the tensors that carry them: what multiplies a weight is one number a unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from ..core.units import ChannelGroup, Group

__all__ = ["Part", "multiplied", "parts_of"]

# A parameter, and a group as it lies along one of its axes.
Part = tuple[str, Group]


def parts_of(group: Group, first: Mapping[str, str], roles: Iterable[Literal["out", "in"]] = ("out",)) -> list[Part]:
    """The parameters that carry the units of a group in one of the roles, by their first names, once an axis.

    Args:
        group: a group that is no `ChannelGroup` has all its tensors, whatever the roles.
        first: for every name of a parameter the first name of the same one; see `scope.canonical_names`.
        roles: "out" where the units are produced, "in" where they are consumed.
    """
    if not isinstance(group, ChannelGroup):
        return [(first[name], group) for name in group.tensors]
    found: dict[tuple[str, int], Group] = {}
    for member in group.members:
        if member.role in set(roles) and member.tensor in first:
            name = first[member.tensor]
            found[name, member.axis] = replace(group, members=(replace(member, tensor=name),))
    return [(name, part) for (name, _), part in found.items()]


def multiplied(raw: Mapping[str, Tensor], factors: Iterable[tuple[Part, Tensor]]) -> dict[str, Tensor]:
    """Each parameter of a part times the factors of its units, in its own dtype; differentiable in both.

    Args:
        raw: the parameters by name.
        factors: parts, each with a float [units]; those of one parameter multiply up.
    """
    made: dict[str, Tensor] = {}
    for (name, part), values in factors:
        made[name] = made.get(name, raw[name]) * part.spread(values)[name]
    return {name: value.to(raw[name].dtype) for name, value in made.items()}
