"""How much from where: allocation rules turn scores and a total into kept counts per group.

There are two kinds of rule. A *density* rule says from shapes which share of each group stays (uniform, uniform+, er,
erk, erk+, given); `apportion` turns shares into counts. A *score* rule puts the scores of all groups on one scale
(global, lamp); the highest of all groups together stay. Either way the counts add up to the total exactly, and floors
and caps hold.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .apportion import apportion
from .budget import nearest_sparsity
from .errors import BudgetError, OptionError, unknown_name
from .select import top, top_across
from .units import normalized

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

Kind = Literal["densities", "scores"]
Shapes = Mapping[str, tuple[int, ...]]
Rule = TypeVar("Rule", bound=Callable[..., Any])


@dataclass(frozen=True)
class Allocation:
    """A named rule and what it needs.

    Args:
        name: as in `allocate(name, …)`.
        rule: for kind "densities" `(shapes, density, **options) -> {group: density}`; for kind "scores"
            `(scores of one group, **options) -> scores that compare across groups`, of the same order within the group.
        kind: what the rule returns.
        needs_shapes: whether the rule looks at weight shapes, not at sizes alone; channels and heads have none.
    """

    name: str
    rule: Callable[..., Any]
    kind: Kind
    needs_shapes: bool = False

    @property
    def needs_scores(self) -> bool:
        """Whether the counts depend on scores; otherwise sizes do."""
        return self.kind == "scores"

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the rule takes."""
        taken = inspect.signature(self.rule).parameters
        return tuple(taken)[2 if self.kind == "densities" else 1 :]


_ALLOCATIONS: dict[str, Allocation] = {}


def allocation(name: str, *, kind: Kind = "densities", needs_shapes: bool = False) -> Callable[[Rule], Rule]:
    """A decorator that registers a rule as allocation `name`; see `Allocation` for what the rule is called with.

    Raises:
        OptionError: there is an allocation of that name already.
    """

    def register(rule: Rule) -> Rule:
        if name in _ALLOCATIONS:
            raise OptionError(f"allocation {name!r} is defined twice; choose another name.")
        _ALLOCATIONS[name] = Allocation(name, rule, kind, needs_shapes)
        return rule

    return register


def get_allocation(name: str) -> Allocation:
    """The allocation called `name`.

    Raises:
        OptionError: there is no such allocation; names the nearest three.
    """
    if name not in _ALLOCATIONS:
        raise unknown_name("allocation", name, _ALLOCATIONS)
    return _ALLOCATIONS[name]


def allocations() -> tuple[Allocation, ...]:
    """All registered allocations, by name."""
    return tuple(_ALLOCATIONS[name] for name in sorted(_ALLOCATIONS))


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
    comparable = {name: entry.rule(_scores_for(entry, name, value), **options) for name, value in scores.items()}
    return _ranked_together(comparable, keep_total, low, high)


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
        OptionError: a negative number, or a share outside [0, 1].
    """
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


def lamp_scores(scores: Tensor) -> Tensor:
    """LAMP scores: each squared magnitude over the sum of it and all larger ones, float64 [units].

    Lee et al., arXiv 2010.07611, equation 2: `score(u) = w_u² / Σ_{v ≥ u} w_v²`, with the weights in ascending order.
    The largest of a group has score 1, whatever its scale. Among equals the earlier index gets the higher score.

    Raises:
        OptionError: a negative score: LAMP is defined for magnitudes.
    """
    if bool(((scores < 0) | scores.isinf()).any()):
        raise OptionError("lamp is defined for finite magnitudes, got negative or infinite scores; use global.")
    ordered, order = scores.sort(descending=True, stable=True)
    squares = ordered.double().square()
    ranked = squares / squares.cumsum(0)
    # Units of magnitude 0 in a group that is 0 up to there: 0/0 is "worth nothing".
    return torch.empty_like(ranked).scatter_(0, order, ranked.nan_to_num(0.0))


@allocation("uniform")
def _uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density everywhere."""
    return dict.fromkeys(shapes, density)


@allocation("uniform+")
def _uniform_plus(
    shapes: Shapes, density: float, first: str | None = None, classifier: str | None = None
) -> dict[str, float]:
    """Uniform, with the first weight dense and the classifier at 0.2 or more (arXiv 2202.02643; Gale et al. 2019).

    All others share what is left, so that the mean is met: `D' = (D·T − N_first − 0.2·N_fc)/(T − N_first − N_fc)`. The
    published code divides by T instead. From density 0.2 on the classifier is one of the others.
    """
    held = {_member(shapes, first, 0, "first"): 1.0}
    last = _member(shapes, classifier, -1, "classifier")
    if density < 0.2 and last not in held and len(shapes) > 2:
        held[last] = 0.2
    sizes = _sizes(shapes)
    rest = _rest_density("uniform+", sizes, density, held)
    return {name: held.get(name, rest) for name in shapes}


