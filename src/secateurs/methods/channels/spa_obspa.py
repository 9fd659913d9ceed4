"""SPA and OBSPA: group scores from any criterion, and a cut repaired in closed form without any training.

Wang, Rachwan, Günnemann and Charpentier, "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
2024, arXiv 2403.18955. Unit: coupled channels (filters, neurons, attention heads), cut out. When: before training
(prune, then train), or after it with or without fine-tuning. How, in four steps:

    1. groups    channels that only go together are found by the shape algebra (`graph`), for any architecture
    2. scores    S[c] = R_out over tensors of Norm over channels of R_in over entries of I, for any criterion I:
                 magnitude, snip, grasp, crop, or I = w²/(2·[H⁻¹]_qq), optimal brain surgery, over the consumers of c
    3. OBSPA     consumers in the order of the forward pass, each with H = (2/S)·Σ x·xᵀ of its inputs x in the network
                 pruned so far: W ← W - W_S·([H⁻¹]_SS)⁻¹·[H⁻¹]_S,: for the columns S of all channels that go
    4. norms     batch-norm statistics measured again, where there are real data

Step 3 is the exact optimum for the layer (`solvers.obs`); the inputs are those of training images, of other images, or
noise when there are no data. With `recover=FineTune(…)` training follows: on a fresh model that is prune-train, with
`Spa(criterion="snip", repair="none")` for example, on a trained one train-prune-finetune. `rounds` decides in T steps
that keep keep^(t/T), scored again after each.

Defaults. R_in sum, Norm mean, R_out mean (DepGraph's code; the paper compares several). Damping 0.01 of the mean
diagonal, SparseGPT's code. 256 images or noise samples; the paper's number is not known.

Not as in the published description. Scores are those of the unpruned network, since a budget needs all of them before
anything goes. Input columns that saw only zeros keep their weights instead of losing them: nothing is known
about them, and on other data they may matter. A layer whose weight cannot be repaired is an error, not a plain cut.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from ...core.batch import take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...criteria import get_criterion
from ...planning import batches_of
from ...pruning import Pruned, prune
from ...running import claim
from ..calibration import NOISE, Noise, noise
from ..parameters import Between, OneOf, Registered, check
from ..repair import repaired
from ..rounds import in_rounds

__all__ = ["METHOD", "Spa", "spa_obspa"]

# Arguments of `plan` that hold in every round.
_PLANNING = ("scope", "ignore", "floor", "round_to")


@dataclass(frozen=True)
class Spa:
    """Hyperparameters; the defaults are OBSPA.

    Args:
        criterion: elementwise importance I: "obs" (OBSPA), "magnitude", "snip", "grasp", "crop" or another.
        reduce: R_in, over the entries of a channel inside one tensor: "sum" (default), "mean" or "max".
        normalize: over the channels of a group inside one tensor: "mean" (default, but "none" for scores with a sign),
            "none", "sum", "max", "minmax" or "gaussian".
        combine: R_out, over tensors: "mean" (default), "sum", "max", "prod" or "first".
        allocation: "global" ranks the channels of all groups together (default), "uniform" takes an equal share.
        repair: "obs" moves the weights that stay; "none" cuts only (SPA).
        damping: share of the mean diagonal of H added to it (0.01).
        calibration: "data" (those given), or without data "uniform", "gaussian" or "smooth" noise.
        samples: of noise (256).
        rounds: T, steps in which the share that stays falls to keep^(t/T); 1 is one-shot.
    """

    criterion: Annotated[str, Registered(get_criterion)] = "obs"
    reduce: Annotated[Literal["sum", "mean", "max"], OneOf(("sum", "mean", "max"))] = "sum"
    normalize: Annotated[str, OneOf(("default", "none", "sum", "mean", "max", "minmax", "gaussian"))] = "default"
    combine: Annotated[str, OneOf(("mean", "sum", "max", "prod", "first"))] = "mean"
    allocation: Annotated[Literal["global", "uniform"], OneOf(("global", "uniform"))] = "global"
    repair: Annotated[Literal["obs", "none"], OneOf(("obs", "none"))] = "obs"
    damping: Annotated[float, Between(0)] = 0.01
    calibration: Annotated[Literal["data"] | Noise, OneOf(("data", *NOISE))] = "data"
    samples: Annotated[int, Between(1, whole=True)] = 256
    rounds: Annotated[int, Between(1, whole=True)] = 1

    def __post_init__(self) -> None:
        check(self)

    @property
    def criterion_options(self) -> dict[str, Any]:
        """What of these is not the criterion's own default, by the names of its options."""
        lifting = {
            "reduce": (self.reduce, "sum"),
            "normalize": (self.normalize, "default"),
            "combine": (self.combine, "mean"),
        }
        chosen: dict[str, Any] = {name: value for name, (value, usual) in lifting.items() if value != usual}
        return chosen | ({"damping": self.damping} if get_criterion(self.criterion).accepts("damping") else {})


def spa_obspa(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, options: Spa | None = None, **common: Any
) -> Pruned:
    """A smaller copy of `model`, without the channels of least group score, and with what consumed them repaired.

    Args:
        model, example_inputs, budget: as for `prune`.
        options: hyperparameters.
        common: data, test, recover, recalibrate, scope, ignore, seed and the rest of `prune`'s arguments. With noise
            for calibration, data are read by `recover` alone. The plan does not hold repaired weights: save the result.

    Raises:
        DataError: calibration data are missing or empty.
        ModelError: a layer that consumes what goes cannot be repaired, or its hessian not be inverted.
        OptionError: rounds for a budget that is not a share, or a checkpoint of other hyperparameters.
    """
    how, common = options or Spa(), dict(common)
    if common.get("checkpoint") is not None:
        # The plan that is kept there tells a criterion from another, but neither noise from data nor a repair.
        claim(Path(common["checkpoint"]), {"spa-obspa": asdict(how)})
    data = batches_of(common.pop("data", None))
    if how.calibration != "data":
        if (recover := common.get("recover")) is not None:
            common["recover"] = replace(recover, data=recover.training_data(data))
        data = noise(example_inputs, how.calibration, how.samples, common.get("seed", 0))
        # Statistics of noise are not those of images, whatever the weights.
        common["recalibrate"] = False
    repair = None
    if how.repair == "obs":
        repair = partial(repaired, data=take(None) if data is None else data, damping=how.damping)
    chosen: dict[str, Any] = {"criterion": how.criterion, "criterion_options": how.criterion_options}
    if how.rounds > 1:
        planning = {name: common[name] for name in _PLANNING if name in common} | {"allocation": how.allocation}
        scores = in_rounds(how.criterion, how.rounds, example_inputs, budget, how.criterion_options, repair, **planning)
        chosen = {"criterion": scores}
    return prune(model, example_inputs, budget, data=data, repair=repair, allocation=how.allocation, **chosen, **common)


METHOD = method(
    Method(
        name="spa-obspa",
        title="Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
        arxiv="2403.18955",
        units=("channel", "head"),
        when=("before training", "after training"),
        how="group scores from any criterion, OBS repair of the consumers",
        run=spa_obspa,
        needs=("data",),
        claim="Without fine-tuning and even without data, OBSPA keeps more accuracy than magnitude pruning.",
    )
)
