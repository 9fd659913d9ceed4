"""Lifting: from a saliency per tensor entry to one score per unit (SPA, section 3).

A criterion says how much each entry of a parameter matters; a unit owns entries of several tensors. Three steps lead
from one to the other, each an option: *reduce* the entries of the unit inside each tensor, *normalize* over the units
of the group inside each tensor, *combine* over tensors. Two more options say which tensors of a group take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor, nn

from ..core.dims import size
from ..core.errors import ModelError, OptionError
from ..core.units import Cache, ChannelGroup, Group, Member, Reduce, WeightGroup, combine, normalized

__all__ = ["Lift", "lifted", "owner", "resolve", "select"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Lift:
    """How saliencies of entries become scores of units; the defaults are those of SPA, section 3.

    Args:
        reduce: over the entries of a unit inside one tensor: "sum", "mean" or "max".
        normalize: over the units of a group inside one tensor: "none", "sum", "mean", "max", "minmax" or "gaussian";
            None means "mean" for channel groups and "none" for weight groups, where a global ranking must see the
            published values, and "none" for scores that carry a sign.
        combine: over the tensors of a unit: "sum", "mean", "max", "prod" or "first".
        members: "all" tensor axes of a channel group, or only those that produce the unit ("out") or consume it ("in").
        tensors: which parameters of a channel group take part: "weights" (two axes or more), "norms" (scales of
            normalisation layers) or "all" (biases and scales too).
    """

    reduce: Reduce = "sum"
    normalize: str | None = None
    combine: Literal["sum", "mean", "max", "prod", "first"] = "mean"
    members: Literal["all", "out", "in"] = "all"
    tensors: Literal["weights", "norms", "all"] = "weights"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in _ALLOWED[field.name]:
                allowed = ", ".join(str(v) for v in _ALLOWED[field.name] if v is not None)
                raise OptionError(f"{field.name} must be one of {allowed}, got {value!r}.")


_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "reduce": ("sum", "mean", "max"),
    "normalize": (None, "none", "sum", "mean", "max", "minmax", "gaussian"),
    "combine": ("sum", "mean", "max", "prod", "first"),
    "members": ("all", "out", "in"),
    "tensors": ("weights", "norms", "all"),
}


def resolve(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters called `names`, where a tied parameter may be called by any of its names.

    Raises:
        ModelError: the model has no such parameter, or it is not floating-point, or it has no data.
    """
    found: dict[str, nn.Parameter] = {}
    for name in names:
        try:
            tensor = model.get_parameter(name)
        except AttributeError as error:
            raise ModelError(f"the model has no parameter {name!r}: the groups belong to another model.") from error
        if not tensor.is_floating_point():
            raise ModelError(f"{name!r} holds {tensor.dtype}: only floating-point tensors have scores; leave it out.")
        if tensor.is_meta:
            raise ModelError(f"{name!r} is on the meta device and has no values: load the weights first.")
        found[name] = tensor
    return found


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the parameter or buffer `name`."""
    return model.get_submodule(name.rpartition(".")[0])


def select(group: Group, model: nn.Module, lift: Lift) -> Group:
    """`group` with only those members that `lift` lets take part; other kinds of group are returned as they are.

    Buffers never take part, and an axis of a tied parameter that occurs under two names counts once.

    Raises:
        ModelError: no member is left, or a tensor is missing or has another shape than the group says.
    """
    if not isinstance(group, ChannelGroup):
        _check_weight(group, model)
        return group
    parameters = resolve(model, [name for name in group.tensors if not _is_buffer(model, name)])
    chosen: dict[tuple[int, int], Member] = {}
    for member in group.members:
        if member.tensor not in parameters:
            continue
        tensor = parameters[member.tensor]
        _check_axis(group, member, tensor)
        if lift.members in ("all", member.role) and _takes_part(model, member, lift.tensors):
            chosen.setdefault((id(tensor), member.axis), member)
    if not chosen:
        raise ModelError(_nothing_left(group, lift))
    return replace(group, members=tuple(chosen.values()))


def lifted(
    group: Group,
    saliency: Mapping[str, Tensor],
    lift: Lift,
    *,
    signed: bool = False,
    finish: Callable[[Tensor], Tensor] | None = None,
    cache: Cache | None = None,
) -> Tensor | None:
    """One score per unit of `group`: float [size]; None where `saliency` has none of its tensors.

    Args:
        group: as `select` returns it.
        saliency: per parameter a tensor of its shape, or one that broadcasts to it along the axes without the unit.
        lift: see `Lift`.
        signed: whether the saliencies carry a sign.
        finish: applied to the reduced scores inside each tensor, before they are normalised (the root of a norm).
        cache: shared by the groups of one call; see `Group.lift`.
    """
    parts = list(group.lift(saliency, lift.reduce, cache).values())
    if not parts:
        return None
    how = lift.normalize or ("none" if signed or isinstance(group, WeightGroup) else "mean")
    scaled = [normalized(part if finish is None else finish(part), how) for part in parts]
    return scaled[0] if len(scaled) == 1 else combine(scaled, lift.combine)


def _is_buffer(model: nn.Module, name: str) -> bool:
    try:
        holder = owner(model, name)
    except AttributeError:
        return False
    return name.rpartition(".")[2] in holder._buffers


def _takes_part(model: nn.Module, member: Member, tensors: str) -> bool:
    if tensors == "weights":
        return member.rank >= 2
    if tensors == "norms":
        # By type and not by name: other libraries have norms whose scale is 1 + weight.
        return member.tensor.endswith("weight") and isinstance(owner(model, member.tensor), _NORMS)
    return True


def _nothing_left(group: ChannelGroup, lift: Lift) -> str:
    names = ", ".join(group.tensors) or "none"
    if lift.tensors == "norms":
        return (
            f"group {group.name!r} has no scale of a normalisation layer among its tensors ({names}); score it with "
            f"another criterion, such as magnitude, or leave it out."
        )
    hint = "pass tensors='all'" if lift.members == "all" else "pass tensors='all' or members='all'"
    return (
        f"group {group.name!r} has nothing to score: none of its tensors ({names}) passes tensors={lift.tensors!r}, "
        f"members={lift.members!r}; {hint}, or leave it out."
    )


def _check_axis(group: ChannelGroup, member: Member, tensor: Tensor) -> None:
    if tensor.dim() != member.rank or tensor.shape[member.axis] != size(member.dim):
        raise ModelError(
            f"group {group.name!r} expects {size(member.dim)} positions on axis {member.axis} of {member.rank} of "
            f"{member.tensor!r}, which has shape {tuple(tensor.shape)}: the groups belong to another model."
        )


def _check_weight(group: Group, model: nn.Module) -> None:
    for name, tensor in resolve(model, group.tensors).items():
        if isinstance(group, WeightGroup) and tuple(tensor.shape) != tuple(group.shape):
            raise ModelError(
                f"group {name!r} expects shape {tuple(group.shape)}, but the tensor has {tuple(tensor.shape)}: "
                f"the groups belong to another model."
            )
