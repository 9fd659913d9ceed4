"""What of a model can go, what goes along with it, what a unit costs, and what stays and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .core.depth import LayerGroup
from .core.errors import ModelError
from .core.experts import ExpertGroup
from .core.ids import recoded
from .core.pq import fewest, pq_index
from .core.select import top
from .core.units import ChannelGroup, WeightGroup
from .core.wrapped import unwrapped
from .criteria.face import check_finite, score
from .graph.cut import AnyStructure, cut
from .graph.depth.infer import infer_layers
from .graph.infer import infer
from .graph.mixtures.infer import infer_experts
from .graph.structure import Frozen, Structure
from .measure.latency import compare, layer_times
from .measure.macs import macs_by_module
from .measure.params import LayerRow, bytes_in_memory, layer_table, parameters
from .planning import Granularity
from .report.data import FrozenWidth
from .report.inspection import Inspection, ModelLayer, UnitGroup, UnitTime
from .train.scope import prunable_weights

__all__ = ["inspect", "unit_time"]

# Where a layer says how many outputs it has.
_WIDTHS = ("out_features", "out_channels", "embedding_dim")


def inspect(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: str = "channel",
    timed: bool = False,
    seconds: float = 0.5,
    name: str | None = None,
) -> Inspection:
    """What of `model` can go, what a unit of each group costs, and how many the PQ index says are needed.

    Nothing is changed.

    Args:
        model: any module whose forward runs on the example inputs.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        granularity: as in `plan`.
        timed: whether to measure the share of each group's layers in the time, and what a unit costs in time
            (`unit_time`); the latter not for single weights and blocks, whose zeros cost as much as other numbers.
        seconds: to spend on each group's timed runs.
        name: of the model, for people; by default that of its class.

    Raises:
        ModelError: the model does not run on the inputs, or holds no weight to prune.
        OptionError: an unknown granularity.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> [(g.name, g.readers, g.params_per_unit) for g in inspect(net, torch.ones(1, 8)).groups]
    [('0', ('2',), 13)]
    """
    model = unwrapped(model)
    unit = Granularity.parse(granularity)
    called = type(model).__name__ if name is None else name
    shares = _shares(model, example_inputs) if timed else {}
    if not unit.kinds:
        found = _of_weights(model, called, layer_table(model, example_inputs), unit.block, shares)
        return _with_index(found, _of_entries(model, found.groups, unit.block))
    structure: AnyStructure
    if unit.kinds == ("layer",):
        structure = infer_layers(model, example_inputs, macs_by_module(model, example_inputs))
    else:
        structure = infer(model, example_inputs, kinds=unit.kinds, entangled=unit.entangled)
    if unit.kinds == ("expert",) and not structure.groups:
        experts = infer_experts(model, example_inputs, lambda m: sum(macs_by_module(m, example_inputs).values()))
        structure = experts if experts.groups else structure
    spent = {g.name: unit_time(model, structure, g, example_inputs, seconds=seconds) for g in structure.groups if timed}
    found = _of_units(model, called, _rows(model, example_inputs, structure), structure, shares, spent)
    return _with_index(found, _of_channels(model, structure.groups))


def unit_time(
    model: nn.Module,
    structure: AnyStructure,
    group: ChannelGroup | LayerGroup | ExpertGroup,
    example_inputs: Any,
    *,
    seconds: float = 0.5,
) -> UnitTime | None:
    """What one unit of `group` costs in time: the model against itself with half of the group cut, by units cut.

    Both run in turn, and the difference is taken within each round. None if the group has no half to cut.

    Args:
        structure: of `model`, with `group` in it.
        seconds: to spend on timed runs of each of the two.
    """
    multiple = group.multiple if isinstance(group, ChannelGroup) else 1
    stays = torch.tensor(getattr(group, "stays", ()), dtype=torch.long)
    kept = max(-(-((group.size + 1) // 2) // multiple) * multiple, len(stays))
    removed = group.size - kept
    if removed < 1:
        return None
    keep = top(torch.zeros(group.size).index_fill(0, stays, 1.0), kept)
    pair = {"whole": model, "half": cut(model, structure, {group.name: keep})}
    ids = structure.kept_ids({group.name: keep}) if isinstance(structure, Structure) else {}
    inputs = {"whole": example_inputs, "half": recoded(example_inputs, ids)}
    found = compare(pair, inputs, seconds=seconds, warmup=2)
    whole, faster = found["whole"].median, found["half"].speedup
    if faster is None:
        return None
    median, p10, p90 = (whole * (1 - 1 / times) / removed for times in (faster.median, faster.p10, faster.p90))
    return UnitTime(median, p10, p90, removed)


def _with_index(found: Inspection, spread: Mapping[str, tuple[float, int]]) -> Inspection:
    pairs = [spread.get(group.name, (None, None)) for group in found.groups]
    groups = zip(found.groups, pairs, strict=True)
    return replace(found, groups=tuple(replace(group, index=index, bound=bound) for group, (index, bound) in groups))


def _of_entries(model: nn.Module, groups: Iterable[UnitGroup], block: tuple[int, int]) -> dict[str, tuple[float, int]]:
    """Index and bound of each weight's entries or blocks, one weight at a time; none of what has no finite values."""
    if not _has_numbers(model):
        return {}
    weights = {group.name: model.get_parameter(group.name).detach() for group in groups}
    units = {name: WeightGroup(name, tuple(weight.shape), block) for name, weight in weights.items()}
    return {name: _spread(units[name].lift({name: weight.abs()})[name]) for name, weight in weights.items()}


