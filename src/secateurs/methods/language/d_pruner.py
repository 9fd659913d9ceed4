"""D-Pruner: weights stay for what they do in one domain, and for what they do in general.

Zhang et al., "Pruning as a Domain-specific LLM Extractor", Findings of NAACL 2024, arXiv 2405.06275. Unit: single
weights, or N:M patterns along the inputs. When: after training; importances come together in a short fine-tuning on the
domain, whose weights are then thrown away. How:

    1. general   one SparseGPT pass over open-domain data at the budget: G = W²/U_jj² of each weight as it is when the
                 mask reaches it
    2. refine    the domain's loss gets λ·Σ G·(W' - W)², with W' - W = -α·g the coming step of plain SGD, and so the
                 gradient becomes g + 2·λ·α²·G·g·H, with H the empirical Fisher diagonal
    3. dual      S = Σ over the steps of |g·W - ½·H·W²|, with that gradient
    4. mask      the original weights of least S go, within each matrix, or each run of its columns ("iterative
                 blocking"); those that stay are as they were, bit for bit

`data=` are the domain's batches, with labels, `general=` the open-domain ones, or what `general_importance` gave for
them: it is found once and kept for several λ. Without `general=` the domain's batches serve for both, with a warning.
`recover=` trains the sparse model on the domain afterwards, its mask fixed. The report's recipe has, as "dual", the
sizes of the terms of S, by how much the penalty turned the gradients, and how far the fine-tuning moved the weights,
which should be little, since S is summed on its way and the mask is for the weights where it began. "sparsity=50%" is
of the weights of the blocks' layers, embeddings, head and norms not counted; the paper's 52% of these are half of all
parameters of its 7B model.

Defaults. λ = 0.1, rate 0.03 up for a tenth of the steps and then down on a line, 5 passes, norm of gradients clipped to
1, SparseGPT with blocks of 128 and damping 0.01, one threshold a matrix: the released code's. H is the mean of g² over
the steps so far (form="fisher"). form="released" is that code's arithmetic: gradients times the 2¹⁶ of its
half-precision training, H = g²/1000 with another sign, and W³ added. With gradients in their own units the penalty by
its formula is many orders smaller than the gradient, and it multiplies g, so that it cannot keep a weight that the
domain does not use: a warning says where λ had no effect. form="sum" is our own, in which it has: the fine-tuning is
plain, and of each matrix S/mean(S) + λ·G/mean(G) ranks; begin with λ = 1.

Not as in the released code. Counts are exact where it takes all that ties with a percentile. Its g² pushes every weight
up; here the penalty keeps the sign of g. It keeps S of each pass for somebody to choose from; here the last is taken,
since choosing needs data of its own. It uses LOMO, SGD without a store of gradients.

Memory: beside the model one copy of it with its gradients, and G, S and F (not in "released") of the pruned matrices in
float32. Half-precision models are tuned in their own dtype: prefer bfloat16, since float16 gradients underflow.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...core.batch import Loss, double, split, take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.comparison import Comparison
from ...core.errors import DataError, ModelError, OptionError
from ...core.finite import all_finite
from ...core.state import read_state, write_state
from ...criteria.face import check_finite
from ...graph.plan import digest
from ...planning import batches_of, plan_of_masks, recipe_of
from ...pruning import FineTune, Pruned, completed
from ...recover.context import seeded
from ...recover.finetune import fine_tune
from ...running import Clock, Stage, claim
from ...solvers import BlockDone, Propagate, from_matrix, to_matrix, weight_of
from ...solvers.ranks import first
from ...summary import Findings, quality_of
from ...to_solve import layers_to_solve
from ...train.dual import DualImportance, Form, Sums, combined, keep_by_blocks
from ..parameters import Between, OneOf, check
from ._general import Sweep, check_general, swept, totals

__all__ = ["METHOD", "DPruner", "Importance", "d_pruner", "dual_importance", "general_importance", "masks_of"]

# Relative distance of the tuned weights from the original ones from which on a mask for the latter is in doubt.
_FAR = 0.1
# Share of the gradients below which a penalty does not change what ranks.
_SLIGHT = 1e-3
_GENERAL = "general.safetensors"


@dataclass(frozen=True)
class DPruner:
    """Hyperparameters.

    Args:
        strength: λ (0.1, the code); with 0 the general importance is not needed, and S is of the domain alone.
        form: "fisher" (default), "released" or "sum"; see above.
        fisher_scale: c in H = c·F (1); the number of samples or tokens in a batch makes F an estimate of the curvature
            of a mean over them.
        epochs: passes over the domain's data (5, the code).
        lr: α at its highest (0.03, the code).
        clip_norm: largest norm of all gradients (1, the code).
        blocks: runs of columns within which weights are compared: 1, the whole matrix (default); 32, the code's
            "iterative blocking". Without effect for N:M.
        block, damping: of the SparseGPT pass (128 and 0.01, the code).
        propagate: what the next block sees in that pass: "pruned" activations (default) or "dense".
    """

    strength: Annotated[float, Between(0)] = 0.1
    form: Annotated[Form | Literal["sum"], OneOf((*get_args(Form), "sum"))] = "fisher"
    fisher_scale: Annotated[float, Between(0, closed="neither")] = 1.0
    epochs: Annotated[int, Between(1, whole=True)] = 5
    lr: Annotated[float, Between(0, closed="neither")] = 0.03
    clip_norm: Annotated[float, Between(0, closed="neither")] = 1.0
    blocks: Annotated[int, Between(1, whole=True)] = 1
    block: Annotated[int, Between(1, whole=True)] = 128
    damping: Annotated[float, Between(0)] = 0.01
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def sweep(self) -> Sweep:
        """How the general importance is found."""
        return Sweep(self.block, self.damping, self.propagate)


@dataclass(frozen=True, eq=False)
class Importance:
    """What a fine-tuning on the domain found.

    Args:
        scores: S by name of the weight, float32 or wider, in its shape; for "sum" with λ·G, both over their means.
        sums: by name, the sizes of its terms.
        distance: ‖W_tuned - W‖ / ‖W‖ of these weights together.
        steps: of the fine-tuning.
    """

    scores: dict[str, Tensor]
    sums: dict[str, Sums] = field(repr=False)
    distance: float
    steps: int

    def to_dict(self) -> dict[str, float]:
        """Steps, distance, the sizes of the terms of S, and "penalty", what it added over the gradients' own size."""
        total = {f.name: sum(getattr(one, f.name) for one in self.sums.values()) for f in fields(Sums)}
        share = total["added"] / total["plain"] if total["plain"] else 0.0
        terms = {name: total[name] for name in ("first", "second", "third")}
        return {"steps": self.steps, "distance": self.distance, "penalty": share, **terms}


