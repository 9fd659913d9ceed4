"""The decision as data: what goes, why, and for which budget. It knows no model; `graph.plan` applies it to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from .allocate import allocate, floor_counts
from .budget import Budget
from .cost import CostModel
from .depth import LayerGroup
from .errors import BudgetError, OptionError, PlanError
from .experts import ExpertGroup
from .fit import fit
from .select import n_of_m_inputs, top
from .units import ChannelGroup, Group, WeightGroup

__all__ = ["Plan", "Recipe", "Step", "decide", "pack", "unpack"]

Measure = Callable[[Mapping[str, int]], float]
P = TypeVar("P", bound="Plan")


@dataclass(frozen=True)
class Recipe:
    """How a plan was made: enough to make it again from the same model.

    Args:
        budget: what was asked.
        criterion, criterion_options: how units were scored.
        allocation, allocation_options: how much from where.
        granularity: what a unit is, as given by the user.
        scope, ignore: patterns of names to prune (None for all), or to leave alone.
        floor: fewest units that stay in a group: a count, or a share of the group.
        round_to: kept widths are multiples of this, since hardware likes them; 1 for any. Of heads, as many stay as
            make such a width.
        seed: of everything random.
        keep_ids: of rows of embeddings, ids that stay.
        unknown: of rows of embeddings, the id that stands for those that were removed; None for none.

    Raises:
        OptionError: `round_to` or `seed` is no whole number.
    """

    budget: Budget
    criterion: str = "magnitude"
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "global"
    allocation_options: Mapping[str, Any] = field(default_factory=dict)
    granularity: str = "channel"
    scope: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    floor: int | float = 1
    round_to: int = 1
    seed: int = 0
    keep_ids: tuple[int, ...] = ()
    unknown: int | None = None

    def __post_init__(self) -> None:
        for name in ("round_to", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise OptionError(f"{name} is a whole number, got {getattr(self, name)!r}.")

    @property
    def ids_that_stay(self) -> tuple[int, ...]:
        """The ids that stay by request."""
        return self.keep_ids if self.unknown is None else (*self.keep_ids, self.unknown)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {**vars(self), "budget": str(self.budget)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote."""
        return cls(**{**data, "budget": Budget.parse(data["budget"]), "keep_ids": tuple(data.get("keep_ids", ()))})


@dataclass(frozen=True)
class Step:
    """What a plan does to one group: the units chosen, and the tensors that go along.

    Args:
        group: its name.
        kind: what a unit is.
        size, kept: number of units before and after.
        chosen: the tensor that produces the units; of layers, their container.
        along: the other tensors that are cut with it; of layers, which have none, those that go.
    """

    group: str
    kind: str
    size: int
    kept: int
    chosen: str
    along: tuple[str, ...]

    def __str__(self) -> str:
        some = f"{', '.join(self.along[:3])}{' …' if len(self.along) > 3 else ''}"
        if self.kind == "layer":
            return f"{self.group}: {self.size - self.kept} of {self.size} layers go: {some}"
        also = f"; also {some}" if self.along else ""
        return f"{self.group}: {self.size - self.kept} of {self.size} {self.kind}s go{also}"


def decide(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    costs: CostModel,
    recipe: Recipe,
    measure: Measure | None = None,
) -> dict[str, Tensor]:
    """Which units stay: bool [units] per group, meeting the recipe's budget.

    Args:
        groups: what can go.
        scores: float [units] per group, higher stays.
        costs: as functions of the kept counts.
        recipe: budget, allocation, floor and rounding are used.
        measure: seconds of a model with given kept counts; for latency and speed-up limits.

    Raises:
        BudgetError: the budget cannot be met; it names the nearest that can.
    """
    if recipe.budget.pattern is not None:
        return _by_pattern(groups, scores, recipe.budget)
    sizes = {g.name: g.size for g in groups}
    least = {g.name: getattr(g, "least", 0) for g in groups}
    floors = {name: max(count, least[name]) for name, count in floor_counts(sizes, recipe.floor).items()}
    shapes = {g.name: g.shape for g in groups if isinstance(g, WeightGroup)}

    def allocated(keep_total: int) -> dict[str, int]:
        return allocate(
            recipe.allocation,
            scores,
            keep_total,
            shapes=shapes or None,
            floors=floors,
            **recipe.allocation_options,
        )

    counts = fit(
        recipe.budget,
        allocate=allocated,
        total_units=sum(sizes.values()),
        minimum_units=sum(floors.values()),
        costs=costs,
        sizes=sizes,
        measure=measure,
        round_to={
            g.name: g.multiple_for(recipe.round_to) if isinstance(g, ChannelGroup) else recipe.round_to for g in groups
        },
        floors=floors,
    )
    return {name: top(scores[name], count) for name, count in counts.items()}


