"""Scores inside a training loop: pure functions of the weights and of a state that is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..core.errors import OptionError
from ..core.units import Reduce, WeightGroup

__all__ = ["Bound", "Criterion", "Magnitude", "Motion", "Scorer", "Scores", "State"]

Criterion = Callable[[nn.Module, Sequence[WeightGroup]], Mapping[str, Tensor]]
State = dict[str, dict[str, Tensor]]
Scores = dict[str, Tensor]


class Scorer(Protocol):
    """How much each unit matters at a mask update."""

    def init(self, weights: Mapping[str, Tensor]) -> State:
        """The state before training: tensors by kind and weight name."""

    def score(self, weights: Mapping[str, Tensor], groups: Sequence[WeightGroup], state: State) -> tuple[Scores, State]:
        """Scores [units] per group, higher = keep, and the next state."""


@dataclass(frozen=True)
class Magnitude:
    """|w|, pooled over a block's entries by their mean or maximum (Zhu & Gupta's code: mean)."""

    pool: Reduce = "mean"

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {}

    def score(self, weights: Mapping[str, Tensor], groups: Sequence[WeightGroup], state: State) -> tuple[Scores, State]:
        return _pooled({name: _wide(w).abs() for name, w in weights.items()}, groups, self.pool), state


@dataclass(frozen=True)
class Motion:
    """|w| times a moving average G of how much the weight moved from one mask update to the next.

    `G ← decay·G + (1 − decay)·d/‖d‖`, per tensor, from G = 0; first order: `d = |w − w'|`; second order:
    `d = |w + w'' − 2w'|` with the weights at the last two updates (options of google-research/model_pruning).

    Args:
        order: 1 or 2.
        decay: 0.99, as in that code.
        pool: over the entries of a block.
    """

    order: Literal[1, 2] = 1
    decay: float = 0.99
    pool: Reduce = "mean"

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or not 0 <= self.decay < 1:
            raise OptionError(f"motion needs order 1 or 2 and decay in [0, 1), got {self.order} and {self.decay}.")

    def init(self, weights: Mapping[str, Tensor]) -> State:
        past = {f"past{i + 1}": {name: _wide(w).clone() for name, w in weights.items()} for i in range(self.order)}
        return {"average": {name: torch.zeros_like(_wide(w)) for name, w in weights.items()}, **past}

    def score(self, weights: Mapping[str, Tensor], groups: Sequence[WeightGroup], state: State) -> tuple[Scores, State]:
        now = {name: _wide(w) for name, w in weights.items()}
        moved = {name: self._moved(w, state, name) for name, w in now.items()}
        average = {
            name: self.decay * state["average"][name].to(d) + (1 - self.decay) * d / d.norm().clamp(min=1e-12)
            for name, d in moved.items()
        }
        after: State = {"average": average, "past1": {name: w.clone() for name, w in now.items()}}
        if self.order == 2:
            after["past2"] = state["past1"]
        return _pooled({name: w.abs() * average[name] for name, w in now.items()}, groups, self.pool), after

    def _moved(self, weight: Tensor, state: State, name: str) -> Tensor:
        past = state["past1"][name].to(weight)
        if self.order == 1:
            return (weight - past).abs()
        return (weight + state["past2"][name].to(weight) - 2 * past).abs()


@dataclass(frozen=True)
class Bound:
    """A scorer without state from a function `(model, groups) -> {group name: scores}` and the model that it reads."""

    function: Criterion
    model: nn.Module

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {}

    def score(self, weights: Mapping[str, Tensor], groups: Sequence[WeightGroup], state: State) -> tuple[Scores, State]:
        found = self.function(self.model, groups)
        return {group.name: found[group.name].to(weights[group.name].device) for group in groups}, state


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _pooled(saliency: Mapping[str, Tensor], groups: Sequence[WeightGroup], pool: Reduce) -> Scores:
    return {group.name: group.lift(saliency, pool)[group.name] for group in groups}
