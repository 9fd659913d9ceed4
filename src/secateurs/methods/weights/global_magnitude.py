"""Global magnitude pruning with a minimum threshold: one ranking for the whole network, with a floor on every layer.

Gupta et al., "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning", 2022,
arXiv 2209.14624. Unit: single weights of every convolution and linear layer, first and last included. When: after
training, in one shot, then masked fine-tuning. How: |w| ranked over all tensors together; of T weights the
K = round((1 - s)·T) largest stay.

Minimum threshold: at extreme sparsity that ranking empties whole layers, so each keeps at least m% of T weights (m =
0.05, the same number for every layer; a smaller layer stays dense). The published loop approaches this by rescaling
and need not end; here it is water filling on counts (`core.allocate`), exact in one pass.

Defaults. The floor is the code's. Fine-tuning in the code: 120 epochs of SGD on ImageNet, learning rate 0.1024,
momentum 0.875, cosine to 0, label smoothing 0.1; pass `recover=FineTune(…)` with what your data need.
The code keeps the threshold itself and so prunes one weight fewer; here exactly k go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...pruning import Pruned, prune
from ...train.scope import prunable_weights
from ..parameters import Between, check

__all__ = ["METHOD", "Global", "global_magnitude"]


@dataclass(frozen=True)
class Global:
    """Hyperparameters.

    Args:
        minimum: fewest weights that stay in a layer, in per cent of ALL weights (0.05, the code); 0 for none.
    """

    minimum: Annotated[float, Between(0, 100)] = 0.05

    def __post_init__(self) -> None:
        check(self)


def global_magnitude(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, options: Global | None = None, **common: Any
) -> Pruned:
    """A copy of `model` whose smallest weights of all layers together are zero.

    Args:
        model, example_inputs, budget: as for `prune`; "sparsity=90%" is the usual budget.
        options: hyperparameters.
        common: data, test, recover, scope, ignore and the rest of `prune`'s arguments.

    Raises:
        BudgetError: the floors alone keep more than the budget allows; it quotes both numbers.
    """
    how = options or Global()
    total = sum(w.numel() for w in prunable_weights(model, common.get("scope"), common.get("ignore", ())).values())
    floor = int(total * how.minimum / 100)
    chosen: dict[str, Any] = {"granularity": "weight", "criterion": "magnitude", "allocation": "global", "floor": floor}
    return prune(model, example_inputs, budget, **chosen, **common)


METHOD = method(
    Method(
        name="global-magnitude",
        title="Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
        arxiv="2209.14624",
        units=("weight",),
        when=("after training",),
        how="|w| over the whole network, a floor per layer",
        run=global_magnitude,
        claim="One global threshold is as good as any criterion, and a minimum per layer prevents layer collapse.",
    )
)
