"""Magnitude pruners for a training loop: gradual (Zhu & Gupta) and global (Global MP).

Gradual: Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878. Along `s(t) = s_f + (s_i − s_f)·(1 − q)³` masks are
renewed every few steps, per tensor, while the network trains. Global: Gupta et al., arXiv 2209.14624: one threshold for
the whole network, with a minimum of survivors in every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from ..core.allocate import densities, floor_counts, get_allocation
from ..core.budget import units_kept
from ..core.errors import BudgetError, OptionError, unknown_name
from ..core.schedule import Cubic, OneShot, Schedule
from ..core.units import Reduce, WeightGroup
from .masking import Revive
from .pruner import Pruner
from .scope import prunable_weights
from .scoring import Bound, Criterion, Magnitude, Motion, Scorer
from .update import Counts, Ranked, by_rule, per_tensor, tensor_targets

__all__ = ["GlobalMagnitude", "GradualMagnitude", "block_groups"]

Patterns = str | Sequence[str]
# Global MP's code: 0.05 % of ALL weights, the same number for every tensor.
_MINIMUM_SHARE = 0.0005


def GradualMagnitude(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    end: int,
    begin: int = 0,
    sparsity: float = 0.9,
    initial: float = 0.0,
    every: int = 100,
    exponent: float = 3.0,
    force_final: bool = True,
    allocation: str | Mapping[str, float] = "uniform",
    targets: Mapping[str, float] | None = None,
    criterion: str | Criterion = "magnitude",
    revive: Revive = "never",
    block: tuple[int, int] = (1, 1),
    pool: Literal["mean", "max"] = "mean",
    floor: int | float = 1,
    scope: Patterns | None = None,
    ignore: Patterns = (),
    debug: bool = False,
    **options: Any,
) -> Pruner:
    """A `Pruner` that raises sparsity along a cubic curve while the model trains.

    Args:
        model: pruned in place; which weights: `prunable_weights(model, scope, ignore)`.
        optimizer: the one that trains it, or None (see `Pruner`).
        end: optimizer step at which `sparsity` is reached.
        begin: optimizer step of the first update (0, tfmot).
        sparsity: share of weights removed in the end, in [0, 1).
        initial: share removed at `begin` (0, the paper).
        every: optimizer steps between updates (100; the paper uses 100 to 1000).
        exponent: of the curve (3, the paper).
        force_final: update once more at `end` if `every` does not lead there.
        allocation: "uniform" gives every tensor the same sparsity (the paper); any other rule of `core.allocate`, such
            as "global" or "erk", divides the whole; a mapping gives densities by name in fixed proportion.
        targets: final sparsity by regular expression for tensors that differ from `sparsity`; with "uniform" only, and
            with `initial` 0.
        criterion: "magnitude" (the paper); "first-order" or "second-order" (see `Motion`); or a function
            `(model, groups) -> {group name: scores}`, such as `partial(criteria.score, "taylor", data=batches)`.
        revive: "never", "value" (the original code), "one-step" (tfmot) or "straight-through": see `Masks`.
        block: rows and columns of the blocks that go together, of a weight seen as [shape[0], rest]; -1 for all.
        pool: a block's score from its entries: "mean" (the code) or "max".
        floor: the fewest units kept in each tensor; an int counts them (1, tfmot), a float is a share of the tensor.
        scope: patterns of the weights to prune.
        ignore: patterns of weights to leave out.
        debug: check the masks at every step.
        **options: of the allocation rule.

    Raises:
        OptionError: an argument outside what is allowed; BudgetError where the floors exceed what may stay.
        ModelError: nothing to prune.

    >>> layer = nn.Linear(10, 10)
    >>> pruner = GradualMagnitude(layer, None, sparsity=0.5, end=2, every=1)
    >>> for _ in range(2):
    ...     pruner.step()
    >>> pruner.sparsity
    0.5
    """
    schedule = Cubic(
        final=sparsity,
        begin=begin,
        end=end,
        initial=initial,
        every=every,
        exponent=exponent,
        force_final=force_final,
    )
    weights = prunable_weights(model, scope, ignore)
    groups = block_groups(weights, block)
    floors = floor_counts({group.name: group.size for group in groups}, floor)
    counts = _counts(allocation, groups, floors, schedule, targets, options)
    rule = Ranked(groups, _scorer(criterion, model, pool), counts, nested=revive == "never")
    return Pruner(model, optimizer, schedule, rule, weights, revive=revive, debug=debug)


def GlobalMagnitude(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    sparsity: float = 0.9,
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
    floor: int | float | None = None,
    criterion: str | Criterion = "magnitude",
    revive: Revive = "never",
    scope: Patterns | None = None,
    ignore: Patterns = (),
    debug: bool = False,
) -> Pruner:
    """A `Pruner` that ranks all weights of the network together: at once, or along a cubic curve if `end` is given.

    Args:
        model: pruned in place; which weights: `prunable_weights(model, scope, ignore)`.
        optimizer: the one that trains it, or None (see `Pruner`).
        sparsity: share of all weights removed in the end, in [0, 1).
        begin: optimizer step of the only update, or of the first (0: here and now).
        end: optimizer step of the last update; None prunes once, at `begin`.
        every: optimizer steps between updates.
        floor: the fewest weights kept in each tensor. None: `⌊0.0005 · all weights⌋`, as in the published code; a
            tensor smaller than that stays dense. 0: no floor. An int counts weights, a float is a share of the tensor.
        criterion: see `GradualMagnitude`; any global criterion may have floors.
        revive: see `Masks`.
        scope: patterns of the weights to prune.
        ignore: patterns of weights to leave out.
        debug: check the masks at every step.

    Raises:
        OptionError: an argument outside what is allowed; BudgetError where the floors exceed what may stay.
        ModelError: nothing to prune.

    >>> GlobalMagnitude(nn.Linear(10, 10), sparsity=0.75).sparsity
    0.75
    """
    schedule = OneShot(sparsity, begin) if end is None else Cubic(final=sparsity, begin=begin, end=end, every=every)
    weights = prunable_weights(model, scope, ignore)
    groups = block_groups(weights, (1, 1))
    sizes = {group.name: group.size for group in groups}
    floors = floor_counts(sizes, int(sum(sizes.values()) * _MINIMUM_SHARE) if floor is None else floor)
    counts = _counts("global", groups, floors, schedule, None, {})
    rule = Ranked(groups, _scorer(criterion, model, "mean"), counts, nested=revive == "never")
    return Pruner(model, optimizer, schedule, rule, weights, revive=revive, debug=debug)


def block_groups(weights: Mapping[str, nn.Parameter], block: tuple[int, int]) -> tuple[WeightGroup, ...]:
    """One group a weight, of blocks of these rows and columns; -1 for all of them."""
    groups = []
    for name, weight in weights.items():
        rows, columns = WeightGroup(name, tuple(weight.shape)).matrix
        size = (rows if block[0] == -1 else block[0], columns if block[1] == -1 else block[1])
        groups.append(WeightGroup(name, tuple(weight.shape), size))
    return tuple(groups)


def _counts(
    allocation: str | Mapping[str, float],
    groups: Sequence[WeightGroup],
    floors: Mapping[str, int],
    schedule: Schedule,
    targets: Mapping[str, float] | None,
    options: Mapping[str, Any],
) -> Counts:
    if allocation == "uniform":
        _only_options(allocation, (), options)
        if targets and schedule(0) > 0:
            raise OptionError("targets scale the schedule from 0, so they need initial=0.")
        return per_tensor(schedule.final, tensor_targets(targets or {}, [g.name for g in groups]), floors)
    if targets:
        raise OptionError(f"targets are for allocation 'uniform'; {allocation!r} sets the tensors' sparsity itself.")
    total = sum(group.size for group in groups)
    if sum(floors.values()) > units_kept(schedule.final, total):
        raise BudgetError(
            f"sparsity {schedule.final:g} leaves {units_kept(schedule.final, total)} of {total} units, but the floors "
            f"of the tensors add up to {sum(floors.values())}; lower the sparsity or the floor."
        )
    if not isinstance(allocation, str):
        return by_rule("given", groups, floors, densities=allocation, **options)
    entry = get_allocation(allocation)
    _only_options(allocation, entry.options, options)
    if not entry.needs_scores:
        # What the rule cannot meet at the end is refused now and not after hours of training.
        densities(allocation, {group.name: group.shape for group in groups}, 1 - schedule.final, **options)
    return by_rule(allocation, groups, floors, **options)


def _only_options(allocation: str, known: Sequence[str], given: Mapping[str, Any]) -> None:
    wrong = [name for name in given if name not in known]
    if wrong:
        takes = ", ".join(known) or "none"
        raise OptionError(f"allocation {allocation!r} has no option {', '.join(wrong)}; its options are: {takes}.")


def _scorer(criterion: str | Criterion, model: nn.Module, pool: Reduce) -> Scorer:
    match criterion:
        case "magnitude":
            return Magnitude(pool)
        case "first-order":
            return Motion(1, pool=pool)
        case "second-order":
            return Motion(2, pool=pool)
        case str():
            raise unknown_name("train-time criterion", criterion, ("magnitude", "first-order", "second-order"))
    return Bound(criterion, model)
