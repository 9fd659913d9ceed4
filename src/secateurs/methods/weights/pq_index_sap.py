"""SAP: how unevenly the weights that are left are spread says how many of them go in the next round.

Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv 2302.05601. Unit: single
weights of every convolution and linear layer, first and last included. When: after training, in rounds: train, prune,
go back to the first weights, train again. How: the smallest |w| go; of d weights that are left in a pool (a layer, a
neuron or the model) and 0 < p < q,

    I = 1 - d^(1/q - 1/p)·‖w‖_p / ‖w‖_q                                             the PQ index, 0 if all are equal
    r = ⌈d·(1 + η)^(-q/(q-p))·(1 - I)^(pq/(q-p))⌉                                   fewest that can hold what matters
    c = ⌊d·min(γ·(1 - r/d), β)⌋                                                     how many go in this round

With (p, q) = (0.5, 1), η = 0 and γ = 1 the share that goes is I itself; with (1, 2) it is 1 - (1 - I)². A share that is
the same in every round (`fixed_share`) makes the same loop iterative magnitude pruning with rewinding, which finds
lottery tickets (Frankle and Carbin, arXiv 1803.03635). The index of any weights or scores is `core.pq.pq_index`;
`inspect` shows it for every layer, and allocation "pq-index" divides any budget by it.

Defaults. (0.5, 1) of the paper's two pairs; η = 0, γ = 1, β = 0.9 and 30 rounds are the paper's (15 for ResNets), pools
by layer one of its three scopes. Training in the code: 200 epochs of SGD a round, learning rate 0.1, Nesterov momentum
0.9, weight decay 5e-4, cosine to 0; pass `recover=FineTune(…)` with what one round of yours needs.

The model given is what every round goes back to: a fresh one for the lottery ticket, one trained for some steps for
late rewinding. Rounds end when the budget is met, exactly: the round that would go beyond it stops there, and the last
one takes what is left to it.

What the code has and the paper does not, and how it is here: of every round it keeps the epoch that is best on the test
set; here the last one stays, since nothing is chosen by test data. It leaves running statistics of batch norm when
it goes back; here they go back too. It finds the index only for p and q on a grid; here for any pair.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...core.budget import Budget, units_kept
from ...core.catalogue import Method, method
from ...core.errors import BudgetError
from ...core.pool import Per, prune_pools
from ...core.pq import adaptive_keep, check_orders, share_keep
from ...in_training import Session, prune_by_training
from ...pruning import FineTune, Pruned
from ...recover.finetune import History
from ...recover.tickets import Masks, Round, training_rounds
from ...train.scope import prunable_weights
from ..parameters import Between, OneOf, check

__all__ = ["METHOD", "Sap", "next_masks", "pq_index_sap"]

Rewind = Literal["weights", "none"]


@dataclass(frozen=True)
class Sap:
    """Hyperparameters.

    Args:
        p, q: orders of the index, p < q ((0.5, 1) and (1, 2), the paper).
        eta: η, what may be lost against what is kept (0, the paper).
        gamma: γ, how boldly the bound is followed (1, the paper).
        beta: β, the largest share of a pool that goes in a round (0.9, the paper).
        per: what is a pool: each "layer", each "neuron" (a place along a weight's first axis) or the whole "model".
        rounds: how many times weights go, at most (30, the paper).
        fixed_share: of what is left goes in each round, whatever the index says (0.2, the lottery ticket); 0: the
            index decides.
        rewind: go back to the first "weights" in every round (the paper), or to "none" and train on.
    """

    p: Annotated[float, Between(0, closed="neither")] = 0.5
    q: Annotated[float, Between(0, closed="neither")] = 1.0
    eta: Annotated[float, Between(0)] = 0.0
    gamma: Annotated[float, Between(0)] = 1.0
    beta: Annotated[float, Between(0, 1, closed="neither")] = 0.9
    per: Annotated[Per, OneOf(get_args(Per))] = "layer"
    rounds: Annotated[int, Between(1, whole=True)] = 30
    fixed_share: Annotated[float, Between(0, 1)] = 0.0
    rewind: Annotated[Rewind, OneOf(get_args(Rewind))] = "weights"

    def __post_init__(self) -> None:
        check(self)
        check_orders(self.p, self.q)

    @property
    def allocation(self) -> str:
        """The allocation rule that divides a budget as these rounds do, for the plan."""
        if self.per == "model":
            return "global"
        return "uniform" if self.fixed_share else "pq-index"


def pq_index_sap(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Sap | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model`, trained by `recover` from its own weights in each of several rounds of pruning.

    Args:
        model: what every round goes back to.
        example_inputs: as for `prune`.
        budget: "sparsity=…" alone; the rounds end when it is met.
        recover: the training of one round; `FineTune(epochs=…)`.
        options: hyperparameters.
        common: data, test, loss, seed, scope, ignore and the rest of `prune`'s arguments; with `test` the report has
            the quality after every round.

    Raises:
        BudgetError: another budget than a sparsity.
        OptionError: no training given.
    """
    how = options or Sap()
    asked = Budget.parse(budget).limit("sparsity")
    if asked is None or len(Budget.parse(budget).limits) > 1:
        raise BudgetError(f"SAP needs a budget such as 'sparsity=90%', got {str(budget)!r}.")
    seed, checkpoint = common.get("seed", 0), common.get("checkpoint")
    loss, on_step = common.pop("loss", None), common.pop("on_step", None)

    def train(session: Session) -> dict[str, Tensor]:
        weights = prunable_weights(session.model, common.get("scope"), common.get("ignore", ()))
        dense = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        total = units_kept(asked.value, sum(mask.numel() for mask in dense.values()))

        def once(masks: Masks, number: int) -> History:
            folder = None if checkpoint is None else Path(checkpoint) / f"round-{number}"
            with session.clock("training"):
                return session.recover.run(
                    session.model, session.original, session.data, masks=masks, loss=loss, seed=seed,
                    checkpoint=folder, on_step=on_step,
                )  # fmt: skip

        def choose(trained: Masks, masks: Masks, number: int) -> Masks | None:
            return next_masks(trained, masks, how, total, last=number + 1 >= how.rounds)

        done: list[Round] = []
        for latest in training_rounds(session.model, dense, once, choose, rewinding=how.rewind == "weights"):
            done.append(latest)
            session.test(f"round {latest.number}, {latest.density:.1%} left")
        session.notes.history = History(tuple(epoch for one in done for epoch in one.history.epochs))
        return dict(done[-1].masks)

    return prune_by_training(
        model, example_inputs, budget, train, recover=recover, allocation=how.allocation, settings=asdict(how), **common
    )


def next_masks(
    weights: Masks, masks: Masks, how: Sap, total: int | None = None, *, last: bool = False
) -> dict[str, Tensor] | None:
    """The masks of the next round, steps 3 to 6 of the paper's algorithm; None if `total` is met already.

    Args:
        weights: as trained under the masks, by name.
        masks: bool, true is what is left.
        how: hyperparameters.
        total: so many weights stay at least; None for no bound, so that the rule alone decides.
        last: whether so many stay exactly, as they do too where the rule takes nothing.
    """
    count = partial(_kept, how)
    left = sum(int(mask.sum()) for mask in masks.values())
    if total is not None and left <= total:
        return None
    found = prune_pools(weights, masks, count, per=how.per)
    stay = sum(int(mask.sum()) for mask in found.values())
    if total is None or (total <= stay < left and not last):
        return found
    return prune_pools(weights, masks, count, per=how.per, total=total)


def _kept(how: Sap, pool: Tensor, left: Tensor) -> Tensor:
    if how.fixed_share:
        return share_keep(pool, how.fixed_share, keep=left)
    return adaptive_keep(pool, how.p, how.q, keep=left, eta=how.eta, gamma=how.gamma, beta=how.beta)


METHOD = method(
    Method(
        name="pq-index-sap",
        title="Pruning Deep Neural Networks from a Sparsity Perspective",
        arxiv="2302.05601",
        units=("weight",),
        when=("after training",),
        how="|w|, as many a round as the PQ index of what is left says",
        run=pq_index_sap,
        needs=("data", "labels", "training"),
        fused=("lottery-ticket rewinding",),
        claim="An index of how sparse the weights are tells how many can go, better than a fixed share a round.",
    )
)
