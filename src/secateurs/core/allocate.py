"""How much from where: allocation rules turn scores and a total into kept counts per group.

What a *density* or a *count* rule gives (`allocation_rules`) is apportioned as whole units; under a *score* rule the
highest of all groups together stay. Either way the counts add up to the total exactly, and floors and caps hold.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .allocation_rules import Allocation, Shapes, allocation, allocations, get_allocation, lamp_scores
from .apportion import apportion
from .budget import nearest_sparsity
from .errors import BudgetError, OptionError
from .select import top, top_across

__all__ = [
    "Allocation",
    "allocate",
    "allocation",
    "allocations",
    "densities",
    "floor_counts",
    "get_allocation",
    "lamp_scores",
    "shares",
]


def allocate(
    rule: str,
    scores: Mapping[str, Tensor | int],
    keep_total: int,
    *,
    shapes: Shapes | None = None,
    floors: Mapping[str, int] | None = None,
    caps: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, int]:
    """How many units of each group stay: counts that add up to `keep_total` exactly.

    Args:
        rule: name of an allocation.
        scores: per group its unit scores, higher = more important; for a rule that needs none, its size will do.
        keep_total: number of units that stay, over all groups.
        shapes: per group the shape of its weight, output axis first; for er, erk and erk+.
        floors: the fewest units that must stay, per group (default 0; more than its size means all of them).
        caps: the most units that may stay, per group (default and at most its size).
        options: what the rule takes besides: see the rule.

    Raises:
        BudgetError: `keep_total` lies below the floors or above the caps; quotes both and the nearest feasible.
        OptionError: scores or shapes that the rule needs are missing, a name or an option is unknown, NaN in scores.

    >>> allocate("global", {"a": torch.tensor([9.0, 1.0]), "b": torch.tensor([5.0, 4.0, 3.0])}, 2)
    {'a': 1, 'b': 1}
    >>> allocate("uniform", {"a": 10, "b": 30}, 10, floors={"a": 5})
    {'a': 5, 'b': 5}
    """
    entry = get_allocation(rule)
    _check_options(entry, options)
    sizes = {name: value if isinstance(value, int) else value.numel() for name, value in scores.items()}
    low, high = _bounds(sizes, floors or {}, caps or {})
    _check_total(keep_total, low, high, sizes)
    if entry.kind == "densities":
        if keep_total == 0:
            return dict.fromkeys(sizes, 0)
        shares_kept = entry.rule(_shapes_for(entry, sizes, shapes), keep_total / sum(sizes.values()), **options)
        return apportion({name: shares_kept[name] * sizes[name] for name in sizes}, keep_total, low, high)
    found = {name: entry.rule(_scores_for(entry, name, value), **options) for name, value in scores.items()}
    if entry.kind == "counts":
        return apportion(found, keep_total, low, high)
    return _ranked_together(found, keep_total, low, high)


def densities(rule: str, shapes: Shapes, density: float, **options: Any) -> dict[str, float]:
    """The density of each weight under a density rule; weighted by their sizes they average to `density`.

    Args:
        rule: name of an allocation that needs no scores.
        shapes: per group the shape of its weight, output axis first.
        density: the share of all weights that stays, in (0, 1].
        options: what the rule takes besides: see the rule.

    Raises:
        OptionError: the rule needs scores, `density` is outside its range, or an option is unknown.
        BudgetError: the rule holds some weights at a density that is more than `density` allows.
    """
    entry = get_allocation(rule)
    if entry.needs_scores:
        raise OptionError(f"allocation {rule!r} takes its counts from scores, so shapes give no densities.")
    if not 0 < density <= 1:
        raise OptionError(f"density must lie in (0, 1], got {density}.")
    _check_options(entry, options)
    result: dict[str, float] = entry.rule(shapes, density, **options)
    return result


def floor_counts(sizes: Mapping[str, int], floor: int | float) -> dict[str, int]:
    """The fewest units of each group that must stay.

    Args:
        sizes: number of units per group.
        floor: an int is a number of units (a smaller group stays whole), a float a share of the group, rounded up, and
            at least one unit.

    Raises:
        OptionError: no number, a negative one, or a share outside [0, 1].
    """
    if not isinstance(floor, (int, float)):
        raise OptionError(f"a floor is a number of units or a share of them, got {floor!r}.")
    if isinstance(floor, int):
        if floor < 0:
            raise OptionError(f"a floor is a number of units of at least 0, got {floor}.")
        return {name: min(floor, size) for name, size in sizes.items()}
    if not 0 <= floor <= 1:
        raise OptionError(f"a floor given as a share must lie in [0, 1], got {floor}.")
    # A product such as 0.1·30 lies a rounding error above the integer that is meant.
    return {name: min(max(1, math.ceil(floor * size - 1e-9)), size) for name, size in sizes.items()}


def shares(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """The density of each group: kept units over all units. With `given`, they carry over to other positions or totals.

    This is how ratios are taken from SNIP, GraSP or global magnitude: `shares(allocate("global", scores, k), sizes)`.
    """
    return {name: counts[name] / sizes[name] for name in sizes}


def _ranked_together(
    scores: Mapping[str, Tensor], total: int, floors: Mapping[str, int], caps: Mapping[str, int]
) -> dict[str, int]:
    """Counts of the `total` highest over all groups, given that each group's best `floor` stay and no more than `cap`.

    The best `floor` of a group are out of the ranking because they stay anyway, those beyond `cap` because they cannot.
    What is left is one plain ranking, the fixed point of repeated water filling.
    """
    free = {name: _contested(values.flatten(), floors[name], caps[name]) for name, values in scores.items()}
    chosen = top_across(free, total - sum(floors.values()))
    return {name: floors[name] + int(mask.sum()) for name, mask in chosen.items()}


def _contested(scores: Tensor, floor: int, cap: int) -> Tensor:
    if floor == 0 and cap == scores.numel():
        return scores
    return scores[top(scores, cap) & ~top(scores, floor)]


def _bounds(
    sizes: Mapping[str, int], floors: Mapping[str, int], caps: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Floors and caps of every group, cut to its size."""
    faults = [f"no group is called {name!r}" for name in (*floors, *caps) if name not in sizes]
    low = {name: min(floors.get(name, 0), size) for name, size in sizes.items()}
    high = {name: min(caps.get(name, size), size) for name, size in sizes.items()}
    for name in sizes:
        if not 0 <= low[name] <= high[name]:
            faults.append(f"{name} has floor {low[name]} and cap {high[name]}, but 0 <= floor <= cap must hold")
    if not sizes:
        faults.append("there is no group to allocate to")
    if faults:
        raise OptionError(f"cannot allocate: {'; '.join(faults)}.")
    return low, high


