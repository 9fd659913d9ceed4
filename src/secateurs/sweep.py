"""Many decisions from one scoring: how sensitive each group is, and what accuracy each budget leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .core.errors import OptionError
from .core.select import top
from .core.units import Group
from .graph.cut import cut
from .graph.plan import ModelPlan
from .graph.structure import Structure
from .measure.latency import compare
from .measure.quality import evaluate
from .planning import timer
from .recover.batchnorm import recalibrate_batch_norm
from .report.data import FrontPoint

__all__ = ["front", "sensitivity"]


def sensitivity(
    model: nn.Module, plan: ModelPlan, test: Sequence[Any], sparsities: Iterable[float] = (0.25, 0.5, 0.75)
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Per group (sparsity, accuracy) pairs with only that group pruned, by the plan's scores; nothing is repaired.

    Args:
        model: that the plan was made for; it is not changed.
        plan: whose groups and scores are used.
        test: batches with labels; they are seen once per group and sparsity.
        sparsities: shares of the group's units, in [0, 1).

    Raises:
        OptionError: a sparsity outside [0, 1).
    """
    shares = tuple(sparsities)
    if any(not 0 <= share < 1 for share in shares):
        raise OptionError(f"sparsities must lie in [0, 1), got {shares}.")
    whole = {g.name: torch.ones(g.size, dtype=torch.bool) for g in plan.groups}
    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    for group in plan.groups:
        curve = []
        for share in shares:
            keep = {**whole, group.name: top(plan.scores[group.name], _kept(group, share))}
            applied = replace(plan, keep=keep)
            made, data = _applied(model, applied), list(applied.recode_batches(test))
            curve.append((share, evaluate(made, data, ("accuracy",))["accuracy"]))
        curves[group.name] = tuple(curve)
    return curves


def _kept(group: Group, share: float) -> int:
    """Units that stay without `share` of them, as many as the model's code allows."""
    multiple = getattr(group, "multiple", 1)
    wanted = max(1, getattr(group, "least", 0), round((1 - share) * group.size))
    return min(-(-wanted // multiple) * multiple, group.size)


def _applied(model: nn.Module, plan: ModelPlan) -> nn.Module:
    """The model without what goes; cut where it can be, since of a width under a norm and of experts zeros are more."""
    if isinstance(plan.structure, Structure):
        return cut(model, plan.structure, plan.keep)
    return plan.mask(model)


def front(
    model: nn.Module,
    plan: ModelPlan,
    budgets: Iterable[str],
    test: Sequence[Any],
    *,
    data: Sequence[Any] | None = None,
    timed: bool = True,
) -> tuple[FrontPoint, ...]:
    """What each budget leaves of MACs, latency and accuracy, without training; nothing is scored again.

    Args:
        model: that the plan was made for; it is not changed.
        plan: whose scores are used.
        budgets: in the budget grammar.
        test: batches with labels.
        data: batches on which batch-norm statistics are measured again; None to leave them.
        timed: whether to measure latency, in turn with the unpruned model.

    Raises:
        BudgetError: one of the budgets cannot be met.
    """
    measure = timer(model, plan.structure, plan.scores, plan.example_inputs)
    points = []
    for budget in budgets:
        decided = plan.rebudget(budget, measure)
        made = decided.mask(model) if decided.structure is None else decided.cut(model)
        if data is not None:
            recalibrate_batch_norm(made, decided.recode_batches(data))
        quality = evaluate(made, list(decided.recode_batches(test)), ("accuracy",))["accuracy"]
        inputs = {"before": plan.example_inputs, "after": decided.recode(plan.example_inputs)}
        speedup = compare({"before": model, "after": made}, inputs)["after"].speedup if timed else None
        left = None if speedup is None else 1 / speedup.median
        points.append(FrontPoint(str(decided.recipe.budget), decided.cost("macs"), left, quality))
    return tuple(points)
