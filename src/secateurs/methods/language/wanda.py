"""Wanda: weights and activations, the product of a weight's size and its input's norm, compared within each output.

Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
arXiv 2306.11695. Unit: single weights, or N:M patterns along the inputs. When: after training, in one pass over
calibration data, layer by layer. How: of each row of W the weights of least |w_ij|·‖x_j‖₂ go (equation 1), the others
stay as they are; the next block sees what the pruned one gives.

Defaults. The same share of every layer and of each row; blocks only: embeddings, head and norms stay. The paper
calibrates on 128 sequences of 2,048 tokens of C4; give yours as data=. `update=` goes beyond the paper: any of the
weight updates that the other solvers bring, for Wanda's mask.

Not as in the published code: counts are exact where scores tie, and norms count tokens, not sequences (a factor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from torch import nn

from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.comparison import Within
from ...in_layers import LayerSolver, Subject, prune_with
from ...pruning import Pruned
from ...solvers import BlockDone, Propagate, Solved, wanda_scores
from ..parameters import OneOf, check
from ._updates import UPDATES, WORKSPACES, Update, updated

__all__ = ["METHOD", "Wanda", "wanda"]


@dataclass(frozen=True)
class Wanda:
    """Hyperparameters.

    Args:
        within: what is compared: the weights of a "row" (default), or of the whole "matrix".
        update: what is done to the weights that stay: "none" (default), "obs", "admm" or "least-squares".
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    within: Annotated[Within, OneOf(("row", "matrix"))] = "row"
    update: Annotated[Update, OneOf(UPDATES)] = "none"
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        full, workspace = self.update != "none", WORKSPACES[self.update]
        return LayerSolver("wanda", partial(_solve, how=self), full=full, within=self.within, workspace=workspace)


def wanda(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: Wanda | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros where the product of weight and input is least.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or Wanda(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: Wanda) -> Solved:
    # The scores are gone before the weights are moved.
    mask = subject.comparison.keep(wanda_scores(subject.weight, subject.inputs.norm))
    return updated(subject, mask, how.update)


METHOD = method(
    Method(
        name="wanda",
        title="A Simple and Effective Pruning Approach for Large Language Models",
        arxiv="2306.11695",
        units=("weight", "N:M"),
        when=("after training",),
        how="|w|·‖x‖ within each output, layer by layer",
        run=wanda,
        needs=("data",),
        claim="Without any weight update it is far better than magnitude pruning, and close to SparseGPT.",
    )
)
