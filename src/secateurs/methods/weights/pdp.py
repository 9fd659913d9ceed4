"""PDP: soft masks that are functions of the weights and of the target sparsity, without parameters of their own.

Cho, Adya, Naik, "PDP: Parameter-free Differentiable Pruning is All You Need", NeurIPS 2023, arXiv 2305.11203. Unit:
single weights, N of every M inputs, blocks, or channels, which are cut out in the end. When: during training: dense at
first, then with soft masks, hard ones in the end. How: the forward pass sees ŵ = m(w)·w, with

    m(w) = exp(w²/τ) / (exp(w²/τ) + exp(t²/τ)) = sigmoid((w² - t²)/τ)

and t half-way between the smallest |w| that stays and the largest that goes, found anew after each step. Gradients flow
through both factors, ∂ŵ/∂w = m + (2·w²/τ)·m·(1 - m), t held: weights near t, on either side of it, learn fastest, and
one that went may return. For N:M each run of M inputs has its own t; channels have the L2 norm of the weights that make
them in place of |w|. At the end of the dense start one ranking of all |w| gives each tensor its share r of what goes,
and from there it rises in stairs: r(e) = min(1, ε·(e + 1))·r in epoch e. `train.PDP` brings all this to any loop.

Defaults. Of 100 epochs 16 are dense and ε = 0.015 reaches the target after 67 more (restated from the paper's appendix,
for ImageNet); here shares of the training. The temperature is own choice: the paper's τ = 1e-4 multiplies the gradient
at the threshold by 1/2 + t²/(2·τ), which is hundreds for the weights of a small network and ends its training. Here τ
is a tenth of t² in each tensor, so that the factor is 5.5 whatever the weights' scale; with half of t² the network
learns to use what the soft masks leave of removed weights, and at 98% loses 15 points when they become hard. τ
itself may be given, and is raised where the factor would be more than `cap`.

What differs from published code: counts are exact, ties by index, where a threshold misses; t is a constant for the
gradient; a layer of which nothing goes has no mask. Channels that are tied together have one mask, which multiplies
their biases and norms too, since a batch norm undoes a factor of the weight before it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

from torch import Tensor, nn

from ...core.allocate import get_allocation
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import BudgetError, OptionError
from ...criteria import score
from ...graph.plan import ModelPlan, digest
from ...in_training import prune_in_training
from ...planning import Granularity, plan
from ...pruning import FineTune, Pruned
from ...train.pdp import PDP
from ..parameters import Between, OneOf, Registered, check

__all__ = ["METHOD", "Differentiable", "pdp"]

Scale = Literal["threshold", "absolute"]


@dataclass(frozen=True)
class Differentiable:
    """Hyperparameters.

    Args:
        begin: share of the training that is dense (0.16: 16 epochs of 100).
        end: share at which the final sparsity is reached (0.83).
        stairs: in how many steps it is reached (67: ε = 0.015).
        hard: share of the training from which masks are hard and stay (1: soft to the end, the paper).
        temperature: τ, by `scale` a share of t² ("threshold") or τ itself ("absolute").
        scale: see there.
        cap: the most by which the gradient at the threshold is multiplied.
        allocation: "global" takes the tensors' shares from one ranking of all |w| (the paper).
        granularity: "weight", "channel", or "block:4x1" and the like.
    """

    begin: Annotated[float, Between(0, 1)] = 0.16
    end: Annotated[float, Between(0, 1, closed="high")] = 0.83
    stairs: Annotated[int, Between(1, whole=True)] = 67
    hard: Annotated[float, Between(0, 1, closed="high")] = 1.0
    temperature: Annotated[float, Between(0, closed="neither")] = 0.1
    scale: Annotated[Scale, OneOf(get_args(Scale))] = "threshold"
    cap: Annotated[float, Between(0.5, closed="neither")] = 10.0
    allocation: Annotated[str, Registered(get_allocation)] = "global"
    granularity: Annotated[str, Registered(Granularity.parse)] = "weight"

    def __post_init__(self) -> None:
        check(self)
        faults = []
        if not self.begin < self.end <= self.hard:
            faults.append(f"begin, end and hard must follow each other, got {self.begin}, {self.end} and {self.hard}")
        if Granularity.parse(self.granularity).kinds and self.granularity != "channel":
            faults.append(f"granularity must be weight, channel or block:ROWSxCOLUMNS, got {self.granularity!r}")
        if self.granularity == "channel" and get_allocation(self.allocation).needs_shapes:
            faults.append(f"allocation {self.allocation!r} weighs shapes of weights, which channels have not")
        if faults:
            raise OptionError(f"Differentiable: {'; '.join(faults)}.")


def pdp(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Differentiable | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` trained by `recover` under soft masks: in the end with zeros, or smaller by whole channels.

    Args:
        model, example_inputs: as for `prune`.
        budget: "sparsity=…" alone, a share of the weights, or of the channels at that granularity; or "2:4" and the
            like, for weights.
        recover: the training; `FineTune(epochs=…)`.
        options: hyperparameters.
        common: data, test, loss, seed, scope, ignore and the rest of `prune`'s arguments.

    Raises:
        BudgetError: another budget, or one that the floors of the groups do not allow.
        OptionError: no training given.
    """
    how, asked = options or Differentiable(), Budget.parse(budget)
    limit = asked.limit("sparsity")
    if len(asked.limits) + (asked.pattern is not None) > 1 or (limit is None and asked.pattern is None):
        raise BudgetError(f"PDP needs a budget such as 'sparsity=90%' or '2:4', got {str(budget)!r}.")
    if asked.pattern is not None and how.granularity != "weight":
        raise BudgetError(f"{asked.pattern} is a pattern of single weights, so it needs granularity='weight'.")
    units: dict[str, Any] = {"sparsity": limit.value} if limit else {"pattern": str(asked.pattern)}
    channels: ModelPlan | None = None
    if how.granularity == "channel":
        named = {key: common[key] for key in ("scope", "ignore", "seed") if key in common}
        channels = plan(model, example_inputs, asked, granularity="channel", allocation="uniform", **named)
        units |= {"groups": channels.groups, "floor": channels.recipe.floor}
    else:
        units |= {"block": Granularity.parse(how.granularity).block}
    built: list[PDP] = []

    def pruner(trained: nn.Module, optimizer: Any, steps: int, chosen: dict[str, Any]) -> PDP:
        built.append(
            PDP(
                trained, optimizer, **_times(how, steps), temperature=how.temperature,
                relative=how.scale == "threshold", cap=how.cap, allocation=how.allocation, **units,
                **({} if channels else chosen),
            )
        )  # fmt: skip
        return built[-1]

    def decide(trained: nn.Module, masks: dict[str, Tensor]) -> ModelPlan:
        assert channels is not None
        scores = score("magnitude", trained, channels.groups)
        recipe = replace(channels.recipe, allocation=how.allocation)
        return replace(channels, scores=scores, keep=built[-1].kept, recipe=recipe, digest=digest(trained))

    return prune_in_training(
        model, example_inputs, budget, pruner, recover=recover, granularity=how.granularity,
        allocation=how.allocation, settings=asdict(how), decide=decide if channels else None, **common,
    )  # fmt: skip


def _times(how: Differentiable, steps: int) -> dict[str, Any]:
    """When, in optimizer steps of a training of `steps`: as many stairs as there is room for."""
    begin = int(how.begin * steps)
    room = max(int(how.end * steps) - begin, 0)
    stairs = min(how.stairs, room + 1)
    every = max(room // max(stairs - 1, 1), 1)
    end = begin + (stairs - 1) * every
    until = max(int(how.hard * steps), end) if how.hard < 1 else None
    return {"begin": begin, "every": every, "rise": 1 / stairs, "until": until}


METHOD = method(
    Method(
        name="pdp",
        title="PDP: Parameter-free Differentiable Pruning is All You Need",
        arxiv="2305.11203",
        units=("weight", "N:M", "block", "channel"),
        when=("during training",),
        how="|w|, soft: sigmoid((w² - t²)/τ) in the forward pass, linear stairs after a dense start",
        run=pdp,
        needs=("data", "labels", "training"),
        claim="Soft masks without parameters are better than gradual magnitude pruning at equal sparsity and training.",
    )
)