def _of_channels(
    model: nn.Module, groups: Iterable[ChannelGroup | LayerGroup | ExpertGroup]
) -> dict[str, tuple[float, int]]:
    """Index and bound of the magnitudes of each group's channels; none where these cannot be told."""
    channels = [group for group in groups if isinstance(group, ChannelGroup)]
    if not channels or not _has_numbers(model):
        return {}
    try:
        return {name: _spread(values) for name, values in score("magnitude", model, channels).items()}
    except ModelError:
        return {}


def _spread(values: Tensor) -> tuple[float, int]:
    index = pq_index(values)
    return float(index), int(fewest(index, torch.tensor(values.numel(), device=values.device)))


def _has_numbers(model: nn.Module) -> bool:
    """Whether the weights have values and all of them are finite."""
    try:
        check_finite(model)
    except ModelError:
        return False
    return not any(parameter.is_meta for parameter in model.parameters())


def _shares(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """The share of each layer in the time of all layers."""
    seconds = layer_times(model, example_inputs)
    return {name: taken / sum(seconds.values()) for name, taken in seconds.items()}


def _rows(model: nn.Module, example_inputs: Any, structure: AnyStructure) -> tuple[LayerRow, ...]:
    """The layers in forward order; of a model without values, as they are declared, since its own code may not run."""
    if not any(p.is_meta for p in model.parameters()):
        return layer_table(model, example_inputs)
    macs = structure.costs.by_source("macs")
    own = {name: dict(module.named_parameters(recurse=False)) for name, module in model.named_modules()}
    return tuple(
        _declared(name, model.get_submodule(name), own[name], macs.get(name, 0.0)) for name in own if own[name]
    )


def _declared(name: str, module: nn.Module, own: Mapping[str, Tensor], macs: float) -> LayerRow:
    shapes = [tuple(p.shape) for _, p in sorted(own.items(), key=lambda item: (item[0] != "weight", -item[1].dim()))]
    return LayerRow(name, type(module).__name__, shapes[0], sum(map(math.prod, shapes)), None, macs, None)


def _of_units(
    model: nn.Module,
    name: str,
    rows: Iterable[LayerRow],
    structure: AnyStructure,
    shares: Mapping[str, float],
    spent: Mapping[str, UnitTime | None],
) -> Inspection:
    costs, none = structure.costs, {g.name: 0 for g in structure.groups}
    whole = {metric: costs.total(metric) for metric in ("params", "macs", "bytes")}
    made = {layer for g in structure.groups for layer in _made(g)}
    return Inspection(
        model=name,
        **whole,
        groups=tuple(_group(model, g, structure, shares, spent.get(g.name)) for g in structure.groups),
        layers=tuple(_layer(row, () if row.name in made else _why(model, row, structure.frozen)) for row in rows),
        frozen=tuple(FrozenWidth(**vars(f)) for f in structure.frozen),
        unknown=structure.unknown,
        params_in_reach=_reach(whole["params"], costs.total("params", none)),
        macs_in_reach=_reach(whole["macs"], costs.total("macs", none)),
    )


def _made(group: ChannelGroup | LayerGroup | ExpertGroup) -> set[str]:
    """The layers whose outputs, or which as a whole, can go with units of the group."""
    if isinstance(group, LayerGroup | ExpertGroup):
        return {_layer_of(tensor) for tensor in group.tensors}
    return {_layer_of(m.tensor) for m in group.members if m.role == "out"}


def _reach(whole: float, left: float) -> float:
    return 1 - left / whole if whole else 0.0


def _group(
    model: nn.Module,
    group: ChannelGroup | LayerGroup | ExpertGroup,
    structure: AnyStructure,
    shares: Mapping[str, float],
    spent: UnitTime | None,
) -> UnitGroup:
    chosen, *along = group.tensors or (group.name,)
    makers, passing, readers = _roles(model, group)
    layers = {_layer_of(tensor) for tensor in group.tensors}
    units = {m: structure.costs.unit(m, group.name, structure.sizes) for m in ("params", "macs", "bytes")}
    return UnitGroup(
        name=group.name,
        kind=group.kind,
        size=group.size,
        tensor=chosen,
        along=tuple(along),
        makers=makers,
        passing=passing,
        readers=readers,
        params_per_unit=units["params"],
        macs_per_unit=units["macs"],
        bytes_per_unit=units["bytes"],
        multiple=group.multiple if isinstance(group, ChannelGroup) else 1,
        time=sum(share for layer, share in shares.items() if layer in layers) if shares else None,
        measured=spent,
    )


def _roles(
    model: nn.Module, group: ChannelGroup | LayerGroup | ExpertGroup
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Layers that make the units, that pass them on, and that read them; a layer may do more than one of these."""
    if isinstance(group, LayerGroup | ExpertGroup):
        return group.blocks, (), ()
    found: dict[str, set[str]] = {}
    for member in group.members:
        makes = member.rank > 1 and not _is_depthwise(model, member.tensor)
        role = "reads" if member.role == "in" else "makes" if makes else "passes"
        found.setdefault(_layer_of(member.tensor), set()).add(role)
    return (
        tuple(layer for layer, roles in found.items() if "makes" in roles),
        tuple(layer for layer, roles in found.items() if roles == {"passes"}),
        tuple(layer for layer, roles in found.items() if "reads" in roles),
    )


def _is_depthwise(model: nn.Module, tensor: str) -> bool:
    module = model.get_submodule(_layer_of(tensor))
    return 1 < getattr(module, "groups", 1) == getattr(module, "in_channels", 0)


def _layer_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _layer(row: LayerRow, why: tuple[str, ...] = ()) -> ModelLayer:
    return ModelLayer(row.name, row.type, row.weight_shape, row.params, row.macs, why)


def _why(model: nn.Module, row: LayerRow, frozen: Iterable[Frozen]) -> tuple[str, ...]:
    """Why the output width of a layer stays: widths of one size and one reason are listed where they are met first."""
    found = [f for f in frozen if f.size == _width(model.get_submodule(row.name), row)]
    own = [f for f in found if _layer_of(f.tensor) == row.name]
    return tuple(dict.fromkeys(f.reason for f in own or found))


def _width(module: nn.Module, row: LayerRow) -> int:
    """Number of outputs of a layer; 0 if it has no weight."""
    said = next((n for n in (getattr(module, width, None) for width in _WIDTHS) if isinstance(n, int)), None)
    bias = getattr(module, "bias", None)
    own = bias.numel() if isinstance(bias, Tensor) else next(iter(row.weight_shape), 0)
    return own if said is None else said


def _of_weights(
    model: nn.Module, name: str, rows: tuple[LayerRow, ...], block: tuple[int, int], shares: Mapping[str, float]
) -> Inspection:
    weights = prunable_weights(model)
    macs = {row.name: row.macs for row in rows}
    groups = tuple(_weight(n, w, block, macs.get(_layer_of(n), 0.0), shares) for n, w in weights.items())
    left_out = [(n, p) for n, p in model.named_parameters() if n not in weights]
    params, total = parameters(model), sum(macs.values())
    return Inspection(
        model=name,
        params=params,
        macs=total,
        bytes=bytes_in_memory(model),
        groups=groups,
        layers=tuple(_layer(row) for row in rows),
        frozen=tuple(FrozenWidth(n, 0, p.numel(), "no weight of a layer") for n, p in left_out),
        params_in_reach=_reach(params, sum(p.numel() for _, p in left_out)),
        macs_in_reach=_reach(total, total - sum(macs.get(layer, 0.0) for layer in {_layer_of(n) for n in weights})),
    )


def _weight(name: str, weight: Tensor, block: tuple[int, int], macs: float, shares: Mapping[str, float]) -> UnitGroup:
    """A zero is stored as any number is, so a unit costs no bytes."""
    group, layer = WeightGroup(name, tuple(weight.shape), block), _layer_of(name)
    return UnitGroup(
        name=name,
        kind=group.kind,
        size=group.size,
        tensor=name,
        makers=(layer,),
        params_per_unit=weight.numel() / group.size,
        macs_per_unit=macs / group.size,
        time=shares.get(layer, 0.0) if shares else None,
    )