def d_pruner(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    *,
    options: DPruner | None = None,
    general: Iterable[Any] | Mapping[str, Tensor] | None = None,
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
    on_block: Callable[[BlockDone], None] | None = None,
    name: str | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
    allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
) -> Pruned:
    """A copy of `model` with zeros where the dual importance is least, and all else as it was.

    Args:
        model, example_inputs: as for `prune`.
        budget: "sparsity=50%", of the weights of the blocks' layers, or "2:4".
        options: hyperparameters.
        general: open-domain batches, or their importance by `general_importance`; without labels.
        data: the domain's batches, with labels: a language model's as a dict with "labels", -100 where a token does not
            count. They are gone through once a pass.
        recover: training of the sparse model on `data`, its mask fixed; None for none.
        sensitivities, budgets: refused, since one decision is made; `plan.rebudget` makes others from the same S,
            within whole matrices.
        checkpoint: a folder that keeps the general importance, and the state after each pass of a training.
        on_step: told each step of the fine-tuning that finds the importance, and then each of `recover`.
        on_block: told each block of which the general importance is known.
        allocation, allocation_options: a density rule of `core.allocate`; uniform is the paper's.
        others: as for `prune`.

    Raises:
        BudgetError: a budget that is neither a sparsity nor a pattern.
        DataError: domain or open-domain data are missing or empty, or without a label that counts.
        ModelError: NaN or infinite weights, activations or importances; no block has a layer to prune.
        OptionError: a general importance that does not fit the model, or a checkpoint of another run.
    """
    how = options or DPruner()
    if sensitivities or budgets:
        raise OptionError("D-Pruner makes one decision: leave out sensitivities= and budgets=.")
    batches = batches_of(data)
    batches = take(None) if batches is None else batches
    tests = None if test is None else take(test, what="test data")
    check_finite(model)
    recipe = recipe_of(
        budget, criterion="d-pruner", allocation=allocation, allocation_options=allocation_options,
        granularity="weight", scope=scope, ignore=ignore, seed=seed,
    )  # fmt: skip
    layers = layers_to_solve(model, recipe.budget, "matrix", scope, ignore, allocation, allocation_options)
    _check_labels(batches, seed)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and first():
        settings = asdict(how) | {"general": totals(general)}
        claim(folder, {"recipe": recipe.to_dict(), "model": digest(model), "settings": settings})
    notes = Findings(model=name or type(model).__name__)
    clock = Clock(notes.seconds, on_stage)
    with clock("general importance"):
        known = _general_of(model, general, batches, layers, how, seed, folder, on_block)
    with clock("domain fine-tuning"):
        found = dual_importance(
            model, batches, known, options=how, loss=loss, seed=seed, checkpoint=folder and folder / "domain",
            on_step=on_step, names=[weight_of(layer) for layer in layers],
        )  # fmt: skip
    masks = masks_of(model, found.scores, layers, how.blocks)
    plan = plan_of_masks(model, example_inputs, masks, recipe)
    plan = replace(plan, scores={name: found.scores[name].flatten().cpu() for name in plan.scores})
    made = plan.mask(model)
    if tests is not None:
        with clock("testing"):
            notes.quality["before"] = quality_of(model, tests)
            notes.quality["one-shot"] = quality_of(made, tests)
    pruned = completed(
        model, made, plan, plan.masks(model), example_inputs, notes, clock, data=batches, tests=tests, loss=loss,
        recover=recover, recalibrate=recalibrate, measure=measure, inplace=inplace, folder=folder, on_step=on_step,
    )  # fmt: skip
    whole = sum(parameter.numel() for parameter in model.parameters())
    gone = sum(int((~mask).sum()) for mask in masks.values())
    dual = found.to_dict() | {"of_all_parameters": gone / whole}
    return replace(pruned, report=replace(pruned.report, recipe={**pruned.report.recipe, "dual": dual}))


