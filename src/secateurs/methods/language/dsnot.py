"""DSnoT: a mask made better without training and without touching a weight, by swaps that cancel the expected error.

Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, arXiv 2310.08915.
Unit: single weights, or N:M patterns along the inputs. When: after training, layer by layer. How: a first mask by Wanda
(or by size); then in each row, as long as the expected error r = Σ w_j·E[x_j] over the weights that went is above a
threshold and keeps its sign, the weight that reduces it most, divided by Var[x_j], grows back, and the weight of the
opposite effect with the least Wanda score goes (equations 4 and 5).

Defaults. 50 swaps a row, threshold 0.1 and power 1 of the variance, the code's. With N:M both weights of a swap are of
one group, so that the pattern holds after each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from torch import nn

from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.comparison import Within
from ...in_layers import LayerSolver, Subject, Workspace, prune_with
from ...pruning import Pruned
from ...solvers import BlockDone, Propagate, Solved, wanda_scores
from ...solvers import dsnot as refined
from ..parameters import Between, OneOf, check

__all__ = ["METHOD", "DSnoT", "dsnot"]


@dataclass(frozen=True)
class DSnoT:
    """Hyperparameters.

    Args:
        start: the first mask: "wanda" (default) or "magnitude".
        cycles: swaps a row at most (50).
        threshold: of |r|, in the units of the output (0.1).
        power: of the variance (1).
        within: what is compared: the weights of a "row" (default), or of the whole "matrix".
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    start: Annotated[Literal["wanda", "magnitude"], OneOf(("wanda", "magnitude"))] = "wanda"
    cycles: Annotated[int, Between(1, whole=True)] = 50
    threshold: Annotated[float, Between(0)] = 0.1
    power: Annotated[float, Between(0)] = 1.0
    within: Annotated[Within, OneOf(("row", "matrix"))] = "row"
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        return LayerSolver("dsnot", partial(_solve, how=self), within=self.within, workspace=Workspace(weight=80))


def dsnot(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: DSnoT | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros where the refined mask has them.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or DSnoT(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: DSnoT) -> Solved:
    weight, inputs, comparison = subject.weight, subject.inputs, subject.comparison
    scores = wanda_scores(weight, inputs.norm) if how.start == "wanda" else weight.abs()
    mask = refined(
        weight, comparison.keep(scores), inputs.mean, inputs.variance, inputs.norm, pattern=comparison.pattern,
        cycles=how.cycles, threshold=how.threshold, power=how.power, where=subject.where,
    )  # fmt: skip
    return Solved(weight * mask, mask)


METHOD = method(
    Method(
        name="dsnot",
        title="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
        arxiv="2310.08915",
        units=("weight", "N:M"),
        when=("after training",),
        how="grow and prune swaps against the expected error of each row",
        run=dsnot,
        needs=("data",),
        claim="It improves the masks of Wanda, of SparseGPT and of magnitude, most at high sparsity.",
    )
)
