"""ALPS: ADMM for the best support of each layer, with a penalty that rises as it settles, then conjugate gradients.

Meng, Behdin, Wang and Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", NeurIPS 2024, arXiv 2406.07831. Unit: single weights, or N:M patterns along the inputs. When: after training,
layer by layer. How: min ‖WX − W'X‖² over matrices with at most k entries, split into a dense and a sparse copy;
iterations of ADMM in the eigenbasis of the Hessian (algorithm 1) with ρ raised by how much the support still changes,
and at last ten steps of conjugate gradients on the support that was found (algorithm 2).

Defaults. The released code's: damping 0.01, ρ = 0.1 at first, at most 300 iterations, the whole matrix competes.
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
from ...in_layers import LayerSolver, Subject, Workspace, prune_with
from ...pruning import Pruned
from ...solvers import BlockDone, Propagate, Solved
from ...solvers import alps as best_support
from ..parameters import Between, OneOf, check

__all__ = ["METHOD", "Alps", "alps"]


@dataclass(frozen=True)
class Alps:
    """Hyperparameters.

    Args:
        damping: share of the mean diagonal of H that is added to it (0.01).
        rho: ρ at first (0.1).
        iterations: at most (300).
        steps: of conjugate gradients (10).
        within: what is compared: all weights of the "matrix" (default), or those of a "row".
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    damping: Annotated[float, Between(0)] = 0.01
    rho: Annotated[float, Between(0, closed="neither")] = 0.1
    iterations: Annotated[int, Between(1, whole=True)] = 300
    steps: Annotated[int, Between(0, whole=True)] = 10
    within: Annotated[Within, OneOf(("row", "matrix"))] = "matrix"
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        workspace = Workspace(weight=52, product=36)
        return LayerSolver("alps", partial(_solve, how=self), full=True, within=self.within, workspace=workspace)


def alps(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: Alps | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros, and with the weights that stay moved to make up for them.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or Alps(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: Alps) -> Solved:
    return best_support(
        subject.weight, subject.inputs.known_hessian, subject.comparison, damping=how.damping, rho=how.rho,
        iterations=how.iterations, steps=how.steps, where=subject.where,
    )  # fmt: skip


METHOD = method(
    Method(
        name="alps",
        title="ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        arxiv="2406.07831",
        units=("weight", "N:M"),
        when=("after training",),
        how="ADMM on the support, then conjugate gradients, layer by layer",
        run=alps,
        needs=("data",),
        claim="At high sparsity its layers err least of all one-shot methods.",
    )
)
