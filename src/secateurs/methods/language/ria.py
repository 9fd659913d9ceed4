"""RIA: the share of a weight in its row and in its column, times a power of its input's norm, with channels permuted.

Zhang, Bai, Lin, Zhao, Hou and Cannistraci, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR 2024. Unit: single weights, or N:M patterns along the inputs. When: after training, layer by
layer. How, in two steps:

    1. scores        (|w_ij|/Σ_i|w_ij| + |w_ij|/Σ_j|w_ij|)·‖x_j‖^a (equation 4): no input is lost as a whole because all
                     its weights are small
    2. permutation   before N:M, inputs are dealt to groups so that the best are not in one: sorted by summed score, to
                     and fro over the groups, then, with `permute="refined"`, slot by slot by linear sum assignment

Defaults. a = 0.5 and each row for itself, the paper's. Step 2 is off: the pattern then holds in the permuted order
only, for which a runtime must gather its inputs, and what is saved here is in the original order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from torch import nn

from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.comparison import Within
from ...in_layers import LayerSolver, Subject, prune_with
from ...pruning import Pruned
from ...solvers import BlockDone, Propagate, Solved, channel_order, relative_importance
from ..parameters import Between, OneOf, check
from ._updates import UPDATES, WORKSPACES, Update, updated

__all__ = ["METHOD", "Ria", "ria"]


@dataclass(frozen=True)
class Ria:
    """Hyperparameters.

    Args:
        power: a, of the norm of the input (0.5).
        within: what is compared: the weights of a "row" (default), or of the whole "matrix".
        permute: inputs before N:M: "none" (default), "dealt" or "refined" (with scipy).
        update: what is done to the weights that stay: "none" (default), "obs", "admm" or "least-squares".
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    power: Annotated[float, Between(0)] = 0.5
    within: Annotated[Within, OneOf(("row", "matrix"))] = "row"
    permute: Annotated[Literal["none", "dealt", "refined"], OneOf(("none", "dealt", "refined"))] = "none"
    update: Annotated[Update, OneOf(UPDATES)] = "none"
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        own = WORKSPACES[self.update]
        # The importance stays beside what the update takes, and is there twice in another order.
        workspace = replace(own, weight=own.weight + 12)
        full = self.update != "none"
        return LayerSolver("ria", partial(_solve, how=self), full=full, within=self.within, workspace=workspace)


def ria(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: Ria | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros where the relative importance is least.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or Ria(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: Ria) -> Solved:
    scores = relative_importance(subject.weight, subject.inputs.norm, how.power)
    pattern = subject.comparison.pattern
    if pattern is None or how.permute == "none":
        return updated(subject, subject.comparison.keep(scores), how.update)
    order = channel_order(scores, pattern, refine=how.permute == "refined")
    return updated(subject, subject.comparison.keep(scores[:, order])[:, order.argsort()], how.update)


METHOD = method(
    Method(
        name="ria",
        title="Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        arxiv="",
        units=("weight", "N:M"),
        when=("after training",),
        how="relative importance times input norms, channel permutation before N:M",
        run=ria,
        needs=("data",),
        claim="At 2:4 it is better than Wanda and SparseGPT, and permuting channels gains more.",
    )
)
