"""Gradual magnitude pruning: sparsity rises along a cubic curve while the network trains.

Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, arXiv
1710.01878. Unit: single weights (or blocks of them). When: during training, from scratch or from a checkpoint, then a
tail with frozen masks. How: every few steps the smallest |w| of each tensor go, so that the sparsity is

    s(t) = s_f + (s_i - s_f)·(1 - q)³,    q = (t - begin) / (end - begin) in [0, 1]                       (eq. 1)

and weights that are left repair the damage while the learning rate is still large enough.

Defaults. s_i = 0 and exponent 3 are the paper's. Masks are updated from 10% to 70% of the training: early enough to
repair, late enough that weights carry information. The published code counts steps (begin 0, every 10 or 100), which
`train.GradualMagnitude` takes for any loop of your own; here shares of the training stand for them.

What the code has and the paper does not: three fates of a masked weight (`revive`) and blocks (`granularity`); targets
by regular expression, first- and second-order scores, which are options of `train.GradualMagnitude`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, get_args

from torch import nn

from ...core.allocate import get_allocation
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import BudgetError, OptionError
from ...in_training import prune_in_training
from ...planning import Granularity
from ...pruning import FineTune, Pruned
from ...train.magnitude import GradualMagnitude
from ...train.masking import Revive
from ..parameters import Between, OneOf, Registered, check

__all__ = ["METHOD", "Gradual", "gradual_magnitude"]


@dataclass(frozen=True)
class Gradual:
    """Hyperparameters.

    Args:
        begin, end: shares of the training between which sparsity rises.
        updates: how often masks change in between.
        initial: sparsity at `begin` (0, the paper).
        exponent: of the curve (3, the paper).
        allocation: "uniform" gives each tensor the same sparsity (the paper).
        revive: fate of a masked weight: "never", "value", "one-step" or "straight-through" (see `train.Masks`).
        granularity: "weight", or "block:4x1" and the like, ranked by the mean of |w| in a block (the code).
    """

    begin: Annotated[float, Between(0, 1)] = 0.1
    end: Annotated[float, Between(0, 1, closed="high")] = 0.7
    updates: Annotated[int, Between(1, whole=True)] = 20
    initial: Annotated[float, Between(0, 1)] = 0.0
    exponent: Annotated[float, Between(0, closed="neither")] = 3.0
    allocation: Annotated[str, Registered(get_allocation)] = "uniform"
    revive: Annotated[Revive, OneOf(get_args(Revive))] = "never"
    granularity: Annotated[str, Registered(Granularity.parse)] = "weight"

    def __post_init__(self) -> None:
        check(self)
        if self.begin >= self.end:
            raise OptionError(f"Gradual: begin must come before end, got {self.begin} and {self.end}.")
        if Granularity.parse(self.granularity).kinds:
            raise OptionError(f"Gradual: granularity must be weight or block:ROWSxCOLUMNS, got {self.granularity!r}.")


def gradual_magnitude(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Gradual | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` trained by `recover` while its smallest weights go; zeros in dense tensors.

    Args:
        model, example_inputs: as for `prune`.
        budget: "sparsity=…" alone.
        recover: the training; `FineTune(epochs=…)`.
        options: hyperparameters.
        common: data, test, loss, seed, scope, ignore and the rest of `prune`'s arguments.

    Raises:
        BudgetError: another budget than a sparsity.
        OptionError: no training given.
    """
    how = options or Gradual()
    asked = Budget.parse(budget).limit("sparsity")
    if asked is None or len(Budget.parse(budget).limits) > 1:
        raise BudgetError(f"gradual magnitude pruning needs a budget such as 'sparsity=90%', got {str(budget)!r}.")

    def pruner(trained: nn.Module, optimizer: Any, steps: int, chosen: dict[str, Any]) -> Any:
        begin, end = int(how.begin * steps), max(int(how.end * steps), int(how.begin * steps) + 1)
        return GradualMagnitude(
            trained, optimizer, sparsity=asked.value, initial=how.initial, begin=begin, end=end,
            every=max(1, (end - begin) // how.updates), exponent=how.exponent, allocation=how.allocation,
            revive=how.revive, block=Granularity.parse(how.granularity).block, **chosen,
        )  # fmt: skip

    return prune_in_training(
        model, example_inputs, budget, pruner, recover=recover, granularity=how.granularity,
        allocation=how.allocation, settings=asdict(how), **common,
    )  # fmt: skip


METHOD = method(
    Method(
        name="gradual-magnitude",
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        arxiv="1710.01878",
        units=("weight", "block"),
        when=("during training",),
        how="|w| per tensor, cubic schedule",
        run=gradual_magnitude,
        needs=("data", "labels", "training"),
        claim="A large network pruned to N non-zeros beats a small dense one of N parameters.",
    )
)
