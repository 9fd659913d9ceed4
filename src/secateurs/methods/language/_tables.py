"""Which levels the groups of a model have, what each costs, and how much of that a budget allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core.budget import Budget, Limit, nearest_limit
from ...core.cost import CostModel
from ...core.errors import BudgetError, ProofError
from ...core.levels import Table, counts_of_heads, counts_of_width
from ...core.units import ChannelGroup
from ...graph.compact import on_kept
from ...graph.cut import cut, mask, prove
from ...graph.structure import Structure
from ...measure.latency_table import Timer, homes_of, latency_table

__all__ = ["allowed", "cost_table", "levels_of", "limit_of", "table_of"]

_TIMED = ("latency", "speedup")
_KNOWN = (*_TIMED, "macs", "params", "bytes", "memory")
# A share of a sum of floats may lie a rounding error below the number that is meant.
_TOLERANCE = 1e-9


def limit_of(budget: Budget) -> Limit:
    """The one limit of a budget that a table of levels can meet.

    Raises:
        BudgetError: there are several, or it is of another metric.
    """
    if budget.pattern is not None or len(budget.limits) != 1 or budget.limits[0].metric not in _KNOWN:
        raise BudgetError(
            f"levels of modules meet one limit of {', '.join(_KNOWN)}, such as speedup>=2x; got {budget}."
        )
    return budget.limits[0]


def levels_of(
    model: nn.Module, structure: Structure, example_inputs: Any, factor: float = 0.9, steps: int = 42
) -> dict[str, tuple[int, ...]]:
    """Per group the counts of its levels: all numbers of heads, widths that shrink by `factor`, and 0 where that runs.

    Args:
        factor, steps: see `core.levels.counts_of_width`.
    """
    emptied = _droppable(model, structure, example_inputs)
    counts = {}
    for group in structure.groups:
        least = 0 if group.name in emptied else max(group.least, 1)
        if group.kind == "head":
            counts[group.name] = counts_of_heads(group.size, least=least, multiple=group.multiple)
        else:
            counts[group.name] = counts_of_width(
                group.size, least=least, multiple=group.multiple, factor=factor, steps=steps
            )
    return counts


def _droppable(model: nn.Module, structure: Structure, example_inputs: Any) -> set[str]:
    """The groups that can go as a whole: those alike are dropped together, and the cut is proven."""
    homes = homes_of(model, structure.groups, example_inputs, structure.recorded)
    # What generates has caches that tell the number of tokens from the keys of a layer.
    generates = callable(getattr(model, "generate", None))
    alike: dict[tuple[str, int, str], list[ChannelGroup]] = {}
    for group in structure.groups:
        path = homes[group.name][0]
        if path and group.least <= 1 and not (generates and group.kind == "head"):
            alike.setdefault((group.kind, group.size, repr(model.get_submodule(path))), []).append(group)
    return {
        group.name
        for groups in alike.values()
        if _runs_without(model, structure, groups, example_inputs)
        for group in groups
    }


def _runs_without(model: nn.Module, structure: Structure, groups: list[ChannelGroup], example_inputs: Any) -> bool:
    keep = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    masked, smaller = mask(model, structure.groups, keep), cut(model, structure, keep)
    try:
        prove(masked, smaller, example_inputs, on_kept(structure, keep))
    except ProofError:
        return False
    return True


def table_of(
    limit: Limit,
    model: nn.Module,
    structure: Structure,
    counts: Mapping[str, tuple[int, ...]],
    example_inputs: Any,
    timer: Timer,
) -> Table:
    """What the levels cost of that which is limited: seconds measured by `timer`, or exact costs.

    Args:
        counts: of `levels_of`.
    """
    if limit.metric not in _TIMED:
        return cost_table(structure.costs, limit.cost, counts)

    def smaller(kept: Mapping[str, int]) -> nn.Module:
        return cut(
            model, structure, {name: torch.arange(structure.sizes[name]) < count for name, count in kept.items()}
        )

    return latency_table(
        model, structure.groups, counts, smaller, example_inputs, opaque=structure.recorded, timer=timer
    )


def cost_table(costs: CostModel, metric: str, counts: Mapping[str, tuple[int, ...]]) -> Table:
    """What the levels cost of a metric of a cost model, to which no two groups contribute together."""
    entries = {name: tuple(costs.total(metric, {name: count}) for count in levels) for name, levels in counts.items()}
    return Table(costs.total(metric), counts, entries)


def allowed(limit: Limit, table: Table) -> float:
    """What a limit leaves for the levels beyond the cheapest of each group, in the unit of the table.

    Raises:
        BudgetError: not even those meet it; it names the nearest limit that they do.
    """
    if limit.metric == "speedup":
        most = table.whole / limit.value
    else:
        most = limit.value * table.whole if limit.relative else limit.value
    if table.lowest <= most + _TOLERANCE * table.whole:
        return max(most - table.lowest, 0.0)
    reached = table.whole / table.lowest if limit.metric == "speedup" else table.lowest
    text = f"{limit} is unreachable: with all modules at their cheapest levels "
    if limit.metric in _TIMED:
        text += f"{table.lowest * 1e3:.3g} ms of {table.whole * 1e3:.3g} ms are left"
    else:
        text += f"{table.lowest:g} of {table.whole:g} {limit.cost} are left"
    if table.lowest >= table.whole:
        raise BudgetError(f"{text}.")
    nearest = nearest_limit(limit, reached / table.whole if limit.relative else reached)
    raise BudgetError(f"{text}.", nearest=str(nearest))
