"""AST: training goes on under N:M masks that keep changing, while pruned weights decay and the dense model teaches.

Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025,
arXiv 2407.20584. Unit: N:M patterns along the inputs of the linear layers of all blocks, or the same share of each row.
When: during training that goes on from a trained model. How:

    masks      of every M inputs the N of highest |w|, or |w|·‖x‖ with norms of the dense model's inputs, taken once;
               chosen anew every 10 optimizer steps
    gradient   straight-through: ∂L/∂W = ∂L/∂(W ⊙ M), also where M is 0
    decay      pruned weights get the further gradient λ(t)·W ⊙ (1 - M), λ(t) = λ·min(t / T₀, 1): masks explore first
               and settle later
    loss       (1 - a)·cross-entropy + a·T²·KL(teacher ‖ student) a token + c·Σ over blocks of ‖h_s - h_t‖² / ‖h_t‖²
    booster    SLoRB, by choice: y = (W ⊙ M)·x + S·(P·x) + b with P the sums of runs of k inputs, S from the means of
               what the first mask took, then trained; see `recover.booster`. Without it: AST-Naive, with it AST-Boosted

The optimizer, its rate and its steps are those of `recover=`; the parts for loops of your own are `SRSTE` with
`every=10` and `pull=Annealed(…)`, `Distillation`, and `recover.booster.boost`.

Defaults. T₀ a quarter of the steps (10,000 of 40,000), λ = 1e-4, a = 0.67, T = 2, c = 0, k = 16: the command that its
authors recommend; for trainings of some hundred steps take λ = 1e-3. With Adam, as there. No booster, so that the
result is an ordinary model. The report's recipe has the flips, entries of all masks that changed at each update
against those before and against the first: if their number does not rise and then fall, λ is wrong.

What the code has and the paper does not, and how it is here. For GPT-2 it takes the bitwise complement of an integer
mask, which makes weights *grow*; its code for Llama has the sign of the paper, as here. There are two forms of the
decay: outside the momentum but inside the normalisation of an Adam of its own (GPT-2), and as a part of the gradient
of an ordinary one (Llama): here the latter, which goes with any optimizer and is what SR-STE does, after clipping.
Masks that never change are its default; here `adaptive=False`. It counts iterations from 0 and chooses after 0, 10 …;
here at the start and after 10, 20 … steps, the last time while there is time left to learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from ...core.batch import Loss, take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.comparison import Comparison
from ...core.errors import BudgetError
from ...in_training import Session, prune_by_training
from ...pruning import FineTune, Pruned
from ...recover.booster import boost, fold
from ...recover.context import modes_kept, seeded
from ...recover.distill import Distillation
from ...recover.finetune import one_pass
from ...solvers import from_matrix, grams_of, to_matrix, weight_of
from ...solvers.layerwise import seen_of
from ...to_solve import layers_to_solve
from ...train.pruner import Pruner
from ...train.sr_ste import Annealed, Compared, Flips, flips_of, input_axes, straight_through
from ..parameters import Between, OneOf, Switch, check

__all__ = ["METHOD", "Ast", "ast", "first_masks", "input_norms"]

Boosting = Literal["none", "keep", "fold"]


@dataclass(frozen=True)
class Ast:
    """Hyperparameters.

    Args:
        score: of a weight, its "magnitude" (default) or "wanda", times the norm of its input.
        calibration: batches from which those norms are taken at most (128).
        adaptive: masks change (default); False keeps the first ones, the paper's baseline.
        every: steps from one choice of the masks to the next (10).
        pull: λ, the decay of pruned weights (1e-4).
        rise: share of the training in which it rises from 0 (0.25).
        kd: a, the weight of the dense model's outputs in the loss (0.67); the labels get the rest. 0 for none.
        temperature: T (2).
        squarehead: c, the weight of hidden states (0).
        booster: "none" (default), "keep" the branch in the model, for which the plan then is, or "fold" into W what
            the mask lets stay of it.
        run: k, inputs to a number of the branch (16); it must divide the inputs of every layer.
        train_projection: P of the branch trains too.
    """

    score: Annotated[Literal["magnitude", "wanda"], OneOf(("magnitude", "wanda"))] = "magnitude"
    calibration: Annotated[int, Between(1, whole=True)] = 128
    adaptive: Annotated[bool, Switch()] = True
    every: Annotated[int, Between(1, whole=True)] = 10
    pull: Annotated[float, Between(0)] = 1e-4
    rise: Annotated[float, Between(0, 1, closed="both")] = 0.25
    kd: Annotated[float, Between(0, 1, closed="both")] = 0.67
    temperature: Annotated[float, Between(0, closed="neither")] = 2.0
    squarehead: Annotated[float, Between(0)] = 0.0
    booster: Annotated[Boosting, OneOf(("none", "keep", "fold"))] = "none"
    run: Annotated[int, Between(1, whole=True)] = 16
    train_projection: Annotated[bool, Switch()] = False

    def __post_init__(self) -> None:
        check(self)


def ast(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Ast | None = None, loss: Loss | None = None, scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (), seed: int = 0, checkpoint: str | Path | None = None,
    on_step: Any = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` trained by `recover` under masks that adapt; zeros in dense tensors, beside them the branch.

    Args:
        model: trained; also the teacher. Layers outside its blocks, and what the pattern does not divide, stay dense.
        example_inputs: as for `prune`.
        budget: "2:4" and the like, or "sparsity=50%" of each row.
        recover: the training, whatever its `distill` says; the paper's has AdamW, betas of 0.9 and 0.95 and a cosine.
        options: hyperparameters.
        seed: of the training.
        common: data, test and the rest of `prune`'s arguments. The report's recipe has the "flips".

    Raises:
        BudgetError: another budget.
        OptionError: no training given, runs that do not divide the inputs of a layer, or a checkpoint of another run.
        ModelError: no block has such layers.
    """
    how, asked = options or Ast(), Budget.parse(budget)
    if len(asked.limits) + (asked.pattern is not None) > 1 or (asked.limit("sparsity") is None and not asked.pattern):
        raise BudgetError(f"AST needs a budget such as '2:4' or 'sparsity=50%', got {str(budget)!r}.")
    compared = layers_to_solve(model, asked, "row", scope, ignore)
    flips: list[Flips] = []

    def train(session: Session) -> dict[str, Tensor]:
        names = [weight_of(layer) for layer in compared]
        comparison = next(iter(compared.values()))
        norms = _norms(session, list(compared), how, seed)
        if how.booster != "none":
            first = first_masks(session.model, names, comparison, norms)
            boost(session.model, session.original, first, run=how.run, train_projection=how.train_projection)
        steps = session.recover.total_steps(session.data)
        built: list[Pruner] = []

        def build(trained: nn.Module, optimizer: Any) -> Pruner:
            weights = {name: trained.get_parameter(name) for name in names}
            built.append(
                straight_through(
                    trained, optimizer, weights, comparison, pull=Annealed(how.pull, int(how.rise * steps)),
                    every=how.every if how.adaptive else None, until=max(steps - how.every, 0), norms=norms,
                    counted=True,
                )
            )  # fmt: skip
            return built[0]

        taught = replace(session.recover, distill=how.kd > 0 or how.squarehead > 0)
        with session.clock("training"):
            session.notes.history = taught.run(
                session.model, session.original, session.data, pruner=build, loss=loss, seed=seed,
                distillation=Distillation(how.temperature, how.kd, hidden=how.squarehead), checkpoint=checkpoint,
                on_step=on_step,
            )  # fmt: skip
        flips.extend(flips_of(built[0]))
        masks = built[0].finalize()
        if how.booster == "fold":
            fold(session.model, masks)
        session.test("pruned in training")
        return masks

    made = prune_by_training(
        model, example_inputs, asked, train, recover=recover, settings=asdict(how), scope=scope, ignore=ignore,
        seed=seed, checkpoint=checkpoint, **common,
    )  # fmt: skip
    recipe = {**made.report.recipe, "flips": [asdict(one) for one in flips]}
    return replace(made, report=replace(made.report, recipe=recipe))


