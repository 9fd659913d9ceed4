"""Second-order criteria of a layer's own error: what its outputs lose, by the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers.gram import Gram, from_matrix, solvable, to_matrix
from ..solvers.obs import saliency
from .evidence import Visitor, observe, values
from .lifting import Lift, owner
from .registry import criterion

__all__ = ["obs"]

# Numbers of all hessians that are held at a time: 1 GiB in float64. One that is larger is held alone.
_HELD = 2**27


@criterion(
    "obs", needs=("data",), lift=Lift(members="in"), paper="Hassibi and Stork 1993; Wang et al. 2024, arXiv 2403.18955"
)
def obs(
    model: nn.Module, names: Sequence[str], *, data: Sequence[Any], seed: int, damping: float = 0.01
) -> dict[str, Tensor]:
    """w²/(2·[H⁻¹]_qq): the squared error of the layer that is left when w goes and its row makes up for it.

    H is that of the inputs of the unpruned model (see `solvers.Gram`). Of a channel the layers that consume it count by
    default. Defined for weights of Linear, Conv, ConvTranspose without groups and Hugging Face's Conv1D; tensors of
    other layers do not count.

    Args:
        model, names, data, seed: see `activation.wanda`.
        damping: share of the mean diagonal of H that is added to it (0.01, SparseGPT's code).
    """
    owners = {n: owner(model, n) for n in names if n.endswith(".weight") or n == "weight"}
    known = {n: module for n, module in owners.items() if solvable(module)}
    weights = {n: to_matrix(known[n], w) for n, w in values(model, tuple(known)).items()}
    found: dict[str, Tensor] = {}
    for some in _portions(weights):
        for name, gram in _grams(model, some, data, seed).items():
            parts = zip(weights[name], gram.hessian, strict=True)
            costs = torch.stack([saliency(w, h, share=damping, where=name) for w, h in parts])
            found[name] = from_matrix(known[name], costs, model.get_parameter(name).shape)
    return found


def _grams(model: nn.Module, names: Sequence[str], data: Sequence[Any], seed: int) -> dict[str, Gram]:
    grams = {name: Gram() for name in names}

    def visitor(gram: Gram) -> Visitor:
        return lambda module, given, made: gram.add(module, given)

    observe(model, data, {n.rpartition(".")[0]: visitor(gram) for n, gram in grams.items()}, seed=seed)
    return grams


def _portions(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """The names in runs whose hessians are held together."""
    run: list[str] = []
    held = 0
    for name, weight in weights.items():
        groups, _, columns = weight.shape
        if run and held + groups * columns**2 > _HELD:
            yield tuple(run)
            run, held = [], 0
        run.append(name)
        held += groups * columns**2
    if run:
        yield tuple(run)
