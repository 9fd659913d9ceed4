"""ExactOBS: in each row the cheapest weight goes, the others make up for it exactly, and so on to the last.

Frantar, Singh and Alistarh, "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and
Pruning", NeurIPS 2022, arXiv 2208.11580. Unit: single weights, or N:M patterns along the inputs. When: after training,
layer by layer. How: with C = H⁻¹ of the layer's inputs, the weight of least w_q²/C_qq goes, the row becomes
w − (w_q/C_qq)·C_q,: and C loses row and column q (equations 2 to 4); each row has a C of its own. Of all rows' removals
the cheapest are made, or the same number in each.

Defaults. Damping 0.01 of the mean diagonal; the whole matrix competes, as in the paper. Cubic in the inputs for every
row: for small layers, or as the reference by which faster solvers are judged.
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
from ...solvers import exact_obs as greedy
from ..parameters import Between, OneOf, check

__all__ = ["METHOD", "ExactOBS", "exact_obs"]


@dataclass(frozen=True)
class ExactOBS:
    """Hyperparameters.

    Args:
        damping: share of the mean diagonal of H that is added to it (0.01).
        within: what is compared: all weights of the "matrix" (default), or those of a "row".
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    damping: Annotated[float, Between(0)] = 0.01
    within: Annotated[Within, OneOf(("row", "matrix"))] = "matrix"
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        workspace = Workspace(weight=48, product=24, fixed=320 * 2**20)
        return LayerSolver("exact-obs", partial(_solve, how=self), full=True, within=self.within, workspace=workspace)


def exact_obs(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: ExactOBS | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros, and with the weights that stay moved to make up for them.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or ExactOBS(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: ExactOBS) -> Solved:
    hessian = subject.inputs.known_hessian
    return greedy(subject.weight, hessian, subject.comparison, damping=how.damping, where=subject.where)


METHOD = method(
    Method(
        name="exact-obs",
        title="Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        arxiv="2208.11580",
        units=("weight", "N:M"),
        when=("after training",),
        how="greedy OBS row by row, layer by layer",
        run=exact_obs,
        needs=("data",),
        claim="One weight at a time, each made up for exactly, errs less than any mask chosen at once.",
    )
)
