"""From a model and a budget to a smaller model while it trains: a pruner at work, then one decision to report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .core.batch import Loss, take
from .core.budget import Budget
from .core.errors import OptionError
from .criteria.face import check_finite
from .graph.plan import ModelPlan, digest
from .planning import batches_of, plan_of_masks, recipe_of
from .pruning import FineTune, Pruned
from .recover.finetune import Data
from .running import Clock, Stage, claim, take_place
from .summary import Findings, quality_of, summarize

__all__ = ["Session", "prune_by_training", "prune_in_training"]


@dataclass(frozen=True)
class Session:
    """What a training that prunes works with.

    Args:
        original: the caller's model, untouched; a teacher.
        model: its copy, to be trained in place.
        recover, data: the training and its batches.
        tests: batches on which quality is measured; None for none.
        notes: what is found out on the way.
        clock: `with clock("training"):` tells a stage and times it.
    """

    original: nn.Module
    model: nn.Module
    recover: FineTune
    data: Data
    tests: list[Any] | None
    notes: Findings
    clock: Clock

    def test(self, stage: str) -> None:
        """None; the quality of the model at this stage is noted, if there are batches to test it on."""
        if self.tests is not None:
            self.notes.quality[stage] = quality_of(self.model, self.tests)


def prune_in_training(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    pruner: Callable[[nn.Module, Any, int, dict[str, Any]], Any],
    *,
    loss: Loss | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_step: Callable[[Any], None] | None = None,
    **common: Any,
) -> Pruned:
    """`model` trained by `recover` with a train-time pruner at work, as `prune` reports it.

    Args:
        pruner: from (model, optimizer, number of optimizer steps, {scope, ignore}) to the pruner.
        common: see `prune_by_training`.
        others: as for `prune`.

    Raises:
        OptionError: no training, no data for it, or a checkpoint of another run.
        ModelError: NaN or infinite weights.
    """

    def train(session: Session) -> dict[str, Tensor]:
        steps = session.recover.total_steps(session.data)
        built: list[Any] = []

        def build(trained: nn.Module, optimizer: Any) -> Any:
            built.append(pruner(trained, optimizer, steps, {"scope": scope, "ignore": ignore}))
            return built[0]

        with session.clock("training"):
            session.notes.history = session.recover.run(
                session.model, session.original, session.data, pruner=build, loss=loss, seed=seed,
                checkpoint=checkpoint, on_step=on_step,
            )  # fmt: skip
        masks: dict[str, Tensor] = built[0].finalize()
        session.test("pruned in training")
        return masks

    chosen: dict[str, Any] = {"scope": scope, "ignore": ignore, "seed": seed, "checkpoint": checkpoint}
    return prune_by_training(model, example_inputs, budget, train, **chosen, **common)


def prune_by_training(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    train: Callable[[Session], dict[str, Tensor]],
    *,
    recover: FineTune | None,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    granularity: str = "weight",
    allocation: str = "uniform",
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
    measure: bool = True,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    on_stage: Stage | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    recalibrate: bool = True,
    sensitivities: Sequence[float] = (),
    budgets: Sequence[str] = (),
    decide: Callable[[nn.Module, dict[str, Tensor]], ModelPlan] | None = None,
) -> Pruned:
    """`model` as `train` trains and prunes its copy, reported as `prune` does.

    Args:
        train: trains the session's model and notes the history; returns the masks that it ends with.
        recover: the training, or one of several.
        granularity, allocation: what the pruning follows, for the plan and the report.
        settings: the method's own, by which a checkpoint knows its run.
        recalibrate: without effect, since batch-norm statistics follow the training.
        sensitivities, budgets: refused, since nothing is scored once from which other decisions could be made.
        decide: from the trained model and its masks to the plan; default: `plan_of_masks`. A plan of coupled units is
            cut, and no masks are left.
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
    masks = train(Session(model, made, recover, training, tests, notes, clock))
    decided = plan_of_masks(made, example_inputs, masks, recipe) if decide is None else decide(made, masks)
    if decided.structure is not None:
        with clock("cutting"):
            made, notes.proof = decided.proven_cut(made)
        masks = {}
    with clock("measuring"):
        report = summarize(model, made, decided, example_inputs, notes, timed=measure)
    return Pruned(take_place(model, made) if inplace else made, decided, report, masks)