def _by_pattern(groups: Sequence[Group], scores: Mapping[str, Tensor], budget: Budget) -> dict[str, Tensor]:
    pattern = budget.pattern
    assert pattern is not None
    if budget.limits:
        raise BudgetError(f"{pattern} fixes the sparsity, so it cannot be joined with {budget.limits[0]}.")
    keep: dict[str, Tensor] = {}
    for group in groups:
        if not isinstance(group, WeightGroup) or group.block != (1, 1):
            raise OptionError(f"{pattern} is a pattern of single weights; {group.name} has {group.kind} units.")
        keep[group.name] = n_of_m_inputs(
            scores[group.name].view(group.shape), pattern.keep, pattern.of, axis=group.inputs
        ).flatten()
    return keep


@dataclass(frozen=True, eq=False)
class Plan:
    """A decision over groups of units, with everything needed to make it again for another budget.

    Args:
        groups: what could go.
        scores: float32 [units] per group.
        keep: bool [units] per group.
        costs: of the model as functions of the kept counts.
        recipe: how the decision was made.
    """

    groups: tuple[Group, ...]
    scores: Mapping[str, Tensor]
    keep: Mapping[str, Tensor]
    costs: CostModel
    recipe: Recipe

    @property
    def counts(self) -> dict[str, int]:
        """Units kept per group."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    @property
    def sparsity(self) -> float:
        """The share of units removed, over all groups."""
        return 1 - sum(self.counts.values()) / max(sum(g.size for g in self.groups), 1)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Groups about to collapse: left with under 5% of their units, and under a quarter of what others keep."""
        counts, share = self.counts, min(0.05, (1 - self.sparsity) / 4)
        # Layers may all go: their container has others then, and the stream goes on without them.
        few = [g for g in self.groups if counts[g.name] < share * g.size and not isinstance(g, LayerGroup)]
        return tuple(f"{g.name} keeps {counts[g.name]} of {g.size} units; give floor=, or ask for less." for g in few)

    def cost(self, metric: str, relative: bool = True) -> float:
        """What is left of "params", "macs" or "bytes": a share of the whole model, or the figure itself."""
        left = self.costs.total(metric, self.counts)
        return left / self.costs.total(metric) if relative else left

    def steps(self) -> tuple[Step, ...]:
        """What is done, largest change first; groups that stay whole are left out."""
        counts = self.counts
        steps = [
            Step(g.name, g.kind, g.size, counts[g.name], *self._reach(g))
            for g in self.groups
            if counts[g.name] < g.size
        ]
        return tuple(sorted(steps, key=lambda s: s.kept / s.size))

    def _reach(self, group: Group) -> tuple[str, tuple[str, ...]]:
        if isinstance(group, LayerGroup):
            return group.container, group.gone(self.keep[group.name])
        if isinstance(group, ExpertGroup) and group.blocks:
            return group.name, group.gone(self.keep[group.name])
        return group.tensors[0], group.tensors[1:]

    def rebudget(self: P, budget: str | Budget, measure: Measure | None = None) -> P:
        """The plan for another budget from the same scores; nothing is scored again.

        Raises:
            BudgetError: the budget cannot be met, or is a time and `measure` is missing.
        """
        recipe = replace(self.recipe, budget=Budget.parse(budget))
        return replace(self, recipe=recipe, keep=decide(self.groups, self.scores, self.costs, recipe, measure))

    def diff(self, other: Plan) -> dict[str, tuple[int, int, int]]:
        """Where two plans differ: per group (kept here only, kept there only, kept by both).

        Raises:
            PlanError: the plans are over other groups.
        """
        if {g.name: g.size for g in self.groups} != {g.name: g.size for g in other.groups}:
            raise PlanError("these plans are over different groups of units and cannot be compared.")
        out: dict[str, tuple[int, int, int]] = {}
        for name, mine in self.keep.items():
            theirs = other.keep[name]
            if not torch.equal(mine, theirs):
                both = int((mine & theirs).sum())
                out[name] = (int(mine.sum()) - both, int(theirs.sum()) - both, both)
        return out

    def same_as(self, other: Plan) -> bool:
        """Whether both plans keep exactly the same units."""
        return not self.diff(other)

    def __str__(self) -> str:
        left = ", ".join(f"{self.cost(m):.1%} of {m}" for m in ("macs", "params") if m in self.costs.metrics)
        lines = [
            f"budget {self.recipe.budget}: {left} left; "
            f"{self.recipe.criterion}, {self.recipe.allocation}, {len(self.groups)} groups of {self.recipe.granularity}"
        ]
        steps = self.steps()
        lines += [f"  {step}" for step in steps[:10]]
        if len(steps) > 10:
            lines.append(f"  and {len(steps) - 10} more groups")
        if not steps:
            lines.append("  nothing to do: the model meets the budget as it is")
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])


def pack(mask: Tensor) -> Tensor:
    """A bool mask [n] as bits: uint8 [ceil(n / 8)], the first entry in the lowest bit."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The bool mask [n] that `pack` packed."""
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:n].bool()
