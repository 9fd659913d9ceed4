"""N:M training in any loop: SR-STE, a straight-through gradient with a pull on what the pattern removes.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.budget import Budget, Pattern
from ..core.errors import BudgetError
from ..core.select import n_of_m_inputs
from .pruner import Pruner
from .scope import divided_weights, prunable_weights
from .scoring import State
from .update import Moment

__all__ = ["SRSTE", "Always", "Patterned"]


@dataclass(frozen=True)
class Always:
    """A schedule of one sparsity, with an update at every step."""

    final: float
    end: int = 0

    def __call__(self, step: int) -> float:
        return self.final

    def due(self, step: int) -> bool:
        return True


@dataclass(frozen=True)
class Patterned:
    """Of every `pattern.of` consecutive inputs of a weight those `pattern.keep` of largest |w| stay, ties by index."""

    pattern: Pattern

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {}

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        keep, of = self.pattern.keep, self.pattern.of
        return {name: n_of_m_inputs(w.abs(), keep, of) for name, w in moment.weights.items()}, state


def SRSTE(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    pattern: str = "2:4",
    pull: float = 2e-4,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    debug: bool = False,
) -> Pruner:
    """A `Pruner` that trains an N:M sparse network from its first step on.

    Forward and backward pass see the sparse weights `W̃ = E ⊙ W`; the dense W waits outside the model and is trained by

        W ← W − γ·(∂L/∂W̃ + λ·(1 − E) ⊙ W)

    which the optimizer does with whatever momentum and weight decay it has; then E is chosen anew from |W|.

    Args:
        model: pruned in place. Weights whose inputs the pattern does not divide stay dense.
        optimizer: the one that trains it.
        pattern: how many of how many consecutive inputs stay.
        pull: λ (2e-4, the paper); 0 is the plain straight-through estimator.
        scope: patterns of the weights to prune; each must then be divided by the pattern.
        ignore: patterns of weights to leave out.
        debug: check the masks at every step.

    Raises:
        BudgetError: not a pattern; OptionError: it divides none of the weights, or not all in `scope`, or a negative
            pull.
        ModelError: nothing to prune.

    >>> layer = nn.Linear(8, 2)
    >>> pruner = SRSTE(layer, torch.optim.SGD(layer.parameters(), 0.1))
    >>> pruner.masks["weight"].view(-1, 4).sum(1).tolist()
    [2, 2, 2, 2]
    """
    chosen = Budget.parse(pattern).pattern
    if chosen is None:
        raise BudgetError(f"SR-STE needs a pattern such as '2:4', got {pattern!r}.")
    weights = prunable_weights(model, scope, ignore)
    fitting = divided_weights(weights, chosen.of, str(chosen), all_of_them=scope is not None)
    schedule, rule = Always(chosen.sparsity), Patterned(chosen)
    return Pruner(model, optimizer, schedule, rule, fitting, revive="straight-through", pull=pull, debug=debug)
