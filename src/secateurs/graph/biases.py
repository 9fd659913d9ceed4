"""Biases that a model got after it was planned: a repair may need one where a layer had none.

A bias is typed like the outputs of its layer's weight, so that it is cut with them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..core.cost import CostModel, Monomial
from ..core.dims import Dim, Fixed, atoms
from ..core.units import ChannelGroup, Member
from ..solvers.gram import solvable
from .configs.building import build, changed, switches
from .structure import Structure, fingerprint

__all__ = ["bias_slots", "with_biases"]


def bias_slots(model: nn.Module, wanted: Collection[str]) -> tuple[str, ...]:
    """The paths in `wanted`, and those of layers to which the model's class gives biases only together with them.

    That is found by building the class of a model that has a config with each of the config's flags about biases turned
    round, on the meta device. A flag that makes anything else than biases is left alone. Where no flags make all that
    is wanted, no config can say it, and no others are given any.

    Args:
        model: for example a transformers model.
        wanted: paths of layers that are to have a bias and have none.
    """
    first = build(type(model), model.config) if hasattr(getattr(model, "config", None), "to_dict") else None
    slots: dict[str, None] = {}
    for field, value in switches(model.config).items() if first is not None else ():
        other = changed(model.config, [(field, not value)])
        made = None if other is None else build(type(model), other)
        if first is None or made is None or not first.shapes.keys() < made.shapes.keys():
            continue
        more = [name.removesuffix(".bias") for name in made.shapes if name not in first.shapes]
        if set(wanted) & set(more) and all(_has_slot(model, path) for path in more):
            slots |= dict.fromkeys(more)
    return tuple(slots) if slots.keys() >= set(wanted) else tuple(wanted)


def _has_slot(model: nn.Module, path: str) -> bool:
    """Whether there is a layer at `path` whose bias is not there but could be."""
    found = dict(model.named_modules()).get(path)
    return found is not None and solvable(found) and found.bias is None


def with_biases(structure: Structure, model: nn.Module) -> Structure:
    """`structure` for `model`, which differs from the one it was inferred from by added biases; else as it is."""
    known = structure.costs.by_source("params")
    added = {name: p for name, p in model.named_parameters() if name not in known and name.endswith("bias")}
    if not added or fingerprint(model, added) != structure.fingerprint:
        return structure
    dims = {name: _outputs(structure, name, bias) for name, bias in added.items()}
    live = {name: (dim,) for name, dim in dims.items() if any(True for _ in atoms(dim))}
    return replace(
        structure,
        groups=tuple(_with_members(group, dims) for group in structure.groups),
        tensors={**structure.tensors, **live},
        costs=_with_costs(structure.costs, added, dims),
        fingerprint=fingerprint(model),
    )


def _outputs(structure: Structure, name: str, bias: Tensor) -> Dim:
    """What the bias is made of: the outputs of the weight beside it, which are its first axis."""
    weight = f"{name.removesuffix('bias')}weight"
    return structure.tensors[weight][0] if weight in structure.tensors else Fixed(len(bias))


def _with_members(group: ChannelGroup, dims: Mapping[str, Dim]) -> ChannelGroup:
    more = [Member(n, 0, dim, 1) for n, dim in dims.items() if any(a.name == group.name for a in atoms(dim))]
    return replace(group, members=(*group.members, *more)) if more else group


def _with_costs(costs: CostModel, added: Mapping[str, Tensor], dims: Mapping[str, Dim]) -> CostModel:
    metrics = dict(costs.metrics)
    for metric, weight in (("params", lambda _: 1), ("bytes", Tensor.element_size)):
        more = tuple(Monomial(weight(bias), (dims[name],), name) for name, bias in added.items())
        metrics[metric] = (*metrics[metric], *more)
    return CostModel(metrics)
