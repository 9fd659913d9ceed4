"""GraNet: gradual global magnitude pruning that regrows, all the while, as many weights as it drops.

Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv 2106.10404.
Unit: single weights (or blocks of them). When: during training, from a sparse start (s_i = 0.5) or a dense one (0).
How: at every update the smallest |w| of the whole network go until the sparsity is

    s(t) = s_f + (s_i - s_f)·(1 - q)³,    q = (t - begin) / (end - begin) in [0, 1]          (arXiv 1710.01878, eq. 1)

and then, of the n live weights of each layer, the ⌈r·n⌉ smallest go too and as many others come back, at zero and with
a fresh optimizer state, where the gradient of this very step is largest:

    r(t) = r_end + (r_0 - r_end)·(1 + cos(π·t/T))/2

The gradient is dense at those steps only. Its parts are settings of the same loop: no exchange is gradual magnitude
pruning, a constant sparsity is RigL (arXiv 1911.11134), random growth at a constant sparsity is SET (arXiv 1707.04780),
growth by momentum is SNFS (arXiv 1907.04840). `train.GraNet`, `train.RigL` and `train.SET` bring it to any loop.

Defaults. s_i = 0.5, an ERK start and r_0 = 0.5 are the paper's, r_end = 0.005 its code's. Of the paper's 62,560 steps
on CIFAR every 1,000th updates the masks, and sparsity rises during the first half: 60 updates here.

What the code has and the paper does not, and how it is here: it drops by a threshold, so ties make it miss its counts;
here they are exact. Its last pruning falls one update before the end and misses the target by (s_f - s_i)/n³; here the
target is met. It exchanges to the last step; here the last exchange leaves the time of one update to learn. In a layer
of which nothing is removed it sets its smallest weights to zero and calls that an exchange; here it is left alone.
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
from ...train.granet import GraNet
from ...train.regrowth import Grow
from ..parameters import Between, OneOf, Registered, check

__all__ = ["METHOD", "Neuroregeneration", "granet"]


@dataclass(frozen=True)
class Neuroregeneration:
    """Hyperparameters.

    Args:
        initial: s_i, the sparsity at the start (0.5, sparse-to-sparse; 0 is dense-to-sparse). Equal to the budget's:
            RigL, or SET with random growth.
        begin, end: shares of the training between which sparsity rises (0 and 0.5, the paper).
        updates: how often masks change in the whole training (60, the paper's recipe for CIFAR).
        share: r_0, the share of a layer's live weights that is exchanged at first (0.5, the paper); 0 for none.
        last_share: r_end (0.005, the code).
        grow: by "gradient" (the paper), "random" (SET) or "momentum" (SNFS).
        exponent: of the curve (3, the paper).
        allocation: "global" ranks all layers together (the paper).
        start: the density rule of the random masks at the start (ERK, the paper).
        granularity: "weight", or "block:4x1" and the like, by the mean of |w| and of |gradient| in a block.
    """

    initial: Annotated[float, Between(0, 1)] = 0.5
    begin: Annotated[float, Between(0, 1)] = 0.0
    end: Annotated[float, Between(0, 1, closed="high")] = 0.5
    updates: Annotated[int, Between(1, whole=True)] = 60
    share: Annotated[float, Between(0, 1)] = 0.5
    last_share: Annotated[float, Between(0, 1)] = 0.005
    grow: Annotated[Grow, OneOf(get_args(Grow))] = "gradient"
    exponent: Annotated[float, Between(0, closed="neither")] = 3.0
    allocation: Annotated[str, Registered(get_allocation)] = "global"
    start: Annotated[str, Registered(get_allocation)] = "erk"
    granularity: Annotated[str, Registered(Granularity.parse)] = "weight"

    def __post_init__(self) -> None:
        check(self)
        faults = []
        if self.begin >= self.end:
            faults.append(f"begin must come before end, got {self.begin} and {self.end}")
        if self.share and self.last_share > self.share:
            faults.append(f"last_share must not exceed share, got {self.last_share} and {self.share}")
        if get_allocation(self.start).needs_scores:
            faults.append(f"start must be a density rule such as erk, got {self.start!r}")
        if Granularity.parse(self.granularity).kinds:
            faults.append(f"granularity must be weight or block:ROWSxCOLUMNS, got {self.granularity!r}")
        if faults:
            raise OptionError(f"Neuroregeneration: {'; '.join(faults)}.")


def granet(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Neuroregeneration | None = None, seed: int = 0, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` trained by `recover` while weights are pruned and exchanged; zeros in dense tensors.

    Args:
        model, example_inputs: as for `prune`; meant for a freshly initialised model.
        budget: "sparsity=…" alone.
        recover: the training; `FineTune(epochs=…)`.
        options: hyperparameters.
        seed: of the training, of the masks at the start and of random growth.
        common: data, test, loss, scope, ignore and the rest of `prune`'s arguments.

    Raises:
        BudgetError: another budget than a sparsity.
        OptionError: no training given, or a sparsity below `initial`.
    """
    how = options or Neuroregeneration()
    asked = Budget.parse(budget).limit("sparsity")
    if asked is None or len(Budget.parse(budget).limits) > 1:
        raise BudgetError(f"GraNet needs a budget such as 'sparsity=90%', got {str(budget)!r}.")

    def pruner(trained: nn.Module, optimizer: Any, steps: int, chosen: dict[str, Any]) -> Any:
        begin, every = int(how.begin * steps), max(1, steps // how.updates)
        end, last = max(int(how.end * steps), begin + 1), max(steps - every, begin, 1)
        return GraNet(
            trained, optimizer, sparsity=asked.value, initial=how.initial, begin=begin, end=end, until=last,
            every=every, share=how.share, last_share=how.last_share, grow=how.grow, exponent=how.exponent,
            allocation=how.allocation, start=how.start, block=Granularity.parse(how.granularity).block, seed=seed,
            **chosen,
        )  # fmt: skip

    return prune_in_training(
        model, example_inputs, budget, pruner, recover=recover, granularity=how.granularity,
        allocation=how.allocation, settings=asdict(how), seed=seed, **common,
    )  # fmt: skip


METHOD = method(
    Method(
        name="granet",
        title="Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        arxiv="2106.10404",
        units=("weight", "block"),
        when=("during training",),
        how="|w| over the whole network, cubic schedule; exchange of small |w| for large gradients",
        run=granet,
        needs=("data", "labels", "training"),
        claim="At equal sparsity and training, GraNet is better than RigL, SET and gradual magnitude pruning.",
    )
)
