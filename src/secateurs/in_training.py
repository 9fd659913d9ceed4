"""From a model and a budget to a smaller model while it trains: a pruner at work, then one decision to report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .core.batch import Loss, take
from .core.budget import Budget
from .core.errors import OptionError
from .criteria.face import check_finite
from .graph.plan import digest
from .planning import batches_of, plan_of_masks, recipe_of
from .pruning import FineTune, Pruned
from .running import Clock, Stage, claim, take_place
from .summary import Findings, quality_of, summarize

__all__ = ["prune_in_training"]


def prune_in_training(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    pruner: Callable[[nn.Module, Any, int, dict[str, Any]], Any],
    *,
    recover: FineTune | None,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss | None = None,
    granularity: str = "weight",
    allocation: str = "uniform",
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
    measure: bool = True,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    on_stage: Stage | None = None,
    on_step: Callable[[Any], None] | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    recalibrate: bool = True,
    sensitivities: Sequence[float] = (),
    budgets: Sequence[str] = (),
) -> Pruned:
    """`model` trained by `recover` with a train-time pruner at work, as `prune` reports it.

    Args:
        pruner: from (model, optimizer, number of optimizer steps, {scope, ignore}) to the pruner.
        recover: the training.
        granularity, allocation: what the pruner follows, for the plan and the report.
        settings: the pruner's own, by which a checkpoint knows its run.
        recalibrate: without effect, since batch-norm statistics follow the training.
        sensitivities, budgets: refused, since nothing is scored once from which other decisions could be made.
        others: as for `prune`.

    Raises:
        OptionError: no training, no data for it, or a checkpoint of another run.
        ModelError: NaN or infinite weights.
    """
    if recover is None:
        raise OptionError("this method prunes while it trains: pass recover=FineTune(epochs=…, lr=…) and data=.")
    if sensitivities or budgets:
        raise OptionError(
            "a method that prunes while it trains makes one decision: leave out sensitivities= and budgets=."
        )
    training = recover.training_data(batches_of(data))
    tests = None if test is None else take(test, what="test data")
    check_finite(model)
    recipe = recipe_of(budget, granularity=granularity, allocation=allocation, scope=scope, ignore=ignore, seed=seed)
    if checkpoint is not None:
        claim(Path(checkpoint), {"recipe": recipe.to_dict(), "model": digest(model), "settings": dict(settings or {})})
    notes = Findings(model=name or type(model).__name__)
    clock = Clock(notes.seconds, on_stage)
    if tests is not None:
        notes.quality["before"] = quality_of(model, tests)
    made = copy.deepcopy(model)
    steps = recover.total_steps(training)
    chosen = {"scope": scope, "ignore": ignore}
    built: list[Any] = []

    def build(trained: nn.Module, optimizer: Any) -> Any:
        built.append(pruner(trained, optimizer, steps, chosen))
        return built[0]

    with clock("training"):
        notes.history = recover.run(
            made, model, training, pruner=build, loss=loss, seed=seed, checkpoint=checkpoint, on_step=on_step
        )
    masks = built[0].finalize()
    if tests is not None:
        notes.quality["pruned in training"] = quality_of(made, tests)
    decided = plan_of_masks(made, example_inputs, masks, recipe)
    with clock("measuring"):
        report = summarize(model, made, decided, example_inputs, notes, timed=measure)
    return Pruned(take_place(model, made) if inplace else made, decided, report, masks)