@allocation("er", needs_shapes=True)
def _er(shapes: Shapes, density: float, power: float = 1.0) -> dict[str, float]:
    """Erdős–Rényi: density in proportion to `((out + in)/(out·in))^power`, the first two axes (Mocanu et al. 2018)."""
    return _clipped(_sizes(shapes), density, {name: _sparseness(shape[:2], power) for name, shape in shapes.items()})


@allocation("erk", needs_shapes=True)
def _erk(shapes: Shapes, density: float, power: float = 1.0) -> dict[str, float]:
    """Erdős–Rényi with the kernel: the same over all axes (Evci et al. 2020, RigL)."""
    return _clipped(_sizes(shapes), density, {name: _sparseness(shape, power) for name, shape in shapes.items()})


@allocation("erk+", needs_shapes=True)
def _erk_plus(
    shapes: Shapes, density: float, power: float = 1.0, fc_density: float = 1.0, classifier: str | None = None
) -> dict[str, float]:
    """ERK over all weights but the classifier (default: the last), which has `fc_density` (arXiv 2202.02643)."""
    if not 0 <= fc_density <= 1:
        raise OptionError(f"fc_density must lie in [0, 1], got {fc_density}.")
    last = _member(shapes, classifier, -1, "classifier")
    sizes = _sizes(shapes)
    rest = _rest_density("erk+", sizes, density, {last: fc_density})
    others = {name: shape for name, shape in shapes.items() if name != last}
    # Where even dense others do not reach the target, the classifier has to.
    rest = min(rest, 1.0)
    own = density * sum(sizes.values()) - rest * (sum(sizes.values()) - sizes[last])
    return {**_erk(others, rest, power), last: own / sizes[last]} if others else {last: density}


@allocation("given")
def _given(shapes: Shapes, density: float, densities: Mapping[str, float]) -> dict[str, float]:
    """Densities from the caller, for every group; their proportions hold, their level follows the total."""
    faults = [f"{kind} {', '.join(names)}" for kind, names in _name_faults(shapes, densities).items() if names]
    wrong = {name: value for name, value in densities.items() if not 0 <= value <= 1}
    faults += [f"a density of {value} for {name}, outside [0, 1]" for name, value in wrong.items()]
    if faults:
        raise OptionError(f"the given densities do not fit the model: {'; '.join(faults)}.")
    return {name: densities[name] for name in shapes}


@allocation("global", kind="scores")
def _global(scores: Tensor, normalize: str = "none") -> Tensor:
    """Scores as they are, or normalized within the group first (`units.normalized`)."""
    return normalized(scores if scores.is_floating_point() else scores.double(), normalize)


@allocation("lamp", kind="scores")
def _lamp(scores: Tensor) -> Tensor:
    """See `lamp_scores`."""
    return lamp_scores(scores.flatten())


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


def _clipped(sizes: Mapping[str, int], density: float, raw: Mapping[str, float]) -> dict[str, float]:
    """Densities `min(1, ε·raw)` whose mean over all weights is `density`; ε is solved with the dense ones taken out."""
    dense: set[str] = set()
    while len(dense) < len(sizes):
        room = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        open_raw = {name: value for name, value in raw.items() if name not in dense}
        scale = room / math.fsum(value * sizes[name] for name, value in open_raw.items())
        highest = max(open_raw.values())
        if highest * scale <= 1:
            break
        dense |= {name for name, value in open_raw.items() if value == highest}
    return {name: 1.0 if name in dense else scale * raw[name] for name in sizes}


def _sparseness(shape: Iterable[int], power: float) -> float:
    axes = tuple(shape)
    return math.pow(sum(axes) / math.prod(axes), power) if axes else 1.0


def _rest_density(rule: str, sizes: Mapping[str, int], density: float, held: Mapping[str, float]) -> float:
    """The density of all weights that are not held at a density of their own; may exceed 1."""
    total = sum(sizes.values())
    taken = math.fsum(held[name] * sizes[name] for name in held)
    others = total - sum(sizes[name] for name in held)
    if density * total < taken - 1e-9 * taken:
        holds = " and ".join(f"{name} at density {value:g}" for name, value in held.items())
        raise BudgetError(
            f"{rule} holds {holds}, which is {taken:g} weights, but only {density * total:g} may stay.",
            nearest=str(nearest_sparsity(math.ceil(taken), total)),
        )
    return max(density * total - taken, 0.0) / others if others else 0.0


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _member(shapes: Shapes, name: str | None, default: int, role: str) -> str:
    if name is None:
        return list(shapes)[default]
    if name not in shapes:
        raise OptionError(f"there is no {role} {name!r}; the groups are {', '.join(shapes)}.")
    return name


def _name_faults(wanted: Iterable[str], got: Iterable[str]) -> dict[str, list[str]]:
    known, given = list(wanted), list(got)
    return {"missing are": [n for n in known if n not in given], "unknown are": [n for n in given if n not in known]}


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
