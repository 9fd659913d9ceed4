"""The general importance of weights: what SparseGPT ranks by on open-domain data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batch import double, take
from ...core.comparison import Comparison
from ...core.errors import OptionError
from ...core.finite import all_finite
from ...in_layers import LayerSolver, Subject, solved
from ...recover.context import seeded
from ...solvers import (
    BlockDone,
    Gathering,
    Gram,
    Propagate,
    Solved,
    from_matrix,
    layers_by_block,
    solve_blocks,
    weight_of,
)
from ...solvers import sparsegpt as sweep
from ...solvers.ranks import agree, rank_of

__all__ = ["Sweep", "check_general", "swept", "totals"]


@dataclass(frozen=True)
class Sweep:
    """How SparseGPT goes over the model.

    Args:
        block, damping: see `solvers.sparsegpt`.
        propagate: see `solvers.layerwise.Gathering`.
    """

    block: int = 128
    damping: float = 0.01
    propagate: Propagate = "pruned"


@torch.no_grad()
def swept(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, Comparison],
    how: Sweep,
    *,
    seed: int = 0,
    on_block: Callable[[BlockDone], None] | None = None,
) -> dict[str, Tensor]:
    """G = W²/U_jj² by name of the weight, float32 or wider, in its shape; zeros for a layer that no batch reaches.

    The model stays as it is: its copy is pruned, block by block, and thrown away.

    Args:
        model: any with blocks.
        data: open-domain batches, held all at once.
        layers: by name of the module, what goes of it.
        how: see there.
        seed: of random numbers in the model.
        on_block: told of each block that is done.

    Raises:
        DataError: there is no batch.
        ModelError: a layer cannot be solved.
    """
    made = copy.deepcopy(model)
    blocks = layers_by_block(made, layers)
    found = {weight_of(layer): _zeros(made.get_parameter(weight_of(layer))) for layer in layers}
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    home = {layer: block for block, inside in blocks.items() for layer in inside}
    noted = dict.fromkeys(blocks, 0)

    def choose(subject: Subject) -> Solved:
        hessian, where = subject.inputs.known_hessian, subject.where
        done = sweep(
            subject.weight, hessian, subject.comparison, block=how.block, damping=how.damping, where=where,
            with_scores=True, in_place=True,
        )  # fmt: skip
        assert done.scores is not None
        parts[where].append(done.scores)
        return done

    solver = LayerSolver("general-importance", choose, full=True)

    def solve(layer: str, module: nn.Module, gram: Gram) -> tuple[Tensor, float]:
        result = solved(module, gram, layers[layer], solver, layer)
        scores = found[weight_of(layer)]
        scores.copy_(from_matrix(module, torch.stack(parts.pop(layer)), scores.shape))
        return result

    def note(layer: str, module: nn.Module, mask: Tensor, error: float) -> None:
        # Each process solves its share of a block's layers, in this order.
        agree([found[weight_of(layer)]], rank_of(noted[home[layer]]))
        noted[home[layer]] += 1

    gathering = Gathering(full=True, propagate=how.propagate)
    with seeded(seed, "general importance"):
        batches = take(data, what="open-domain data")
        solve_blocks(made, batches, blocks, solve, gathering, note=note, on_block=on_block)
    return found


def check_general(model: nn.Module, general: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """None; refuses what is no general importance of the weights called `names`, all of it at once.

    Raises:
        OptionError: one is missing, has another shape, or is negative, NaN or infinite somewhere.
    """
    faults = []
    for name in names:
        shape = tuple(model.get_parameter(name).shape)
        if name not in general:
            faults.append(f"{name} has none")
        elif tuple(general[name].shape) != shape:
            faults.append(f"that of {name} has shape {tuple(general[name].shape)}, not {shape}")
        elif not all_finite(general[name]):
            faults.append(f"that of {name} is NaN or infinite somewhere")
        elif bool((general[name] < 0).any()):
            faults.append(f"that of {name} is negative somewhere")
    if faults:
        told = "; ".join(faults[:3])
        raise OptionError(f"the general importance does not fit the model: {told}; find it by general_importance.")


def totals(general: object) -> dict[str, float]:
    """The sum of each general importance that is given, by which a checkpoint knows it."""
    return {n: float(double(g).sum()) for n, g in general.items()} if isinstance(general, Mapping) else {}


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)).detach()
