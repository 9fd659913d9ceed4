"""SparseGPT: one sweep over the columns of each layer, in which every weight that goes is made up for by those to come.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv 2301.00774. Unit: single weights, or N:M patterns along the inputs. When: after training, layer by layer. How:
with H = 2·X·Xᵀ of the layer's inputs, damped, and U the upper Cholesky factor of H⁻¹, the columns are gone through from
left to right in blocks; of each block the weights of least w²/U_jj² go, and each that goes moves the later weights of
its row to where the error is least (equation 3).

Defaults. Damping 0.01 of the mean diagonal and blocks of 128 columns, the paper's; blocks of the network only:
embeddings, head and norms stay. The paper calibrates on 128 sequences of 2,048 tokens of C4.

Not as in the published code: exactly the share asked for goes (there, one weight more in each block); inputs that met
only zeros lose their weights first, but no more than asked; a Hessian that cannot be inverted is damped tenfold up to
three times and then an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from torch import nn

from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...in_layers import LayerSolver, Subject, prune_with
from ...pruning import Pruned
from ...solvers import BlockDone, Propagate, Solved
from ...solvers import sparsegpt as sweep
from ..parameters import Between, OneOf, Switch, check
from ._updates import WORKSPACES

__all__ = ["METHOD", "SparseGPT", "sparsegpt"]


@dataclass(frozen=True)
class SparseGPT:
    """Hyperparameters.

    Args:
        block: columns that are chosen together (128); with N:M, a matter of speed only.
        damping: share of the mean diagonal of H that is added to it (0.01).
        levels: gather what a layer sees after those before it in its block are solved ("true sequential"; off).
        propagate: what the next block sees: "pruned" activations (default) or "dense".
    """

    block: Annotated[int, Between(1, whole=True)] = 128
    damping: Annotated[float, Between(0)] = 0.01
    levels: Annotated[bool, Switch()] = False
    propagate: Annotated[Propagate, OneOf(("pruned", "dense"))] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""
        return LayerSolver("sparsegpt", partial(_solve, how=self), full=True, workspace=WORKSPACES["obs"])


def sparsegpt(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None, on_block: Callable[[BlockDone], None] | None = None,
    options: SparseGPT | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with zeros, and with the weights that stay moved to make up for them.

    Arguments and errors are those of `in_layers.prune_with`, "sparsity=50%" or "2:4" the usual budgets.
    """
    layers: dict[str, Any] = {"allocation": allocation, "allocation_options": allocation_options, "on_block": on_block}
    return prune_with(options or SparseGPT(), model, example_inputs, budget, **layers, **common)


def _solve(subject: Subject, how: SparseGPT) -> Solved:
    return sweep(
        subject.weight, subject.inputs.known_hessian, subject.comparison, block=how.block, damping=how.damping,
        where=subject.where, in_place=True,
    )  # fmt: skip


METHOD = method(
    Method(
        name="sparsegpt",
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        arxiv="2301.00774",
        units=("weight", "N:M"),
        when=("after training",),
        how="one OBS sweep over columns, layer by layer",
        run=sparsegpt,
        needs=("data",),
        claim="At 50% the perplexity of large models hardly rises, and it is below Wanda's and magnitude's.",
    )
)
