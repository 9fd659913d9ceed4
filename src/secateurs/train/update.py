"""Mask updates as pure functions: from weights, masks and a sparsity to the next masks.

A `Rule` is a pair of functions over a state that is data, in the manner of optax: `init(weights) -> state` and
`update(moment, state) -> (masks, state)`. The pruner knows nothing else about a method, so regrowth, N:M patterns and
static masks are other rules for the same loop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core.allocate import allocate
from ..core.budget import units_kept
from ..core.errors import OptionError, unknown_name
from ..core.select import top
from ..core.units import WeightGroup
from .scoring import Scorer, State

__all__ = [
    "Counts",
    "Drawn",
    "Moment",
    "Ranked",
    "Regrowing",
    "Rule",
    "by_rule",
    "drawn_mask",
    "live_units",
    "per_tensor",
    "stream",
    "tensor_targets",
]

Counts = Callable[[Mapping[str, Tensor], float, Mapping[str, int]], dict[str, int]]


@dataclass(frozen=True)
class Moment:
    """What a mask update may look at.

    Args:
        step: optimizer steps taken so far.
        sparsity: what the schedule asks for now.
        weights: live weights by name, masked ones with the value that competes.
        masks: the bool masks until now, by name.
    """

    step: int
    sparsity: float
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]


class Rule(Protocol):
    """What a train-time method does at a mask update."""

    def init(self, weights: Mapping[str, Tensor]) -> State:
        """The state before training: tensors by kind and weight name."""

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        """The next bool masks, of the weights' shapes, and the next state."""


@runtime_checkable
class Regrowing(Rule, Protocol):
    """A rule in two strokes: what `update` takes is at zero before `regrow` gives back, so it returns as if new."""

    def wants(self, step: int) -> bool:
        """Whether it must see the dense gradient of optimizer step `step`, counted from 1."""

    def observe(self, gradients: Mapping[str, Tensor], state: State) -> State:
        """The next state, after such a gradient; the tensors given are the optimizer's own."""

    def regrow(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        """Masks with entries given back, for none or some of the weights, and the next state."""


@dataclass(frozen=True)
class Ranked:
    """Score, count, select: in every group the units of highest score stay, ties by index.

    Args:
        groups: one for each pruned weight.
        scorer: gives the scores.
        counts: `(scores, sparsity, most that may stay) -> units that stay`, per group; see `per_tensor`, `by_rule`.
        nested: a removed unit never returns.
    """

    groups: tuple[WeightGroup, ...]
    scorer: Scorer
    counts: Counts
    nested: bool

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return self.scorer.init(weights)

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        scores, state = self.scorer.score(moment.weights, self.groups, state)
        present = {group.name: self._may_stay(group, moment.masks[group.name]) for group in self.groups}
        # The lowest score, not minus infinity: allocation rules do arithmetic with scores.
        ranked = {name: s.masked_fill(~present[name], s.min()) for name, s in scores.items()}
        kept = self.counts(ranked, moment.sparsity, {name: int(mask.sum()) for name, mask in present.items()})
        masks: dict[str, Tensor] = {}
        for group in self.groups:
            candidates = scores[group.name].masked_fill(~present[group.name], -torch.inf)
            masks |= group.spread(top(candidates, kept[group.name]))
        return masks, state

    def _may_stay(self, group: WeightGroup, mask: Tensor) -> Tensor:
        if self.nested:
            return live_units(group, mask)
        return torch.ones(group.size, dtype=torch.bool, device=mask.device)


@dataclass(frozen=True)
class Drawn:
    """Random positions, `counts[name]` of each weight, the same at every update.

    Args:
        counts: entries that stay, by weight name.
        seed: with the name it decides the positions, so that layers are independent of each other.
    """

    counts: Mapping[str, int]
    seed: int

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {}

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        masks = {name: drawn_mask(w.shape, self.counts[name], self.seed, name) for name, w in moment.weights.items()}
        return masks, state


def live_units(group: WeightGroup, mask: Tensor) -> Tensor:
    """Which units of a weight its mask keeps: bool [units]."""
    return group.lift({group.name: mask.float()}, "max")[group.name] > 0


def drawn_mask(shape: Sequence[int], keep: int, seed: int, name: str) -> Tensor:
    """A bool mask of `shape` with exactly `keep` true at positions that depend on `seed` and `name` alone."""
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=stream(seed, name))[:keep]] = True
    return mask.view(*shape)


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every pair of seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def per_tensor(final: float, targets: Mapping[str, float], floors: Mapping[str, int]) -> Counts:
    """Counts where every tensor has the schedule's sparsity: `round(N·(1 − s))` of N stay, halves to the even number.

    Args:
        final: the schedule's final sparsity.
        targets: final sparsity of tensors that have one of their own; they follow as `s·target/final`.
        floors: the fewest units that stay, by name.
    """

    def counts(scores: Mapping[str, Tensor], sparsity: float, most: Mapping[str, int]) -> dict[str, int]:
        share = {name: targets[name] * (sparsity / final) if name in targets else sparsity for name in scores}
        wanted = {name: max(units_kept(share[name], s.numel()), floors[name]) for name, s in scores.items()}
        return {name: min(count, most[name]) for name, count in wanted.items()}

    return counts


def by_rule(rule: str, groups: Sequence[WeightGroup], floors: Mapping[str, int], **options: Any) -> Counts:
    """Counts from an allocation rule: they add up to `round((1 − s)·all units)` exactly."""
    shapes = {group.name: group.shape for group in groups}

    def counts(scores: Mapping[str, Tensor], sparsity: float, most: Mapping[str, int]) -> dict[str, int]:
        total = units_kept(sparsity, sum(s.numel() for s in scores.values()))
        return allocate(rule, scores, total, shapes=shapes, floors=floors, caps=most, **options)

    return counts


def tensor_targets(targets: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The target of each name that one of the regular expressions (searched, as `re.search`) finds.

    Raises:
        OptionError: a target outside [0, 1), a pattern that finds nothing, a name that two patterns find.
    """
    found: dict[str, list[str]] = {}
    for pattern, target in targets.items():
        if not 0 <= target < 1:
            raise OptionError(f"the target of {pattern!r} must lie in [0, 1), got {target}.")
        hits = [name for name in names if re.search(pattern, name)]
        if not hits:
            raise unknown_name("target pattern", pattern, names)
        for name in hits:
            found.setdefault(name, []).append(pattern)
    for name, patterns in found.items():
        if len(patterns) > 1:
            raise OptionError(f"{name} is found by {' and '.join(map(repr, patterns))}; only one may find it.")
    return {name: targets[patterns[0]] for name, patterns in found.items()}
