"""L-ADMM: the weights that stay by alternating directions (ADMM), with a mask that tightens on the way.

Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv 2401.02938. Unit: single
weights, or N:M patterns along the inputs. When: after training, layer by layer. How: inputs are scaled to norm 1; then
20 iterations of ADMM between the least-squares fit, one product with a fixed inverse, and the projection on the mask,
which in the first 15 is chosen anew from |W + U| at a sparsity that rises by a cubic schedule.

Defaults. The released code's: damping 0.1, ρ = 1. There the schedule is computed and, where the whole matrix competes,
not used; here it is, unless `gradual=False`.
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
from ...solvers import BlockDone, Propagate, Solved, admm
from ..parameters import Between, OneOf, Switch, check
from ._updates import WORKSPACES

__all__ = ["METHOD", "LAdmm", "l_admm"]


@dataclass(frozen=True)
class LAdmm:
    """Hyperparameters.

    Args:
        iterations: 20.
        refreshes: of the mask, in the first so many iterations (15).
        gradual: whether the sparsity rises over them (on).
        damping: share of the diagonal that is added to it (0.1).
        within: what is compared: all weights of the "matrix" (default), or those of a "row".
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    iterations: Annotated[int, Between(1, whole=True)] = 20
    refreshes: Annotated[int, Between(1, whole=True)] = 15
    gradual: Annotated[bool, Switch()] = True
    damping: Annotated[float, Between(0)] = 0.1
    within: Annotated[Within, OneOf(("row", "matrix"))] = "matrix"
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        workspace = WORKSPACES["admm"]
        return LayerSolver("l-admm", partial(_solve, how=self), full=True, within=self.within, workspace=workspace)


def l_admm(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: LAdmm | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros, and with the weights that stay moved to make up for them.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or LAdmm(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: LAdmm) -> Solved:
    return admm(
        subject.weight, subject.inputs.known_hessian, subject.comparison, iterations=how.iterations,
        refreshes=how.refreshes, gradual=how.gradual, damping=how.damping, where=subject.where,
    )  # fmt: skip


METHOD = method(
    Method(
        name="l-admm",
        title="Fast and Effective Weight Update for Pruned Large Language Models",
        arxiv="2401.02938",
        units=("weight", "N:M"),
        when=("after training",),
        how="ADMM with a gradually tightened mask, layer by layer",
        run=l_admm,
        needs=("data",),
        claim="Its layers err less than SparseGPT's, at a comparable cost.",
    )
)