def general_importance(
    model: nn.Module,
    data: Iterable[Any],
    budget: str | Budget = "sparsity=52%",
    *,
    options: DPruner | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
    allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
    on_block: Callable[[BlockDone], None] | None = None,
) -> dict[str, Tensor]:
    """G of every weight of the layers in blocks, by name, float32 or wider, in its shape; the model stays as it is.

    Args:
        model: any with blocks, as `solvers.blocks_of` finds them.
        data: open-domain batches, all held at once together with one block's activations; no labels are needed.
        budget: at which SparseGPT runs (52%, the code); it changes G by what the blocks and columns before compensate.
        options: block, damping and propagate are used.
        others: as for `d_pruner`.

    Raises:
        BudgetError, DataError, ModelError, OptionError: as for `d_pruner`.
    """
    how = options or DPruner()
    check_finite(model)
    parsed = Budget.parse(budget)
    layers = layers_to_solve(model, parsed, "matrix", scope, ignore, allocation, allocation_options)
    return swept(model, data, layers, how.sweep, seed=seed, on_block=on_block)


def dual_importance(
    model: nn.Module,
    data: Iterable[Any],
    general: Mapping[str, Tensor],
    *,
    options: DPruner | None = None,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Importance:
    """S of the weights in `general`, or called `names`; the model stays as it is, its copy is tuned and thrown away.

    Args:
        model: a language model or any other.
        data: the domain's batches, with labels.
        general: G by name of the weight; may be empty with strength 0, and `names` are needed then.
        options: hyperparameters.
        loss: `(output, target) -> scalar`; default: `core.batch.default_loss`.
        checkpoint: a folder for the state after each pass.
        others: as for `d_pruner`.

    Raises:
        OptionError: a G that does not fit the model.
        ModelError: the loss or an importance is not finite.
    """
    how = options or DPruner()
    names = list(general) if names is None else list(names)
    check_general(model, general, names if how.strength else ())
    tuned = copy.deepcopy(model)
    built: list[DualImportance] = []
    for name in names:
        tuned.get_parameter(name).requires_grad_(True)

    def build(trained: nn.Module, optimizer: Any) -> DualImportance:
        built.append(
            DualImportance(
                trained, optimizer, names, general, strength=0.0 if how.form == "sum" else how.strength,
                form="fisher" if how.form == "sum" else how.form, fisher_scale=how.fisher_scale,
                clip_norm=how.clip_norm,
            )
        )  # fmt: skip
        return built[0]

    fine_tune(
        tuned, data, epochs=how.epochs, lr=how.lr, optimizer=SGD, schedule="linear-warmup", loss=loss, pruner=build,
        seed=seed, checkpoint=checkpoint, on_step=on_step,
    )  # fmt: skip
    scores = built[0].scores
    if how.form == "sum" and how.strength:
        scores = {name: combined(s, general[name].to(s), how.strength) for name, s in scores.items()}
    bad = [name for name, found in scores.items() if not all_finite(found)]
    if bad:
        raise ModelError(f"the importance of {bad[0]} is not finite: lower lr or strength, or look at the data.")
    made = Importance(scores, built[0].sums, _distance(model, tuned, names), built[0].steps)
    _warn(made, how)
    return made


def masks_of(
    model: nn.Module, scores: Mapping[str, Tensor], layers: Mapping[str, Comparison], blocks: int = 1
) -> dict[str, Tensor]:
    """What stays by name of the weight, bool in its shape: the highest of each matrix, or of each run of its columns.

    A weight that has no score above zero has told nothing; it is left out, with a warning, and so stays.

    Args:
        scores: by name of the weight, in its shape.
        layers: by name of the module, what goes of it; `to_solve.layers_to_solve` gives it.
        blocks: see `DPruner`.
    """
    silent = [layer for layer in layers if not bool(scores[weight_of(layer)].any())]
    for layer in silent:
        warnings.warn(f"{layer} had no gradient on the domain's data and stays as it is.", stacklevel=2)
    return {
        weight_of(n): _mask(model, n, scores[weight_of(n)], c, blocks) for n, c in layers.items() if n not in silent
    }


def _mask(model: nn.Module, layer: str, scores: Tensor, comparison: Comparison, blocks: int) -> Tensor:
    module = model.get_submodule(layer)
    matrices = to_matrix(module, scores)
    if comparison.pattern is None:
        kept = [keep_by_blocks(matrix, comparison.sparsity, blocks) for matrix in matrices]
    else:
        for matrix in matrices:
            comparison.check(matrix, layer)
        kept = [comparison.keep(matrix.contiguous()) for matrix in matrices]
    return from_matrix(module, torch.stack(kept), scores.shape)


def _general_of(
    model: nn.Module, general: Iterable[Any] | Mapping[str, Tensor] | None, data: Iterable[Any],
    layers: Mapping[str, Comparison], how: DPruner, seed: int, folder: Path | None,
    on_block: Callable[[BlockDone], None] | None,
) -> Mapping[str, Tensor]:  # fmt: skip
    """G, as given, as kept in the folder, or found."""
    if not how.strength:
        return {}
    if isinstance(general, Mapping):
        return general
    if general is None:
        warnings.warn(
            "no general= data: the domain's data tell what matters in general too, so that nothing else is protected; "
            "give open-domain batches.",
            stacklevel=3,
        )
    file = None if folder is None else folder / _GENERAL
    if file is not None and file.exists():
        known: dict[str, Tensor] = read_state(file, "general importance")
        return known
    found = swept(model, data if general is None else general, layers, how.sweep, seed=seed, on_block=on_block)
    if file is not None and first():
        write_state(file, found, "general importance")
    return found


def _check_labels(data: Iterable[Any], seed: int) -> None:
    """Refuses data of whose labels none counts; it reads until the first that does."""
    with seeded(seed, "labels"):
        if not any(_counts(batch) for batch in data):
            raise DataError("the domain's data have no label that counts: all are -100 or missing rows.")


def _counts(batch: Any) -> bool:
    inputs, target = split(batch)
    labels = inputs.get("labels") if target is None and isinstance(inputs, Mapping) else target
    # Without labels to look at, the loss says what it misses.
    return not isinstance(labels, Tensor) or bool((labels != -100).any())


def _distance(model: nn.Module, tuned: nn.Module, names: Sequence[str]) -> float:
    moved = whole = 0.0
    for name in names:
        before, after = double(model.get_parameter(name).detach()), double(tuned.get_parameter(name).detach())
        moved += float((after - before).square().sum())
        whole += float(before.square().sum())
    return (moved / whole) ** 0.5 if whole else 0.0


def _warn(found: Importance, how: DPruner) -> None:
    told = found.to_dict()
    if found.distance > _FAR:
        warnings.warn(
            f"the fine-tuning moved the weights by {found.distance:.0%} of their size, and the mask is for where they "
            f"began: lower lr ({how.lr:g}) or epochs ({how.epochs}).",
            stacklevel=3,
        )
    if how.strength and how.form != "sum" and told["penalty"] < _SLIGHT:
        warnings.warn(
            f"the penalty changed the gradients by {told['penalty']:.0e} of their size, so that the general importance "
            "has no part in the mask: raise strength or fisher_scale, or take form='sum'.",
            stacklevel=3,
        )
    if told["third"] > told["first"]:
        warnings.warn(
            "W³ is the largest part of the importance, which then ranks as |W| does: the gradients have vanished.",
            stacklevel=3,
        )


METHOD = method(
    Method(
        name="d-pruner",
        title="Pruning as a Domain-specific LLM Extractor",
        arxiv="2405.06275",
        units=("weight", "N:M"),
        when=("after training",),
        how="|g·W - ½·H·W²| summed over a domain fine-tuning under a penalty on moving what matters in general",
        run=d_pruner,
        needs=("data", "labels"),
        claim="Between a mask for the domain alone and one for general use alone it is better than the former in "
        "general and better than the latter in the domain.",
    )
)