def _check_total(keep: int, floors: Mapping[str, int], caps: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    total, least, most = sum(sizes.values()), sum(floors.values()), sum(caps.values())
    if keep < least:
        raise BudgetError(
            f"{keep} of {total} units are to stay, but the floors of the groups add up to {least}.",
            nearest=str(nearest_sparsity(least, total)),
        )
    if keep > most:
        raise BudgetError(
            f"{keep} of {total} units are to stay, but the caps of the groups add up to {most}.",
            nearest=str(nearest_sparsity(most, total)) if most else None,
        )


def _check_options(entry: Allocation, options: Mapping[str, Any]) -> None:
    unknown = [name for name in options if name not in entry.options]
    if unknown:
        takes = ", ".join(entry.options) or "none"
        raise OptionError(f"allocation {entry.name!r} has no option {', '.join(unknown)}; its options are: {takes}.")
    needed = [p.name for p in inspect.signature(entry.rule).parameters.values() if p.default is p.empty]
    missing = [name for name in needed if name in entry.options and name not in options]
    if missing:
        raise OptionError(f"allocation {entry.name!r} needs the option {', '.join(missing)}.")


def _shapes_for(entry: Allocation, sizes: Mapping[str, int], shapes: Shapes | None) -> Shapes:
    if not entry.needs_shapes:
        return {name: (size,) for name, size in sizes.items()}
    missing = [name for name in sizes if name not in (shapes or {})]
    if shapes is None or missing:
        raise OptionError(
            f"allocation {entry.name!r} derives densities from weight shapes, which {', '.join(missing)} "
            "have not (channels and heads have none); use uniform, global or lamp there."
        )
    return {name: shapes[name] for name in sizes}


def _scores_for(entry: Allocation, name: str, value: Tensor | int) -> Tensor:
    if isinstance(value, int):
        raise OptionError(f"allocation {entry.name!r} ranks scores, but {name} has only a size; score it first.")
    bad = int(value.isnan().sum())
    if bad:
        raise OptionError(f"{bad} of {value.numel()} scores of {name} are NaN; mend the model or the criterion.")
    return value
