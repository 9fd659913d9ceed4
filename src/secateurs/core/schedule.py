"""When: which sparsity at which step.

A schedule answers two questions about an integer optimizer step: `schedule(step)` is the sparsity asked for by then,
and `schedule.due(step)` tells whether units go at that step. Steps before the begin and after the end are defined too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, TypeVar

from .errors import OptionError, unknown_name

__all__ = ["Cosine", "Cubic", "IterativeGeometric", "Linear", "OneShot", "Schedule", "get_schedule"]


class Schedule(Protocol):
    """Sparsity as a function of the step."""

    @property
    def final(self) -> float:
        """The sparsity reached in the end."""

    @property
    def end(self) -> int:
        """The step of the last update, or the last step at which one may fall."""

    def __call__(self, step: int) -> float:
        """The sparsity asked for at `step`: a share in [0, 1), never falling."""

    def due(self, step: int) -> bool:
        """Whether units go at `step`."""


S = TypeVar("S", bound=type)
_SCHEDULES: dict[str, type] = {}


def _named(name: str) -> Callable[[S], S]:
    def register(cls: S) -> S:
        if name in _SCHEDULES:
            raise OptionError(f"schedule {name!r} is defined twice; choose another name.")
        _SCHEDULES[name] = cls
        return cls

    return register


def get_schedule(name: str) -> Callable[..., Schedule]:
    """The schedule class called `name`: one-shot, cubic, linear, cosine or iterative-geometric.

    Raises:
        OptionError: there is no such schedule; names the nearest three.

    >>> get_schedule("linear")(final=0.8, begin=0, end=10)(5)
    0.4
    """
    if name not in _SCHEDULES:
        raise unknown_name("schedule", name, _SCHEDULES)
    return _SCHEDULES[name]


@_named("one-shot")
@dataclass(frozen=True)
class OneShot:
    """Everything at once: nothing before step `at`, `final` from it on.

    Raises:
        OptionError: `final` outside [0, 1) or a negative step.
    """

    final: float
    at: int = 0

    def __post_init__(self) -> None:
        _refuse([*_share_faults(final=self.final), *_step_faults(at=self.at)])

    @property
    def end(self) -> int:
        return self.at

    def __call__(self, step: int) -> float:
        return self.final if step >= self.at else 0.0

    def due(self, step: int) -> bool:
        return step == self.at


@dataclass(frozen=True, kw_only=True)
class _Ramp(ABC):
    """What the ramps share: a window of steps, a pair of sparsities and the steps at which units go."""

    final: float
    begin: int
    end: int
    initial: float = 0.0
    every: int = 100
    force_final: bool = True

    def __post_init__(self) -> None:
        _refuse(self._faults())

    def _faults(self) -> list[str]:
        faults = [*_share_faults(final=self.final, initial=self.initial), *_step_faults(begin=self.begin)]
        faults += _count_faults(end=self.end, every=self.every)
        if self.end <= self.begin:
            faults.append(f"end must come after begin, got begin {self.begin} and end {self.end}")
        if self.final < self.initial:
            faults.append(f"sparsity cannot fall: final {self.final} is below initial {self.initial}")
        return faults

    def __call__(self, step: int) -> float:
        done = (step - self.begin) / (self.end - self.begin)
        if done <= 0:
            return self.initial
        if done >= 1:
            return self.final
        value = self.final + (self.initial - self.final) * self._left(done)
        return min(max(value, self.initial), self.final)

    def due(self, step: int) -> bool:
        if not self.begin <= step <= self.end:
            return False
        return (step - self.begin) % self.every == 0 or (self.force_final and step == self.end)

    @abstractmethod
    def _left(self, done: float) -> float:
        """The share of the way from initial to final that is left when `done` of the window has passed."""


@_named("cubic")
@dataclass(frozen=True, kw_only=True)
class Cubic(_Ramp):
    """Fast at first, then ever slower: `s(t) = s_f + (s_i − s_f)·(1 − q)³`, `q = (t − begin)/(end − begin)` in [0, 1].

    Zhu and Gupta, arXiv 1710.01878, equation 1.

    Args:
        final: s_f, the sparsity from `end` on, in [0, 1).
        begin: first step with an update.
        end: step at which `final` is reached.
        initial: s_i, the sparsity up to `begin` (0, as in the paper).
        every: steps between updates (100: the paper's range is 100 to 1000).
        force_final: update at `end` even where `every` steps do not lead there, so that `final` is met exactly.
        exponent: 3 in the paper.

    Raises:
        OptionError: a sparsity outside [0, 1), final below initial, a negative begin, end not after begin, every below
            1 or an exponent that is not positive; all faults are listed.

    >>> schedule = Cubic(final=0.9, begin=0, end=400)
    >>> [round(schedule(t), 4) for t in (0, 100, 200, 400)], schedule.due(100), schedule.due(101)
    ([0.0, 0.5203, 0.7875, 0.9], True, False)
    """

    exponent: float = 3.0

    def _faults(self) -> list[str]:
        own = [] if self.exponent > 0 else [f"the exponent must be positive, got {self.exponent}"]
        return super()._faults() + own

    def _left(self, done: float) -> float:
        return math.pow(1 - done, self.exponent)


@_named("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(_Ramp):
    """The same sparsity in every step: `Cubic` with exponent 1; arguments and errors as there."""

    def _left(self, done: float) -> float:
        return 1 - done


@_named("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine(_Ramp):
    """Slow, fast, slow: `s(t) = s_f + (s_i − s_f)·(1 + cos πq)/2`; arguments and errors as for `Cubic`."""

    def _left(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2


@_named("iterative-geometric")
@dataclass(frozen=True, kw_only=True)
class IterativeGeometric:
    """The same share of the survivors goes in each of `rounds` rounds: after round r, `(1 − final)^(r/rounds)` is kept.

    Args:
        final: the sparsity after the last round, in [0, 1).
        begin: step of the first round.
        rounds: number of rounds, at least 1.
        every: steps from one round to the next, at least 1.

    Raises:
        OptionError: any of these is outside what is allowed; all faults are listed.
    """

    final: float
    begin: int
    rounds: int
    every: int

    def __post_init__(self) -> None:
        faults = _count_faults(rounds=self.rounds, every=self.every)
        _refuse([*_share_faults(final=self.final), *_step_faults(begin=self.begin), *faults])

    @property
    def end(self) -> int:
        return self.begin + (self.rounds - 1) * self.every

    def __call__(self, step: int) -> float:
        done = min(max((step - self.begin) // self.every + 1, 0), self.rounds)
        # A power of a power is inexact; the sparsity that was asked for is not.
        return self.final if done == self.rounds else 1 - math.pow(1 - self.final, done / self.rounds)

    def due(self, step: int) -> bool:
        return self.begin <= step <= self.end and (step - self.begin) % self.every == 0


def _share_faults(**shares: float) -> list[str]:
    return [f"{name} must lie in [0, 1), got {value}" for name, value in shares.items() if not 0 <= value < 1]


def _step_faults(**steps: int) -> list[str]:
    return [f"{name} must be a step (0 or more), got {value}" for name, value in steps.items() if not _whole(value, 0)]


def _count_faults(**counts: int) -> list[str]:
    return [
        f"{name} must be a whole number of at least 1, got {value}"
        for name, value in counts.items()
        if not _whole(value, 1)
    ]


def _whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise OptionError(f"a sparsity schedule cannot be built: {'; '.join(faults)}.")
