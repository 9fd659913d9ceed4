"""Exchange: what a mask update takes from a weight it gives back elsewhere, exactly as much.

One loop holds GraNet, RigL, SET and SNFS: prune to what the schedule asks for; drop a share of the live units of each
weight, the least important first; grow as many where something promises most. What differs is which schedule, which
share, which promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.errors import OptionError, unknown_name
from ..core.finite import all_finite
from ..core.schedule import Cubic
from ..core.select import top
from ..core.units import Reduce, WeightGroup
from .scoring import State
from .update import Moment, Ranked, drawn_mask, live_units, stream

__all__ = ["Grow", "Prolonged", "Regrowth", "Share"]

Grow = Literal["gradient", "random", "momentum"]


@dataclass(frozen=True)
class Share:
    """How much of what is live is exchanged at a step: `r(t) = last + (first − last)·(1 + cos(π·t/over))/2`.

    RigL's `f_decay` with a floor, as in GraNet's code. Before step 0 it is `first`, after step `over` it is `last`.

    Args:
        first: r(0), in [0, 1).
        last: r(over), in [0, first]; equal to `first` for a share that never changes.
        over: the steps from one to the other, at least 1.

    Raises:
        OptionError: any of these is outside what is allowed; all faults are listed.

    >>> share = Share(0.5, 0.005, over=100)
    >>> [round(share(step), 6) for step in (0, 50, 100)]
    [0.5, 0.2525, 0.005]
    """

    first: float
    last: float
    over: int

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.first < 1:
            faults.append(f"the first share must lie in [0, 1), got {self.first}")
        if not 0 <= self.last <= self.first:
            faults.append(f"the last share must lie between 0 and the first ({self.first}), got {self.last}")
        if self.over < 1:
            faults.append(f"they must lie at least 1 step apart, got {self.over}")
        if faults:
            raise OptionError(f"a share to exchange cannot be built: {'; '.join(faults)}.")

    def __call__(self, step: int) -> float:
        done = min(max(step / self.over, 0.0), 1.0)
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Prolonged:
    """A pruning schedule whose updates go on at the same pace until step `until`, to exchange and not to prune.

    Args:
        pruning: when to prune, and to which sparsity.
        until: the last step at which an update may fall.
        meet_final: prune to the final sparsity at `pruning.end`. Without it the sparsity stays where the last update
            before the end left it, as in GraNet's code: short of the final by `(s_f − s_i)/n³` after n updates.
        from_start: whether there is an update at step 0 in any case, since the network starts sparse.

    Raises:
        OptionError: `until` lies before the first update.
    """

    pruning: Cubic
    until: int
    meet_final: bool = True
    from_start: bool = False

    def __post_init__(self) -> None:
        if self.until < max(self.pruning.begin, 1):
            raise OptionError(
                f"until is the optimizer step of the last exchange: it must be {max(self.pruning.begin, 1)} or more, "
                f"got {self.until}."
            )

    @property
    def final(self) -> float:
        return self(self.end)

    @property
    def end(self) -> int:
        return max(self.until, self.pruning.end)

    def __call__(self, step: int) -> float:
        return self.pruning(step if self.meet_final else min(step, self._last_before_end))

    def due(self, step: int) -> bool:
        return (step == 0 and self.from_start) or self.exchanges(step) or self.pruning.due(step)

    def exchanges(self, step: int) -> bool:
        """Whether an exchange falls on `step`: never on step 0, before anything was learnt."""
        begin, every = self.pruning.begin, self.pruning.every
        return max(begin, 1) <= step <= self.until and (step - begin) % every == 0

    @property
    def _last_before_end(self) -> int:
        begin, end, every = self.pruning.begin, self.pruning.end, self.pruning.every
        return begin + (end - begin - 1) // every * every


@dataclass(frozen=True)
class Regrowth:
    """Prune, drop, grow: a rule in two strokes (see `update.Regrowing`), with exact counts in every weight.

    Of n live units of a weight `⌈r·n⌉` of lowest score are dropped and as many grown among all that are not live then,
    those just dropped included: whichever promise most, among equals the earlier. What grows starts at zero, weight and
    optimizer state. A weight of which nothing is removed has nowhere else to grow and is left alone. Where a gradient
    is not finite (an overflow of mixed precision) it is not looked at.

    Args:
        prune: decides what stays when the schedule asks for more sparsity; its scorer, of |w|, also decides what drops.
        schedule: when to prune and when to exchange.
        share: r, the share of live units exchanged at a step.
        grow: what promises most: "gradient", the largest |∂L/∂w| of this very step, at no cost at other steps (RigL,
            GraNet); "random" (SET); "momentum", the largest running mean of gradients, which looks at each (SNFS,
            without its exchange between layers).
        start: units of each weight to start from, drawn at random at step 0; None starts dense.
        seed: of what is drawn; with a weight's name, and the step, it decides.
        pool: over the entries of a block.
        smoothing: the weight of the past in the running mean (0.9, SNFS).

    Raises:
        OptionError: an unknown way to grow, or a smoothing outside [0, 1).
    """

    prune: Ranked
    schedule: Prolonged
    share: Share
    grow: Grow = "gradient"
    start: Mapping[str, int] | None = None
    seed: int = 0
    pool: Reduce = "mean"
    smoothing: float = 0.9

    def __post_init__(self) -> None:
        if self.grow not in get_args(Grow):
            raise unknown_name("way to grow", self.grow, get_args(Grow))
        if not 0 <= self.smoothing < 1:
            raise OptionError(f"smoothing must lie in [0, 1), got {self.smoothing}.")

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {"seen": {}, "owed": {}}

    def wants(self, step: int) -> bool:
        if self.grow == "momentum":
            return step <= self.schedule.until
        return self.grow == "gradient" and self.schedule.exchanges(step) and self.share(step) > 0

    def observe(self, gradients: Mapping[str, Tensor], state: State) -> State:
        seen = dict(state["seen"])
        for name, gradient in gradients.items():
            if all_finite(gradient):
                now = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
                averaged = self.grow == "momentum" and name in seen
                seen[name] = torch.lerp(now, seen[name].to(now), self.smoothing) if averaged else now
        return {**state, "seen": seen}

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        if moment.step == 0 and self.start is not None:
            return self._drawn(self.start), state
        masks, state = self.prune.update(moment, state)
        share = self.share(moment.step) if self.schedule.exchanges(moment.step) else 0.0
        scores, _ = self.prune.scorer.score(moment.weights, self.prune.groups, {})
        owed: dict[str, Tensor] = {}
        for group in self.prune.groups:
            live = live_units(group, masks[group.name])
            dropped = self._dropped(group, int(live.sum()), share, state)
            if dropped:
                stays = top(scores[group.name].masked_fill(~live, -torch.inf), int(live.sum()) - dropped)
                masks |= group.spread(stays)
                owed[group.name] = torch.tensor(dropped)
        return masks, {**state, "owed": owed}

    def regrow(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        masks: dict[str, Tensor] = {}
        for group in self.prune.groups:
            if group.name in state["owed"]:
                live = live_units(group, moment.masks[group.name])
                promise = self._promise(group, moment.step, state).to(live.device).masked_fill(live, -torch.inf)
                masks |= group.spread(live | top(promise, int(state["owed"][group.name])))
        return masks, {**state, "owed": {}, "seen": state["seen"] if self.grow == "momentum" else {}}

    def _dropped(self, group: WeightGroup, live: int, share: float, state: State) -> int:
        blind = self.grow != "random" and group.name not in state["seen"]
        # A product such as 0.1·30 lies a rounding error above the integer that is meant.
        return 0 if blind or live == group.size else math.ceil(share * live - 1e-9)

    def _promise(self, group: WeightGroup, step: int, state: State) -> Tensor:
        if self.grow == "random":
            return torch.rand(group.size, generator=stream(self.seed, f"{group.name}/{step}"))
        return group.lift({group.name: state["seen"][group.name].abs()}, self.pool)[group.name]

    def _drawn(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for group in self.prune.groups:
            masks |= group.spread(drawn_mask((group.size,), counts[group.name], self.seed, group.name))
        return masks
