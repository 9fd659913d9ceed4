"""Random pruning at initialization: only the share of each layer is chosen, positions are drawn, masks stay.

Liu et al., "The Unreasonable Effectiveness of Random Pruning", ICLR 2022, arXiv 2202.02643.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.allocate import allocate, densities, shares
from ..core.budget import units_kept
from ..core.errors import OptionError
from ..core.schedule import OneShot
from ..core.units import WeightGroup
from .pruner import Pruner
from .scope import prunable_weights
from .scoring import Criterion
from .update import Drawn, stream

__all__ = ["RandomSparse", "ranked_densities"]

Patterns = str | Sequence[str]
# Leaky ReLU with slope 0.01, PyTorch's default.
_GAIN = math.sqrt(2 / (1 + 0.01**2))


def RandomSparse(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    sparsity: float = 0.9,
    allocation: str | Mapping[str, float] | Criterion = "erk",
    seed: int = 0,
    redraw: bool = False,
    rescale: bool = False,
    scope: Patterns | None = None,
    ignore: Patterns = (),
    debug: bool = False,
    **options: Any,
) -> Pruner:
    """A `Pruner` whose masks are drawn here, before training, and never change.

    Of a tensor with N weights and density d exactly `round(d·N)` stay. The same seed gives the same masks, and each
    tensor's mask depends on nothing but seed, name, shape and count.

    Args:
        model: masked in place; which weights: `prunable_weights(model, scope, ignore)`.
        optimizer: the one that trains it, or None (see `Pruner`).
        sparsity: share of all weights removed, in [0, 1).
        allocation: where from: "erk" (the paper's best), "uniform", "uniform+", "er", "erk+"; densities by name; or a
            function whose global ranking gives the densities (see `ranked_densities`).
        seed: of the positions, and of `redraw` and `rescale`.
        redraw: see `ranked_densities`.
        rescale: draw the weights anew from a normal with `std = gain/√(fan_in·D)`, D the overall density, gain of a
            leaky ReLU (the code's `--scaled`; off by default there as here).
        scope: patterns of the weights to prune.
        ignore: patterns of weights to leave out.
        debug: check the masks at every step.
        **options: of the allocation rule: `power`, `fc_density`, `first`, `classifier`.

    Raises:
        OptionError: an argument outside what is allowed, or densities for other weights than the model's.
        BudgetError: the rule holds some tensors at more than may stay.
        ModelError: nothing to prune.

    >>> layer = nn.Linear(10, 10)
    >>> int(RandomSparse(layer, sparsity=0.9, allocation="uniform").masks["weight"].sum())
    10
    """
    schedule = OneShot(sparsity)
    weights = prunable_weights(model, scope, ignore)
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    kept = _densities(allocation, model, shapes, sparsity, redraw, seed, options)
    total = sum(w.numel() for w in weights.values())
    if (1 - sparsity) * total < len(weights):
        warnings.warn(
            f"sparsity {sparsity:g} leaves {(1 - sparsity) * total:.0f} of {total} weights for {len(weights)} tensors; "
            "some will be empty.",
            stacklevel=2,
        )
    if rescale:
        _rescale(weights, 1 - sparsity, seed)
    counts = {name: round(kept[name] * w.numel()) for name, w in weights.items()}
    return Pruner(model, optimizer, schedule, Drawn(counts, seed), weights, debug=debug)


def ranked_densities(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
    criterion: Criterion,
    *,
    redraw: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """The share of each weight among the highest-scored of all: SNIP or GraSP ratios without their positions.

    The model itself is not touched: a copy in training mode is scored.

    Args:
        model: scored by `criterion` over all weights in `shapes` together.
        shapes: by weight name.
        sparsity: share of all weights that the ranking removes, in [0, 1).
        criterion: `(model, groups) -> {group name: scores}`, such as `partial(criteria.score, "snip", data=batches)`;
            the published code takes one batch for SNIP and 25 samples a class for GraSP.
        redraw: draw the copy's weights from Xavier's normal first, as the published code does for SNIP.
        seed: of the redrawn weights.
    """
    twin = copy.deepcopy(model).train()
    if redraw:
        for name in shapes:
            _xavier(twin.get_parameter(name), stream(seed, name))
    groups = [WeightGroup(name, shape) for name, shape in shapes.items()]
    scores = criterion(twin, groups)
    sizes = {group.name: group.size for group in groups}
    return shares(allocate("global", scores, units_kept(sparsity, sum(sizes.values()))), sizes)


def _densities(
    allocation: str | Mapping[str, float] | Criterion,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
    redraw: bool,
    seed: int,
    options: Mapping[str, Any],
) -> Mapping[str, float]:
    if isinstance(allocation, str):
        return densities(allocation, shapes, 1 - sparsity, **options)
    if options:
        raise OptionError(f"only a named allocation has options, got {', '.join(options)}.")
    if isinstance(allocation, Mapping):
        return _given(allocation, shapes)
    return ranked_densities(model, shapes, sparsity, allocation, redraw=redraw, seed=seed)


def _given(allocation: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, float]:
    strange = sorted(set(allocation) ^ set(shapes))
    if strange:
        raise OptionError(
            f"densities are needed for exactly the weights {', '.join(shapes)}; {', '.join(strange)} differ."
        )
    wrong = [f"{name} {value}" for name, value in allocation.items() if not 0 <= value <= 1]
    if wrong:
        raise OptionError(f"densities must lie in [0, 1], got {', '.join(wrong)}.")
    return allocation


@torch.no_grad()
def _rescale(weights: Mapping[str, nn.Parameter], density: float, seed: int) -> None:
    for name, weight in weights.items():
        fan_in = math.prod(weight.shape[1:])
        _normal(weight, _GAIN / math.sqrt(fan_in * density), stream(seed, f"{name}/rescale"))


@torch.no_grad()
def _xavier(weight: Tensor, generator: torch.Generator) -> None:
    field = math.prod(weight.shape[2:])
    _normal(weight, math.sqrt(2 / (field * (weight.shape[0] + weight.shape[1]))), generator)


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))
