"""What systems share that train adapters and prune coupled units at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ...core.errors import ModelError
from ...core.units import Member
from ...pruning import FineTune
from ...recover.adapters import adaptable, adapters_of
from ...recover.trainable import head_of, is_tied
from ...solvers.gram import is_hf_conv1d

__all__ = ["Names", "adapted_layers", "at_own_rate", "outputs_axis", "with_adapters"]


@dataclass(frozen=True)
class Names:
    """A tuple of patterns of names, which may be empty."""

    def __str__(self) -> str:
        return "a tuple of patterns of names"

    def fault(self, value: object) -> str | None:
        fine = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
        return None if fine else f"must be {self}, got {value!r}"

    def wrong(self) -> tuple[object, ...]:
        return "*q_proj", None, (1,), ["*"]


def adapted_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The patterns; without any, all layers that can carry an adapter but for the head and those with a tied weight.

    Raises:
        ModelError: there is no such layer.
    """
    if patterns:
        return list(patterns)
    known = adaptable(model)
    found = [name for name in known if name != head_of(model) and not is_tied(model, name)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer but its head, so no adapter can train: name layers in adapted."
        )
    return found


def outputs_axis(layer: nn.Module) -> int:
    """The axis of the weight of a linear layer along which its outputs lie."""
    return 1 if is_hf_conv1d(layer) else 0


def with_adapters(model: nn.Module, members: Sequence[Member]) -> tuple[Member, ...]:
    """The members, and for those that lie along a weight with an adapter the matrix of it that does, too."""
    carrying = adapters_of(model)
    return tuple(part for member in members for part in (member, *_of_adapter(model, member, list(carrying))))


def _of_adapter(model: nn.Module, member: Member, carrying: Sequence[str]) -> Iterator[Member]:
    owner, _, own = member.tensor.rpartition(".")
    if owner in carrying and own == "weight":
        outputs = member.axis == outputs_axis(model.get_submodule(owner))
        name = f"{owner}.adapter.{'up' if outputs else 'down'}".lstrip(".")
        yield replace(member, tensor=name, axis=0 if outputs else 1)


def at_own_rate(recover: FineTune, optimizer: Any) -> FineTune:
    """The same training by another optimizer, a function `(parameters, lr) -> optimizer`."""
    settings = {field.name: getattr(recover, field.name) for field in fields(FineTune)}
    return FineTune(**{**settings, "optimizer": optimizer})
