"""ZipLM: attention heads and inner channels go until the model is as fast as asked, by a table of measured times.

Kurtic, Frantar and Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language Models", NeurIPS 2023, arXiv
2302.04089. Unit: heads (of grouped queries: a key-value head with its queries) and inner channels of the feed-forward
layers of a transformer's blocks, cut out. When: after training, in forward passes over calibration data without
gradients; or gradually, each step followed by training. How:

    1. table     seconds of an attention at each number of heads, of a feed-forward layer at the widths m·0.9^i for
                 i = 0 … 42, and of the dropped ones, measured on this machine for the batch and length of the example
                 inputs; the model takes a fixed part and the sum of its entries (`measure.latency_table`)
    2. database  for the matrix that reads the units, with H = (2/n)·Σ x·xᵀ of the unpruned model: of all S the one
                 with least tr(W_S·([H⁻¹]_SS)⁻¹·W_Sᵀ) goes, W ← W - W_S·([H⁻¹]_SS)⁻¹·[H⁻¹]_S,:, and H⁻¹ follows; every
                 level comes out of one pass (`solvers.structured_obs`), with its error p = ‖(W_s - W)·X‖/‖W·X‖
    3. search    levels of least Σ c·p within the budget, by dynamic programming over 10,000 buckets; the coefficients
                 c are those for which the stitched model has the least loss on the calibration data (`core.dynamic`)
    4. stitch    the chosen matrices, and the cut
    5. gradual   for each of several targets: prune, train, save, go on (`family`); the loss is l1·task + l2·KL of the
                 teacher's logits + l3·mean over layers and tokens of ‖h_student - h_teacher‖² (`TokenDistilled`)

Defaults. Damping 0.01, 100 random starts, a tenth of the coefficients drawn anew, 100 failures a stage (published code
of SPDY, whose search this is). Lambdas (0, 1, 0.5) are a starting point; the paper's depend on the task.

Not as published. Modules are timed within the model, all of one shape cut to a level together, since one alone takes
another time. Prices are rounded so that a budget is never exceeded. Equal coefficients are tried, too. A module is
dropped as a whole, down to its bias, where the cut is proven to do so; elsewhere, and in the attention of models that
generate, whose caches count tokens by it, one head or channel stays. Dropped modules have the time that was measured,
not 0. Statistics are those of the unpruned model for all modules. "macs<=50%", "params<=50%" and "bytes<=50%" go the
same way with a table of exact costs. Without labels the loss is the distance from the unpruned model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from ...core.batch import Loss, take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.dynamic import Found, cheapest, search
from ...core.errors import OptionError
from ...core.levels import Table
from ...core.plan import Recipe
from ...core.select import top
from ...core.state import read_state, write_state
from ...criteria.face import check_finite
from ...graph.infer import infer
from ...graph.plan import ModelPlan, digest
from ...graph.structure import Structure, fingerprint
from ...graph.twin import twin
from ...measure.latency_table import Timer, side_by_side
from ...planning import batches_of, recipe_of
from ...pruning import FineTune, Pruned, completed
from ...recover.context import seeded
from ...running import Clock, Stage, claim
from ...solvers import weight_of
from ...summary import Findings, quality_of
from ..offered import offered
from ..parameters import Between, OneOf, check
from ._database import Database, build, consumers_of
from ._tables import allowed, levels_of, limit_of, table_of
from ._trial import Trial

__all__ = ["METHOD", "ZipLM", "predicted_speedup", "ziplm"]

_PLAN, _WEIGHTS = "plan.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class ZipLM:
    """Hyperparameters.

    Args:
        damping: share of the mean diagonal of H added to it (0.01).
        starts: random coefficients that are tried first (100).
        share: of the coefficients, drawn anew at a time (0.1).
        failures: draws in a row without success that end a stage of the search (100).
        buckets: parts of the budget in the dynamic programming (10,000).
        factor, steps: widths are m·factor^i for i = 0 … steps (0.9 and 42).
        prior: "error", p as above (default), or "squared error", p², by which errors spread over modules.
    """

    damping: Annotated[float, Between(0)] = 0.01
    starts: Annotated[int, Between(0, whole=True)] = 100
    share: Annotated[float, Between(0, 1, closed="both")] = 0.1
    failures: Annotated[int, Between(0, whole=True)] = 100
    buckets: Annotated[int, Between(1, whole=True)] = 10_000
    factor: Annotated[float, Between(0, 1, closed="neither")] = 0.9
    steps: Annotated[int, Between(1, whole=True)] = 42
    prior: Annotated[Literal["error", "squared error"], OneOf(("error", "squared error"))] = "error"

    def __post_init__(self) -> None:
        check(self)


def ziplm(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    *,
    options: ZipLM | None = None,
    timer: Timer = side_by_side,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss | None = None,
    recover: FineTune | None = None,
    recalibrate: bool = True,
    measure: bool = True,
    sensitivities: Sequence[float] = (),
    budgets: Sequence[str] = (),
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    on_stage: Stage | None = None,
    on_step: Callable[[Any], None] | None = None,
    name: str | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
) -> Pruned:
    """A copy of `model` that takes as little time as asked, on this machine and for inputs like the example's.

    The plan's recipe has the predicted cost beside that of the whole model (`predicted_speedup`); of a limit on time
    the report has it beside what was measured. The plan does not hold the solved weights: save the result.

    Args:
        model: a transformer; any model in which one matrix reads each width.
        example_inputs: of the batch size and sequence length that shall be fast.
        budget: one limit: "speedup>=2x", "latency<=5ms", or of "macs", "params" or "bytes".
        options: hyperparameters.
        timer: how a smaller model is timed; default: medians of repeated runs, in turn with the whole model.
        data: calibration batches; with labels the search minimises the loss, else the distance from the outputs of the
            unpruned model, which are then held in memory.
        loss: of the search and of `recover`.
        sensitivities, budgets: refused, since other decisions need other tables and searches.
        checkpoint: a folder that keeps the plan, the solved weights and the training.
        others: as for `prune`.

    Raises:
        BudgetError: several limits, one of another metric, or one that cannot be met; it names the nearest that can.
        DataError: calibration data are missing or empty.
        ModelError: nothing can go, or a matrix that reads what goes cannot be solved.
        OptionError: an argument outside what is allowed, or a checkpoint of another run.
    """
    how = options or ZipLM()
    if sensitivities or budgets:
        raise OptionError("ziplm makes one decision: leave out sensitivities= and budgets=.")
    limit_of(Budget.parse(budget))
    batches = take(data)
    tests = None if test is None else take(test, what="test data")
    if recover is not None:
        recover.training_data(batches)
    check_finite(model)
    recipe = recipe_of(budget, criterion="structured-obs", scope=scope, ignore=ignore, floor=1, seed=seed)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        claim(folder, {"recipe": recipe.to_dict(), "model": digest(model), "settings": asdict(how)})
    notes = Findings(model=name or type(model).__name__)
    clock = Clock(notes.seconds, on_stage)
    if folder is not None and (folder / _PLAN).exists():
        decided, weights = ModelPlan.load(folder / _PLAN), read_state(folder / _WEIGHTS, "weights")
    else:
        decided, weights = _decided(model, example_inputs, recipe, how, batches, loss, timer, clock)
        if folder is not None:
            write_state(folder / _WEIGHTS, weights, "weights")
            decided.save(folder / _PLAN)
    if decided.recipe.criterion_options["metric"] in ("speedup", "latency"):
        notes.predicted_speedup = predicted_speedup(decided)
    with clock("cutting"):
        made, notes.proof = decided.proven_cut(twin(model, weights))
    if tests is not None:
        with clock("testing"):
            notes.quality["before"] = quality_of(model, tests)
            notes.quality["one-shot"] = quality_of(made, tests)
    return completed(
        model, made, decided, {}, example_inputs, notes, clock, data=batches_of(batches), tests=tests, loss=loss,
        recover=recover, recalibrate=recalibrate, measure=measure, inplace=inplace, folder=folder, on_step=on_step,
    )  # fmt: skip


def predicted_speedup(plan: ModelPlan) -> float:
    """How many times faster, or cheaper, than the whole model the table of a plan of `ziplm` says its model is."""
    found = plan.recipe.criterion_options
    return float(found["whole"] / found["predicted"])


def _decided(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    how: ZipLM,
    batches: list[Any],
    loss: Loss | None,
    timer: Timer,
    clock: Clock,
) -> tuple[ModelPlan, dict[str, Tensor]]:
    """The plan, and the weights of those matrices that make up for what goes."""
    limit = limit_of(recipe.budget)
    with clock("planning"):
        names = list(offered(model, example_inputs, ("channel", "head"), scope=recipe.scope, ignore=recipe.ignore))
        structure = infer(model, example_inputs, entangled=False).restricted(names)
        consumers = consumers_of(model, structure.groups)
        structure = structure.restricted(consumers)
        counts = levels_of(model, structure, example_inputs, how.factor, how.steps)
    with clock("timing"):
        table = table_of(limit, model, structure, counts, example_inputs, timer)
        spendable = allowed(limit, table)
    with TemporaryDirectory() as drafts:
        database = Database(Path(drafts), counts, consumers)
        with clock("solving"), seeded(recipe.seed, "solving"):
            build(model, database, batches, damping=how.damping)
        with clock("searching"):
            found, kept = _searched(model, database, table, spendable, how, batches, loss, recipe.seed)
        weights = {
            weight_of(consumers[group].layer): database.weight(model, group, count).clone()
            for group, count in kept.items()
            if count < counts[group][0]
        }
    scores = {group: database.ranks(group) for group in counts}
    known = {"metric": limit.metric, "whole": table.whole, "predicted": table.total(kept)}
    known |= {"calibration_loss": found.loss, "evaluations": found.evaluations}
    return _plan(model, example_inputs, recipe, structure, scores, kept, known), weights


def _searched(
    model: nn.Module,
    database: Database,
    table: Table,
    spendable: float,
    how: ZipLM,
    batches: list[Any],
    loss: Loss | None,
    seed: int,
) -> tuple[Found, dict[str, int]]:
    """What the search found, and the units that each group keeps."""
    groups = list(database.counts)
    power = 2 if how.prior == "squared error" else 1
    priors = [[error**power for error in database.solved[group].errors] for group in groups]
    prices = [table.above[group] for group in groups]
    trial = Trial(model, database, batches, loss)

    def kept(choice: tuple[int, ...]) -> dict[str, int]:
        return {group: database.counts[group][level] for group, level in zip(groups, choice, strict=True)}

    def solve(coefficients: Tensor) -> tuple[int, ...]:
        errors = [[float(c) * p for p in levels] for c, levels in zip(coefficients, priors, strict=True)]
        return cheapest(errors, prices, spendable, buckets=how.buckets)

    found = search(
        solve, lambda choice: trial.loss(kept(choice)), len(groups), starts=how.starts, share=how.share,
        failures=how.failures, seed=seed,
    )  # fmt: skip
    return found, kept(found.choice)


def _plan(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    structure: Structure,
    scores: dict[str, Tensor],
    kept: dict[str, int],
    known: dict[str, Any],
) -> ModelPlan:
    return ModelPlan(
        groups=structure.groups,
        scores=scores,
        keep={group: top(scores[group], count) for group, count in kept.items()},
        costs=structure.costs,
        recipe=replace(recipe, criterion_options=known),
        fingerprint=fingerprint(model),
        digest=digest(model),
        structure=structure,
        example_inputs=example_inputs,
    )


METHOD = method(
    Method(
        name="ziplm",
        title="ZipLM: Inference-Aware Structured Pruning of Language Models",
        arxiv="2302.04089",
        units=("head", "channel"),
        when=("after training", "during training"),
        how="structured OBS levels, measured latencies, dynamic programming with a search over coefficients",
        run=ziplm,
        needs=("data",),
        fused=("distillation",),
        claim="Levels chosen by measured latency lose less than uniform ones at one speed-up, which is as predicted.",
    )
)
