"""Random pruning at initialization: only the share of each layer is chosen, positions are drawn, masks never change.

Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
ICLR 2022, arXiv 2202.02643. Unit: single weights of convolutions and linear layers. When: before training. How: no
score; a rule gives each layer a density d_l with Σ d_l·N_l = D·T, and round(d_l·N_l) positions are drawn.

Rules: uniform, uniform+ (first layer dense), ER, ERK, ERK+ (classifier dense); ER and ERK densities are proportional
to (in + out)/(in·out) and (in + out + kh + kw)/(in·out·kh·kw), clipped at 1. Ratios taken from SNIP or GraSP are
`train.RandomSparse(allocation=…)`.

Defaults. ERK, the paper's best rule that looks at no data. The code draws each position independently, so that the
sparsity is only met on average and a small layer can come out empty; here counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from ...core.allocate import get_allocation
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import OptionError
from ...pruning import Pruned, prune
from ..parameters import Registered, check

__all__ = ["METHOD", "Random", "random_pruning"]


@dataclass(frozen=True)
class Random:
    """Hyperparameters.

    Args:
        rule: of the layers' densities: "erk", "er", "erk+", "uniform" or "uniform+".
    """

    rule: Annotated[str, Registered(get_allocation)] = "erk"

    def __post_init__(self) -> None:
        check(self)
        if get_allocation(self.rule).needs_scores:
            raise OptionError(f"random pruning ranks nothing, so rule {self.rule!r} has no scores to divide by.")


def random_pruning(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, options: Random | None = None, **common: Any
) -> Pruned:
    """A copy of `model` with randomly chosen weights at zero, and trained with this mask if `recover` says how.

    Args:
        model, example_inputs, budget: as for `prune`; meant for a freshly initialised model.
        options: hyperparameters.
        common: data, test, recover, seed, scope, ignore and the rest of `prune`'s arguments.

    Raises:
        BudgetError: the rule holds some layers at more weights than the budget allows.
    """
    how = options or Random()
    chosen: dict[str, Any] = {"granularity": "weight", "criterion": "random", "allocation": how.rule}
    return prune(model, example_inputs, budget, **chosen, **common)


METHOD = method(
    Method(
        name="random-pruning",
        title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
        arxiv="2202.02643",
        units=("weight",),
        when=("before training",),
        how="random positions, ERK densities",
        run=random_pruning,
        claim="With good layer densities, random sparse training matches dense training of wide enough networks.",
    )
)
