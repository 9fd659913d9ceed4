"""Differentiable pruning for any loop: soft masks that are functions of the weights, hard ones in the end.

PDP: Cho, Adya, Naik, "PDP: Parameter-free Differentiable Pruning is All You Need", NeurIPS 2023, arXiv 2305.11203. The
masks themselves: `soft`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.allocate import allocate, floor_counts
from ..core.budget import Budget, Pattern, units_kept
from ..core.errors import BudgetError, OptionError, PlanError
from ..core.select import top_across
from ..core.units import Group, WeightGroup
from .magnitude import block_groups
from .masking import Masks
from .scope import canonical_names, divided_weights, input_axes, prunable_weights
from .soft import Entries, SoftWeights, Temperature, Units, refuse_broken

__all__ = ["PDP", "Ramp", "keep_at"]

Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Ramp:
    """A staircase to the final sparsity after a dense start: `r(e) = min(1, rise·(e + 1))·final` in period e.

    Args:
        final: the sparsity in the end, in [0, 1).
        begin: optimizer step of the first stair (s, the dense warm-up).
        every: optimizer steps from one stair to the next (an epoch).
        rise: ε, what each stair adds, as a share of the final sparsity, in (0, 1]; 1 for no ramp.

    Raises:
        OptionError: any of these is outside what is allowed; all faults are listed.

    >>> ramp = Ramp(0.8, begin=10, every=5, rise=0.25)
    >>> [round(ramp(step), 6) for step in (9, 10, 15, 25, 40)], ramp.end
    ([0.0, 0.2, 0.4, 0.8, 0.8], 25)
    """

    final: float
    begin: int
    every: int
    rise: float = 0.015

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.final < 1:
            faults.append(f"final must lie in [0, 1), got {self.final}")
        if self.begin < 0:
            faults.append(f"begin must be a step (0 or more), got {self.begin}")
        if self.every < 1:
            faults.append(f"every must be 1 or more, got {self.every}")
        if not 0 < self.rise <= 1:
            faults.append(f"rise must lie in (0, 1], got {self.rise}")
        if faults:
            raise OptionError(f"a ramp cannot be built: {'; '.join(faults)}.")

    @property
    def end(self) -> int:
        return self.begin + (math.ceil(1 / self.rise - 1e-9) - 1) * self.every

    def share(self, step: int) -> float:
        """How much of the final sparsity is asked for at `step`."""
        if step < self.begin:
            return 0.0
        return 1.0 if step >= self.end else self.rise * ((step - self.begin) // self.every + 1)

    def __call__(self, step: int) -> float:
        return self.final * self.share(step)

    def due(self, step: int) -> bool:
        return self.begin <= step <= self.end and (step - self.begin) % self.every == 0


def keep_at(size: int, removed: float, share: float = 1.0) -> int:
    """`⌊size − share·removed⌋`: the units above the threshold when so much of what is to go has gone."""
    return math.floor(size - share * removed + 1e-9)


class PDP:
    """Soft masks, computed from the weights themselves, while a model trains; hard ones when it has.

    Call `step()` after every `optimizer.step()` and `finalize()` at the end, as with a `Pruner`. In between the
    parameters of the model are ŵ = m(w)·w, which is what the forward pass sees and what `model.state_dict()` holds; w
    is with the pruner. Weights below the threshold get gradients too, so that they may return. Measure quality within
    `hardened()`: the soft network flatters. To resume, build model, optimizer and pruner as before and only then load
    their states.

    Args:
        model: pruned in place; which weights: `prunable_weights(model, scope, ignore)`.
        optimizer: the one that trains it.
        begin: optimizer steps of dense training before the first soft mask (s: 16 epochs, the paper's for ImageNet).
        every: optimizer steps from one rise of the sparsity to the next (an epoch).
        rise: ε, the share of the final sparsity that each rise adds (0.015).
        sparsity: share of the units removed in the end, in [0, 1).
        pattern: as "2:4", in place of `sparsity`: so many of so many consecutive inputs stay. Weights whose inputs it
            does not divide stay dense.
        groups: the units, in place of weights: the channel groups of a plan (`sec.plan(…).groups`), which is then cut
            by `dataclasses.replace(plan, keep=pruner.kept).cut(model)`.
        block: rows and columns of the blocks that go together, of a weight seen as [shape[0], rest]; -1 for all, so
            that (1, -1) are its rows.
        until: optimizer step at which masks become hard and stay; None: in `finalize`, as in the paper.
        temperature: τ, as a share of t² if `relative` (0.1, own choice: the gradient at the threshold is multiplied by
            5.5, and a weight near zero by 0.00005; at 0.5 it is 0.12, and what many such weights did is lost when
            masks become hard), else as such (1e-4, the paper, which suits the scale of its weights).
        relative: see there.
        cap: the most by which that gradient is multiplied; τ is never so small that it is more.
        allocation: "global" takes the tensors' sparsities from one ranking of all |w| at the end of the dense training
            (the paper), also those of blocks and channels; "uniform", or another rule of `core.allocate`; a mapping
            gives densities.
        floor: the fewest units kept in each group; an int counts them, a float is a share of the group.
        scope: patterns of the weights to prune.
        ignore: patterns of weights to leave out.
        debug: check the hard masks at every step.
        **options: of the allocation rule.

    Attributes:
        schedule: the `Ramp`.

    Raises:
        OptionError: an argument outside what is allowed; BudgetError where the floors exceed what may stay.
        ModelError: nothing to prune, or NaN or infinite weights.

    >>> layer = nn.Linear(8, 8)
    >>> pruner = PDP(layer, torch.optim.SGD(layer.parameters(), 0.1), begin=0, every=1, rise=1.0, sparsity=0.75)
    >>> int(pruner.finalize()["weight"].sum())
    16
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        begin: int,
        every: int,
        rise: float = 0.015,
        sparsity: float = 0.9,
        pattern: str | None = None,
        groups: Sequence[Group] | None = None,
        block: tuple[int, int] = (1, 1),
        until: int | None = None,
        temperature: float = 0.1,
        relative: bool = True,
        cap: float = 10.0,
        allocation: str | Mapping[str, float] = "global",
        floor: int | float = 1,
        scope: Patterns | None = None,
        ignore: Patterns = (),
        debug: bool = False,
        **options: Any,
    ) -> None:
        heat = Temperature(temperature, relative, cap)
        self._pattern = None if pattern is None else _pattern(pattern, groups, block)
        self.schedule = Ramp(self._pattern.sparsity if self._pattern else sparsity, begin, every, rise)
        if until is not None and until < self.schedule.end:
            raise OptionError(f"until must be {self.schedule.end} or more, the end of the ramp, got {until}.")
        weights = {} if groups is not None else prunable_weights(model, scope, ignore)
        if self._pattern is not None:
            of = self._pattern.of
            axes = input_axes(model, weights)
            weights = divided_weights(weights, of, f"a pattern of {of}", all_of_them=scope is not None, axes=axes)
        self._groups = tuple(groups) if groups is not None else block_groups(weights, block)
        self._softener = _softener(model, self._groups, heat, self._pattern.of if self._pattern else None)
        self._floors = floor_counts({group.name: group.size for group in self._groups}, floor)
        self._rule = (allocation, options) if isinstance(allocation, str) else ("given", {"densities": allocation})
        self._model, self._until, self._debug = model, until, debug
        self._step = self._updates = 0
        self._final: dict[str, int] = {}
        self._hard: dict[str, Tensor] = {}
        self._closed = False
        # What the rule cannot meet at the end is refused now and not after hours of training.
        start = {name: model.get_parameter(name).detach() for name in self._softener.tensors}
        refuse_broken(start)
        self._counts(start)
        everything = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self._groups}
        self._masks = Masks(model, self._softener.spread(everything), debug=debug)
        try:
            self._masks.watch(optimizer)
            self._weights: SoftWeights | None = SoftWeights(model, self._softener, optimizer)
            if self.schedule.due(0):
                self._update()
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
    def sparsity(self) -> float:
        """The share of the units that the hard masks of now remove."""
        kept = self.kept.values()
        return 1 - sum(int(units.sum()) for units in kept) / sum(units.numel() for units in kept)

    @property
    def kept(self) -> dict[str, Tensor]:
        """By group the bool [units] of those that stay in the hard masks of now."""
        return dict(self._hard) if self._weights is None else self._weights.kept()

    @property
    def masks(self) -> dict[str, Tensor]:
        """By parameter the hard mask of now."""
        return dict(self._masks) if self._weights is None else self._softener.spread(self._weights.kept())

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """A context in which the model is what `finalize` would make of it, to be measured; then training goes on."""
        if self._weights is None:
            yield
            return
        masks = self.masks
        with self._weights.revealed():
            before = {name: self._model.get_parameter(name).detach().clone() for name in masks}
            self._write({name: weight.masked_fill(~masks[name], 0) for name, weight in before.items()})
            try:
                yield
            finally:
                self._write(before)

    def step(self) -> None:
        """None; counts the optimizer steps since the last call, and raises the sparsity if one of them was due.

        Raises:
            ModelError: NaN or infinite weights, named; or, with debug, masked entries that are not zero.
            OptionError: the pruner has been finalized.
        """
        if self._closed:
            raise OptionError("the pruner has been finalized and its masks no longer hold; build another to go on.")
        before, self._step = self._step, self._masks.steps
        if self._debug:
            self._masks.check()
        if self._weights is None:
            return
        if any(self.schedule.due(t) for t in range(before + 1, self._step + 1)):
            self._update()
        if self._until is not None and self._step >= self._until:
            self._harden()

    def finalize(self) -> dict[str, Tensor]:
        """The hard masks by parameter name; what is False in them is zero, all else is w, and all hooks are gone.

        Warns when training ended before the ramp did.
        """
        if not self._closed:
            if self._step < self.schedule.end:
                self._warn()
            self._harden()
            self._masks.remove()
            self._closed = True
        return {name: mask.clone() for name, mask in self._masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Step, counts, masks and the weights that wait: numbers and tensors only, to go with model and optimizer."""
        return {
            "step": self._step,
            "updates": self._updates,
            "final": dict(self._final),
            "soft": None if self._weights is None else self._weights.state_dict(),
            "hard": dict(self._hard),
            "masks": self._masks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; training goes on as if it had not stopped, given that model and optimizer are loaded too.

        Raises:
            PlanError: the state is of other units or of another kind of pruner.
        """
        if "soft" not in state or not set(state["final"]) <= {group.name for group in self._groups}:
            raise PlanError("the stored state is not of this pruner's kind and units; build it as it was built.")
        if state["soft"] is not None and self._weights is None:
            raise PlanError("the stored state is from before masks became hard; load it into a fresh pruner.")
        self._masks.load_state_dict(state["masks"])
        if state["soft"] is not None and self._weights is not None:
            self._weights.load_state_dict(state["soft"])
        elif self._weights is not None:
            self._weights.forget()
            self._weights = None
        self._hard = {name: units.to(torch.bool) for name, units in state["hard"].items()}
        self._final = {name: int(count) for name, count in state["final"].items()}
        self._step, self._updates = int(state["step"]), int(state["updates"])
        self._masks.steps = self._step

    def _update(self) -> None:
        assert self._weights is not None
        if not self._final:
            self._final = self._counts(self._weights.raw())
        share, sizes = self.schedule.share(self._step), self._softener.sizes
        self._weights.set({n: keep_at(sizes[n], sizes[n] - kept, share) for n, kept in self._final.items()})
        self._updates += 1

    def _counts(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Units of each group that stay in the end, of those compared with each other."""
        if self._pattern is not None:
            return dict.fromkeys(self._softener.sizes, self._pattern.keep)
        rule, options = self._rule
        scores = {name: rows.flatten() for name, rows in self._softener.magnitudes(weights).items()}
        if rule == "global" and isinstance(self._softener, Units):
            rule, options = "given", {"densities": _global_densities(self._softener, weights, self.schedule.final)}
        total = units_kept(self.schedule.final, sum(group.size for group in self._groups))
        shapes = {group.name: group.shape for group in self._groups if isinstance(group, WeightGroup)}
        counts = allocate(rule, scores, total, shapes=shapes or None, floors=self._floors, **options)
        # A kernel of the model may run at no other number than a multiple of this.
        unit = {group.name: getattr(group, "multiple", 1) for group in self._groups}
        sizes = self._softener.sizes
        return {name: min(-(-count // unit[name]) * unit[name], sizes[name]) for name, count in counts.items()}

    def _harden(self) -> None:
        """From here on the masks are hard and stay."""
        if self._weights is None:
            return
        self._hard, masks = self._weights.kept(), self.masks
        self._weights.remove()
        self._weights = None
        self._masks.set(masks)

    def _remove(self) -> None:
        self._masks.remove()
        weights = getattr(self, "_weights", None)
        if weights is not None:
            weights.remove()

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._model.get_parameter(name).copy_(value)

    def _warn(self) -> None:
        warnings.warn(
            f"training ended at step {self._step}, before step {self.schedule.end}, where the ramp ends: sparsity is "
            f"{self.sparsity:.4g}, not {self.schedule.final:.4g}; shorten begin or every, or raise rise.",
            stacklevel=3,
        )


def _pattern(text: str, groups: Sequence[Group] | None, block: tuple[int, int]) -> Pattern:
    found = Budget.parse(text).pattern
    if found is None:
        raise BudgetError(f"pattern must be one such as '2:4', got {text!r}.")
    if groups is not None or block != (1, 1):
        raise OptionError(f"{text} is a pattern of single weights; leave out groups= and block=.")
    return found


def _softener(model: nn.Module, groups: Sequence[Group], temperature: Temperature, of: int | None) -> Entries | Units:
    if all(isinstance(group, WeightGroup) and group.block == (1, 1) for group in groups):
        shapes = {g.name: g.shape for g in groups if isinstance(g, WeightGroup)}
        return Entries(shapes, temperature, of, {} if of is None else input_axes(model, shapes))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    units = Units(tuple(groups), shapes, canonical_names(model), temperature)
    bare = [group.name for group in groups if not units.weights(group)]
    if bare:
        raise OptionError(f"no weight of the model makes the units of {', '.join(bare[:3])}, so they have no norm.")
    return units


def _global_densities(units: Units, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """By group the share of its weights' entries among the largest of all groups' (global magnitude pruning)."""
    names = {name for group in units.groups for name, _ in units.weights(group)}
    sizes = {name: torch.ones_like(weights[name], dtype=torch.float32) for name in weights if name in names}
    total = units_kept(sparsity, sum(ones.numel() for ones in sizes.values()))
    kept = top_across({name: weights[name].abs().flatten() for name in sizes}, total)
    found: dict[str, float] = {}
    for group in units.groups:
        parts = units.weights(group)
        stay = sum(float(p.lift({n: kept[n].view_as(sizes[n]).float()})[n].sum()) for n, p in parts)
        found[group.name] = stay / sum(float(p.lift({n: sizes[n]})[n].sum()) for n, p in parts)
    return found
