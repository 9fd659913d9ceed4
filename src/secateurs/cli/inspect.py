"""`secateurs inspect`: what of a model can go, what goes along, and what stays and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import Granularity, Model, Opening, Output
from ._session import session, table

if TYPE_CHECKING:
    from ..core.units import Group
    from ..graph.structure import Structure
    from ..integrations import LoadedModel

__all__ = ["inspect"]


def inspect(
    model: Model,
    *,
    granularity: Granularity = None,
    time: Annotated[bool, typer.Option("--time", help="Measure each layer's share of the time.")] = False,
    opening: Opening,
    output: Output,
) -> None:
    """Show what of a model can go, what goes along with it, and what stays and why."""
    with session(**vars(output), threads=opening.threads) as talk:
        from ..planning import Granularity as Units

        units = Units.parse(granularity or "channel")
        source = opening.ready(model)
        times = _times(source) if time else {}
        found = _channels(source, units.kinds, times) if units.kinds else _weights(source, units.block, times)
        talk.result(found, *_shown(found))


def _times(source: LoadedModel) -> dict[str, float]:
    """The share of each layer in the time of all layers."""
    from ..measure.latency import layer_times

    seconds = layer_times(source.model, source.example_inputs)
    return {name: taken / sum(seconds.values()) for name, taken in seconds.items()}


def _channels(source: LoadedModel, kinds: tuple[str, ...], times: Mapping[str, float]) -> dict[str, Any]:
    from ..graph.structure import infer

    structure = infer(source.model, source.example_inputs, kinds=kinds)
    return {
        "model": source.name,
        "params": structure.costs.total("params"),
        "macs": structure.costs.total("macs"),
        "bytes": structure.costs.total("bytes"),
        "groups": [_group(group, structure, times) for group in structure.groups],
        "frozen": [vars(frozen) for frozen in structure.frozen],
        "unknown": dict(structure.unknown),
    }


def _group(group: Group, structure: Structure, times: Mapping[str, float]) -> dict[str, Any]:
    chosen, *along = group.tensors
    layers = {tensor.rpartition(".")[0] for tensor in group.tensors}
    return {
        "name": group.name,
        "kind": group.kind,
        "size": group.size,
        "tensor": chosen,
        "along": along,
        "params_per_unit": structure.costs.unit("params", group.name, structure.sizes),
        "macs_per_unit": structure.costs.unit("macs", group.name, structure.sizes),
        "time": sum(share for layer, share in times.items() if layer in layers) if times else None,
    }


def _weights(source: LoadedModel, block: tuple[int, int], times: Mapping[str, float]) -> dict[str, Any]:
    from ..core.units import WeightGroup
    from ..measure.macs import macs_by_module
    from ..measure.params import bytes_in_memory, parameters
    from ..train.scope import prunable_weights

    weights = prunable_weights(source.model)
    macs = macs_by_module(source.model, source.example_inputs)
    groups = []
    for name, weight in weights.items():
        group, layer = WeightGroup(name, tuple(weight.shape), block), name.rpartition(".")[0]
        costs = {"params_per_unit": weight.numel() / group.size, "macs_per_unit": macs.get(layer, 0.0) / group.size}
        facts = {"name": name, "kind": group.kind, "size": group.size, "tensor": name, "along": []}
        groups.append({**facts, **costs, "time": times.get(layer, 0.0) if times else None})
    left_out = [(name, p) for name, p in source.model.named_parameters() if name not in weights]
    return {
        "model": source.name,
        "params": parameters(source.model),
        "macs": sum(macs.values()),
        "bytes": bytes_in_memory(source.model),
        "groups": groups,
        "frozen": [
            {"tensor": name, "axis": 0, "size": p.numel(), "reason": "no weight of a layer"} for name, p in left_out
        ],
        "unknown": {},
    }


def _shown(found: dict[str, Any]) -> list[Any]:
    from ..report.words import count, file_size, plural, share

    timed = any(group["time"] is not None for group in found["groups"])
    rows = [
        [
            group["name"],
            group["kind"],
            str(group["size"]),
            count(group["params_per_unit"]),
            count(group["macs_per_unit"]),
            *([share(group["time"])] if timed else []),
            _listed(_layers(group)),
        ]
        for group in found["groups"]
    ]
    columns = ("group", "kind", "units>", "params a unit>", "MACs a unit>", *(["time>"] * timed), "goes along")
    sizes = f"{count(found['params'])} parameters, {count(found['macs'])} MACs, {file_size(found['bytes'])}"
    return [
        f"{found['model']}: {sizes}; {plural(len(rows), 'group')} of units can be pruned",
        *([table(columns, rows)] if rows else []),
        *(["Frozen:", *_frozen(found["frozen"])] if found["frozen"] else []),
        *(
            f"no rule for {op} in {place or 'the model'}: what it touches is frozen"
            for op, place in found["unknown"].items()
        ),
    ]


def _frozen(frozen: list[dict[str, Any]]) -> list[str]:
    """One line a reason."""
    reasons: dict[str, list[str]] = {}
    for width in frozen:
        reasons.setdefault(width["reason"], []).append(f"{width['tensor']} ({width['size']})")
    return [f"  {_listed(tensors)}: {reason}" for reason, tensors in reasons.items()]


def _layers(group: dict[str, Any]) -> list[str]:
    """The other layers that lose something with the group's units."""
    from ..report.words import module_of

    return [layer for layer in dict.fromkeys(map(module_of, group["along"])) if layer != module_of(group["tensor"])]


def _listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
