"""The one train-time pruner: a schedule, a rule and masks, stepped like a learning-rate scheduler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import ModelError, OptionError, PlanError
from ..core.finite import all_finite
from ..core.schedule import Schedule
from .masking import Masks, Pull, Revive
from .update import Moment, Regrowing, Rule

__all__ = ["Pruner"]


class Pruner:
    """Keeps the masks of a model in training and updates them when its schedule says so.

    Call `step()` after every `optimizer.step()` and `finalize()` at the end. An update due at step t happens when t
    optimizer steps have been taken, so one due at step 0 happens here, in the constructor. To resume, build model,
    optimizer and pruner as before and only then load their states.

    Args:
        model: pruned in place.
        optimizer: the one that trains the pruned weights; None if its steps cannot be watched, in which case every
            `step()` counts as one and `revive` is "never". Further optimizers: `pruner.masks.watch(other)`.
        schedule: when, and to which sparsity.
        rule: the mask update; see `update.Rule`.
        weights: the parameters to prune, by qualified name.
        revive: the fate of masked weights; see `Masks`.
        pull: see `Masks`.
        debug: check the masks at every step.

    Attributes:
        masks: the `Masks`, a mapping from weight names to bool tensors.
        schedule: as given.

    Raises:
        OptionError: `revive` without an optimizer, or an optimizer that cannot keep masks (see `Masks.watch`).
        ModelError: NaN or infinite weights, if an update is due at once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        schedule: Schedule,
        rule: Rule,
        weights: Mapping[str, nn.Parameter],
        *,
        revive: Revive = "never",
        pull: Pull = 0.0,
        debug: bool = False,
    ) -> None:
        if optimizer is None and revive != "never":
            raise OptionError(f"revive={revive!r} looks at optimizer steps, so it needs the optimizer.")
        dense = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        self._model, self._rule, self._watched, self._debug = model, rule, optimizer is not None, debug
        self.schedule = schedule
        self.masks = Masks(model, dense, revive=revive, pull=pull, debug=debug)
        self._step = self._updates = 0
        self._closed = False
        try:
            if optimizer is not None:
                self.masks.watch(optimizer)
            if isinstance(rule, Regrowing):
                self.masks.listen(rule.wants, self._observe)
            self._state = rule.init(self._weights())
            if schedule.due(0):
                self._update()
        except Exception:
            # Whatever went wrong, no hook stays of a pruner that nobody gets to hold.
            self.masks.remove()
            raise

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._step

    @property
    def scheduled(self) -> float:
        """The sparsity that the schedule asks for now; the masks follow at the next update."""
        return self.schedule(self._step)

    @property
    def sparsity(self) -> float:
        """The share of the pruned tensors' entries that the masks remove now."""
        return self.masks.sparsity

    @torch.no_grad()
    def step(self) -> None:
        """None; counts the optimizer steps since the last call and updates the masks if one of them was due.

        A call without an optimizer step in between (gradient accumulation, an overflow skipped by a GradScaler) does
        nothing.

        Raises:
            ModelError: NaN or infinite weights at an update, named; or, with debug, masked entries that are not zero.
            OptionError: the pruner has been finalized.
        """
        if self._closed:
            raise OptionError("the pruner has been finalized and its masks no longer hold; build another to go on.")
        before = self._step
        self._step = self.masks.steps if self._watched else before + 1
        if self._debug:
            self.masks.check()
        if any(self.schedule.due(t) for t in range(before + 1, self._step + 1)):
            self._update()
        elif not self._watched:
            self.masks.apply()

    def finalize(self) -> dict[str, Tensor]:
        """The final masks by weight name; the weights are zero where they are False and all hooks are gone.

        Warns when training ended before the schedule did.
        """
        if not self._closed:
            self._warn_if_early()
            self.masks.apply()
            self.masks.remove()
            self._closed = True
        return {name: mask.clone() for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Step, masks and the rule's state: numbers and tensors only, to go with those of model and optimizer."""
        return {
            "step": self._step,
            "updates": self._updates,
            "masks": self.masks.state_dict(),
            "rule": {kind: dict(tensors) for kind, tensors in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; training goes on as if it had not stopped, given that model and optimizer are loaded too.

        Raises:
            PlanError: the state is of another model or of another kind of pruner.
        """
        if set(state.get("rule", ("none",))) != set(self._state):
            raise PlanError("the stored state is of another criterion than this pruner's; build it as it was built.")
        self.masks.load_state_dict(state["masks"])
        self._state = {kind: dict(tensors) for kind, tensors in state["rule"].items()}
        self._step, self._updates = int(state["step"]), int(state["updates"])
        self.masks.steps = self._step

    def _weights(self) -> dict[str, Tensor]:
        return {name: self._model.get_parameter(name).detach() for name in self.masks}

    def _moment(self, weights: Mapping[str, Tensor]) -> Moment:
        return Moment(self._step, self.schedule(self._step), weights, dict(self.masks))

    def _observe(self, gradients: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.masks if name not in gradients]
        if missing:
            raise ModelError(
                f"{', '.join(missing[:3])} had no gradient at step {self.masks.steps + 1}, so nothing says where to "
                "regrow: it took no part in the loss; leave it out with ignore=."
            )
        assert isinstance(self._rule, Regrowing)
        self._state = self._rule.observe(gradients, self._state)

    @torch.no_grad()
    def _update(self) -> None:
        with self.masks.revealed():
            weights = self._weights()
            for name, weight in weights.items():
                if not all_finite(weight):
                    raise ModelError(f"NaN or infinite weights in {name} at step {self._step}: training diverged.")
            masks, self._state = self._rule.update(self._moment(weights), self._state)
            self.masks.set(masks)
        if isinstance(self._rule, Regrowing):
            masks, self._state = self._rule.regrow(self._moment(self._weights()), self._state)
            if masks:
                self.masks.set(masks)
        self._updates += 1
        self._warn_if_empty()

    def _warn_if_empty(self) -> None:
        empty = [name for name, mask in self.masks.items() if not bool(mask.any())]
        if empty:
            warnings.warn(
                f"no weight is left in {', '.join(empty[:3])}, so the signal may not pass; give a floor.",
                stacklevel=2,
            )

    def _warn_if_early(self) -> None:
        if self._step < self.schedule.end:
            warnings.warn(
                f"training ended at step {self._step}, before step {self.schedule.end} of the schedule, after "
                f"{self._updates} mask updates: sparsity is {self.sparsity:.4g}, not {self.schedule.final:.4g}; "
                "give begin and end in optimizer steps.",
                stacklevel=3,
            )
