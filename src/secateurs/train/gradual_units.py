"""Whole units that go a few at a time while a model trains, ranked by scores averaged over its steps.

Of each group the number that has gone at step t is that of the end times s(t) / s(end), rounded down, s being the
schedule: every group meets its own target at the schedule's end, exactly. What has gone never returns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import ModelError, OptionError, PlanError
from ..core.schedule import Schedule
from ..core.select import top
from ..core.units import Group
from .inplace import zero_masked
from .masking import Masks
from .scope import canonical_names

__all__ = ["GradualUnits", "gone_at"]

Tensors = Mapping[str, Tensor]


def gone_at(gone: int, share: float) -> int:
    """`⌊share·gone⌋`: how many have gone when so much of what is to go has.

    >>> gone_at(16, 0.999998), gone_at(16, 1.0)
    (15, 16)
    """
    return math.floor(share * gone + 1e-9)


class GradualUnits:
    """Removes whole units of a model in training: their entries are zero in every parameter that carries them.

    Call `step()` after every `optimizer.step()` and `finalize()` at the end, as with a `Pruner`. Scores are taken right
    before each step of the optimizer, from gradients that are accumulated, unscaled and clipped by then. Parameters
    that the optimizer trains are masked after each of its steps; frozen ones are zeroed once. To resume, build model,
    optimizer and pruner as before and only then load their states.

    Args:
        model: pruned in place.
        optimizer: the one that trains it; it must hold some parameter of the groups.
        groups: the units; those members count that are parameters of the model.
        schedule: when units go, and how far the removal is then.
        score: gives the scores of now, float [units] by group; called before each optimizer step.
        counts: from the averaged scores to the units of each group that stay in the end; asked once, when the first
            units go.
        decay: S ← decay·S + (1 - decay)·scores (0.9, LoRAPrune), from S = 0.
        debug: check the masks at every step of the optimizer.

    Attributes:
        observed: optimizer steps whose scores are in the average.
        skipped: those whose scores were not finite, and which left it as it was.

    Raises:
        OptionError: units would go before there are scores, a decay outside [0, 1), or an optimizer that cannot keep
            masks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        groups: Sequence[Group],
        schedule: Schedule,
        score: Callable[[], Tensors],
        counts: Callable[[Tensors], Mapping[str, int]],
        *,
        decay: float = 0.9,
        debug: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise OptionError(f"decay must lie in [0, 1), got {decay}.")
        if schedule(0) > 0:
            raise OptionError(f"{schedule(0):.0%} would go at step 0, when no unit has a score: begin later.")
        self._model, self._groups, self.schedule = model, tuple(groups), schedule
        self._score, self._counts, self._decay = score, counts, decay
        self._scores = {group.name: torch.zeros(group.size) for group in self._groups}
        self._kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self._groups}
        self._final: dict[str, int] = {}
        self._first = canonical_names(model)
        self._step = self.observed = self.skipped = 0
        self._closed = False
        # Accelerate and Lightning wrap the optimizer that holds the state.
        inner = getattr(optimizer, "optimizer", optimizer)
        held = {id(p) for part in inner.param_groups for p in part["params"]}
        self._trained = {name for name in self._shown() if id(model.get_parameter(name)) in held}
        if not self._trained:
            raise OptionError(
                "the optimizer holds no parameter that carries units; build it from those of this very model."
            )
        shown = {name: mask for name, mask in self._shown().items() if name in self._trained}
        self._masks = Masks(model, shown, debug=debug)
        self._handle = inner.register_step_pre_hook(self._observe)
        try:
            self._masks.watch(optimizer)
        except Exception:
            # Whatever went wrong, no hook stays of a pruner that nobody gets to hold.
            self._remove()
            raise

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._step

    @property
    def scheduled(self) -> float:
        """The sparsity that the schedule asks for now."""
        return self.schedule(self._step)

    @property
    def scores(self) -> dict[str, Tensor]:
        """S by group, float [units]; 0 of what has gone."""
        return {name: scores * self._kept[name] for name, scores in self._scores.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """By group the bool [units] of those that are left."""
        return {name: units.clone() for name, units in self._kept.items()}

    @property
    def sparsity(self) -> float:
        """The share of all units that has gone."""
        kept = self._kept.values()
        return 1 - sum(int(units.sum()) for units in kept) / sum(units.numel() for units in kept)

    def step(self) -> None:
        """None; counts the optimizer steps since the last call, and removes units if one of them was due.

        Raises:
            ModelError: units are due, and no step had finite scores.
            OptionError: the pruner has been finalized.
        """
        if self._closed:
            raise OptionError("the pruner has been finalized and its masks no longer hold; build another to go on.")
        before, self._step = self._step, self._masks.steps
        if any(self.schedule.due(t) for t in range(before + 1, self._step + 1)):
            self._update()

    def finalize(self) -> dict[str, Tensor]:
        """By group the bool [units] that stay; the others are zero in every parameter, and all hooks are gone.

        Warns when training ended before the schedule did, or when scores were not finite at some steps.
        """
        if not self._closed:
            self._warn()
            self._write()
            self._remove()
            self._closed = True
        return self.kept

    def state_dict(self) -> dict[str, Any]:
        """Step, scores, what is left and the counts of the end: numbers and tensors only."""
        return {
            "step": self._step,
            "observed": self.observed,
            "skipped": self.skipped,
            "final": dict(self._final),
            "scores": {name: scores.clone() for name, scores in self._scores.items()},
            "kept": self.kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; training goes on as if it had not stopped, given that model and optimizer are loaded too.

        Raises:
            PlanError: the state is of other units.
        """
        sizes = {group.name: group.size for group in self._groups}
        if {name: len(units) for name, units in state.get("kept", {}).items()} != sizes:
            raise PlanError("the stored state is of other units than this pruner's; build it as it was built.")
        self._scores = {name: state["scores"][name].float().cpu() for name in sizes}
        self._kept = {name: state["kept"][name].to("cpu", torch.bool) for name in sizes}
        self._final = {name: int(count) for name, count in state["final"].items()}
        self._step = self._masks.steps = int(state["step"])
        self.observed, self.skipped = int(state["observed"]), int(state["skipped"])
        self._write()

    @torch.no_grad()
    def _observe(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = {name: scores.float().cpu() for name, scores in self._score().items()}
        # One number that is none would stay in the average for good.
        if not all(bool(scores.isfinite().all()) for scores in new.values()):
            self.skipped += 1
            return
        self.observed += 1
        for name, scores in self._scores.items():
            scores.mul_(self._decay).add_(new[name], alpha=1 - self._decay)

    def _update(self) -> None:
        share = self.schedule(self._step) / self.schedule.final if self.schedule.final else 0.0
        if share <= 0:
            return
        if not self.observed:
            raise ModelError(f"the scores of all {self.skipped} steps so far are not finite: lower the learning rate.")
        if not self._final:
            self._final = dict(self._counts(self.scores))
        for group in self._groups:
            stay = group.size - gone_at(group.size - self._final[group.name], share)
            alive = self._scores[group.name].masked_fill(~self._kept[group.name], -torch.inf)
            self._kept[group.name] = top(alive, stay)
        self._write()

    def _write(self) -> None:
        shown = self._shown()
        self._masks.set({name: mask for name, mask in shown.items() if name in self._trained})
        for name, mask in shown.items():
            if name not in self._trained:
                parameter = self._model.get_parameter(name)
                zero_masked(parameter, mask.to(parameter.device).expand_as(parameter).contiguous())

    def _shown(self) -> dict[str, Tensor]:
        """By parameter the bool mask, broadcastable to its shape, of what is left."""
        masks: dict[str, Tensor] = {}
        for group in self._groups:
            for tensor, mask in group.spread(self._kept[group.name]).items():
                if tensor in self._first:
                    name = self._first[tensor]
                    masks[name] = masks[name] & mask if name in masks else mask
        return masks

    def _remove(self) -> None:
        self._handle.remove()
        self._masks.remove()

    def _warn(self) -> None:
        if self._step < self.schedule.end:
            warnings.warn(
                f"training ended at step {self._step}, before step {self.schedule.end} of the schedule: sparsity is "
                f"{self.sparsity:.4g}, not {self.schedule.final:.4g}; give the schedule in optimizer steps.",
                stacklevel=3,
            )
        if self.skipped:
            warnings.warn(
                f"scores were not finite at {self.skipped} of {self.skipped + self.observed} steps and were left out.",
                stacklevel=3,
            )