def first_masks(
    model: nn.Module, names: Sequence[str], comparison: Comparison, norms: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What stays of the weights called `names` at the start."""
    rule = Compared(comparison, norms, input_axes(model, names))
    return {name: rule.keep(name, model.get_parameter(name).detach()) for name in names}


def input_norms(model: nn.Module, data: Iterable[Any], layers: Sequence[str]) -> dict[str, Tensor]:
    """The root of the mean square of each input of the layers, by weight name and in the weight's shape, float64.

    Args:
        model: run in evaluation mode and left as it was.
        data: batches; tokens that an "attention_mask" leaves out do not count.
        layers: names of the modules.
    """
    batches = list(data)
    with modes_kept(model):
        model.eval()
        grams, _ = grams_of(model, batches, layers, full=False, seen=seen_of(batches))
    found = {}
    for name, gram in grams.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        spread = gram.norm[:, None].expand(to_matrix(layer, weight).shape)
        found[weight_of(name)] = from_matrix(layer, spread, weight.shape)
    return found


def _norms(session: Session, layers: Sequence[str], how: Ast, seed: int) -> dict[str, Tensor]:
    """What multiplies |w| in the scores; nothing for magnitudes."""
    if how.score == "magnitude":
        return {}
    with session.clock("calibrating"), seeded(seed, "calibrating"):
        return input_norms(session.original, take(one_pass(session.data), how.calibration), layers)


METHOD = method(
    Method(
        name="ast",
        title="Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
        arxiv="2407.20584",
        units=("weight", "N:M"),
        when=("during training",),
        how="|w| or |w|·‖x‖ every few steps, straight-through, annealed decay of what is pruned",
        run=ast,
        needs=("data", "labels", "training"),
        fused=("distillation", "low-rank branch"),
        claim="At 2:4 and equal steps the perplexity of AST with a booster is below that of AST without, fixed masks, "
        "SparseGPT and magnitude, in this order.",
    )
)
