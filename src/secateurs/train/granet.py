"""Sparse training for any loop: GraNet, and its parts RigL and SET as settings of it.

GraNet: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv
2106.10404. RigL: Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134. SET: Mocanu et al., Nature
Communications 2018, arXiv 1707.04780. The loop itself is `regrowth.Regrowth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.allocate import allocate, floor_counts
from ..core.budget import units_kept
from ..core.errors import OptionError
from ..core.schedule import Cubic
from ..core.units import WeightGroup
from .magnitude import block_groups
from .pruner import Pruner
from .regrowth import Grow, Prolonged, Regrowth, Share
from .scope import prunable_weights
from .scoring import Magnitude
from .update import Ranked, by_rule

__all__ = ["SET", "GraNet", "RigL"]

Patterns = str | Sequence[str]


def GraNet(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    until: int,
    sparsity: float = 0.9,
    initial: float = 0.5,
    begin: int = 0,
    end: int | None = None,
    every: int = 1000,
    share: float = 0.5,
    last_share: float = 0.005,
    grow: Grow = "gradient",
    smoothing: float = 0.9,
    exponent: float = 3.0,
    force_final: bool = True,
    allocation: str | Mapping[str, float] = "global",
    start: str = "erk",
    block: tuple[int, int] = (1, 1),
    pool: Literal["mean", "max"] = "mean",
    floor: int | float = 1,
    seed: int = 0,
    scope: Patterns | None = None,
    ignore: Patterns = (),
    debug: bool = False,
    **options: Any,
) -> Pruner:
    """A `Pruner` that raises sparsity along a cubic curve and exchanges weights all the while: GraNet.

    At every update the smallest weights go until the curve is met; then of the n live weights of each tensor the
    `⌈r·n⌉` smallest go and as many come back, at zero, where the gradient is largest. With `initial` 0 training starts
    dense, else with randomly drawn masks; with `initial` equal to `sparsity` nothing but the exchange is left (RigL).

    Args:
        model: pruned in place; which weights: `prunable_weights(model, scope, ignore)`.
        optimizer: the one that trains it; None only with `grow="random"` or `share=0`.
        until: optimizer step of the last exchange, at which the share has fallen to `last_share`. What grows at the
            very end has no time to learn: end before the training does (the code exchanges until its end, RigL until
            three quarters).
        sparsity: share of weights removed from step `end` on, in [0, 1).
        initial: share removed at the start (0.5, the paper's sparse-to-sparse; 0 is its dense-to-sparse).
        begin: optimizer step of the first update (0, the code).
        end: optimizer step at which `sparsity` is reached; None: halfway from `begin` to `until` (80 of 160 epochs).
        every: optimizer steps between updates (1000, the paper's for CIFAR; 4000 for ImageNet).
        share: of the live weights of a tensor that is exchanged at first, in [0, 1) (0.5, the paper).
        last_share: the same at `until`, along a cosine (0.005, the code).
        grow: "gradient" (the paper and RigL), "random" (SET) or "momentum" (SNFS); see `regrowth.Regrowth`.
        smoothing: of "momentum".
        exponent: of the curve (3, the paper).
        force_final: meet `sparsity` exactly; without it the last pruning is the one before `end`, as in the code.
        allocation: "global" ranks all tensors together (the paper). Any other rule of `core.allocate` divides the
            whole; "uniform+" with `dense_first=False` is the code's uniform variant. A mapping gives densities.
        start: the density rule of the random masks at the start ("erk", the paper).
        block: rows and columns of the blocks that go and come together, of a weight seen as [shape[0], rest]; -1: all.
        pool: a block's score from its entries: "mean" or "max".
        floor: the fewest units kept in each tensor; an int counts them, a float is a share of the tensor.
        seed: of the masks at the start and of random growth.
        scope: patterns of the weights to prune.
        ignore: patterns of weights to leave out.
        debug: check the masks at every step.
        **options: of the allocation rule.

    Raises:
        OptionError: an argument outside what is allowed; BudgetError where a rule or the floors exceed what may stay.
        ModelError: nothing to prune; or, when an exchange is due, a weight that had no gradient.

    >>> layer = nn.Linear(10, 10)
    >>> pruner = GraNet(layer, torch.optim.SGD(layer.parameters(), 0.1), until=6, sparsity=0.8, every=2)
    >>> pruner.sparsity
    0.5
    """
    finish = begin + max((until - begin) // 2, 1) if end is None else end
    curve = Cubic(final=sparsity, begin=begin, end=finish, initial=initial, every=every, exponent=exponent,
                  force_final=force_final)  # fmt: skip
    schedule = Prolonged(curve, until, meet_final=force_final, from_start=initial > 0)
    exchanged = Share(share, last_share, until) if share else Share(0.0, 0.0, until)
    if optimizer is None and share and grow != "random":
        raise OptionError(f"grow={grow!r} looks at gradients, so it needs the optimizer; grow='random' does not.")
    weights = prunable_weights(model, scope, ignore)
    groups = block_groups(weights, block)
    floors = floor_counts({group.name: group.size for group in groups}, floor)
    rule, chosen = ("given", {"densities": allocation}) if not isinstance(allocation, str) else (allocation, {})
    counts = by_rule(rule, groups, floors, **chosen, **options)
    # What the rule cannot meet at the end is refused now and not after hours of training.
    counts({g.name: torch.zeros(g.size) for g in groups}, sparsity, {g.name: g.size for g in groups})
    regrowth = Regrowth(
        Ranked(groups, Magnitude(pool), counts, nested=True), schedule, exchanged, grow,
        _start(groups, start, initial, floors) if initial else None, seed, pool, smoothing,
    )  # fmt: skip
    return Pruner(model, optimizer, schedule, regrowth, weights, debug=debug)


def RigL(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    until: int,
    sparsity: float = 0.9,
    every: int = 100,
    share: float = 0.3,
    last_share: float = 0.0,
    **others: Any,
) -> Pruner:
    """A `Pruner` of constant sparsity that exchanges the smallest weights for those of the largest gradient.

    `GraNet` with `initial` equal to `sparsity` and RigL's defaults: 100 steps between updates and a share that falls
    from 0.3 to 0 along a cosine until step `until` (three quarters of the training, the paper).

    Args:
        model, optimizer, until, sparsity, every, share, last_share: as for `GraNet`.
        others: grow, smoothing, start, block, pool, floor, seed, scope, ignore and debug of `GraNet`.

    >>> layer = nn.Linear(10, 10)
    >>> RigL(layer, torch.optim.SGD(layer.parameters(), 0.1), until=300, sparsity=0.8).sparsity
    0.8
    """
    return GraNet(
        model, optimizer, until=until, sparsity=sparsity, initial=sparsity, every=every, share=share,
        last_share=last_share, **others,
    )  # fmt: skip


def SET(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    until: int,
    every: int,
    sparsity: float = 0.9,
    share: float = 0.3,
    start: str = "er",
    **others: Any,
) -> Pruner:
    """A `Pruner` of constant sparsity that exchanges the smallest weights for randomly drawn ones.

    `GraNet` with `initial` equal to `sparsity` and random growth. What grows starts at zero here, at a small random
    value in the paper.

    Args:
        model, until, sparsity: as for `GraNet`.
        optimizer: may be None.
        every: optimizer steps between updates; the paper updates once an epoch.
        share: of the live weights of a tensor that is exchanged at each update (ζ = 0.3, the paper).
        start: the density rule ("er", the paper).
        others: as for `RigL`.

    >>> SET(nn.Linear(10, 10), until=300, every=20, sparsity=0.8).sparsity
    0.8
    """
    return RigL(
        model, optimizer, until=until, sparsity=sparsity, every=every, share=share, last_share=share, start=start,
        grow="random", **others,
    )  # fmt: skip


def _start(groups: Sequence[WeightGroup], rule: str, sparsity: float, floors: Mapping[str, int]) -> dict[str, int]:
    """Units of each weight to start from: they add up to `round((1 − s)·all units)` exactly."""
    sizes = {group.name: group.size for group in groups}
    shapes = {group.name: group.shape for group in groups}
    return allocate(rule, dict(sizes), units_kept(sparsity, sum(sizes.values())), shapes=shapes, floors=floors)
