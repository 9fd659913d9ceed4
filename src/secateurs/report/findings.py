"""What follows from a report's figures: shares left, speed, whether the budget was met, what changed most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..core.budget import Budget, Limit, Pattern
from ..core.errors import BudgetError
from .data import FrozenWidth, GroupChange, LayerChange, Report, Speedup
from .words import count, duration, factor, file_size, first_metric, share

__all__ = [
    "Check",
    "Stage",
    "by_reason",
    "changed_groups",
    "changed_layers",
    "checks",
    "key_metric",
    "left",
    "sparsity",
    "speedup",
    "stages",
]

_Item = TypeVar("_Item")
# What an item is sorted by: the first number, among equals the second.
_Loss = tuple[float, float]
# Less than a nanosecond was not measured.
SHORTEST = 1e-9
# A limit that was met exactly may miss by rounding; a speed-up is read to two decimals.
_SLACK, _SPEED_SLACK = 1e-6, 5e-3


@dataclass(frozen=True)
class Check:
    """One item of the budget.

    Args:
        asked: as text.
        got: what was reached, as text.
        met: None if it cannot be told from the report.
    """

    asked: str
    got: str
    met: bool | None


@dataclass(frozen=True)
class Stage:
    """Quality at one point of the run."""

    name: str
    quality: Mapping[str, float]


def left(before: float | None, after: float | None) -> float | None:
    """What is left as a share; None if either is unknown or nothing was there."""
    return None if before is None or after is None or not before else after / before


def speedup(report: Report) -> Speedup | None:
    """How many times faster: as measured side by side, else from the two latencies with the widest range they allow."""
    before, after = report.before.latency, report.after.latency
    if report.speedup is not None or before is None or after is None:
        return report.speedup
    times = (before.median, before.p10, before.p90, after.median, after.p10, after.p90)
    if not all(SHORTEST <= seconds < math.inf for seconds in times):
        return None
    return Speedup(before.median / after.median, before.p10 / after.p90, before.p90 / after.p10)


def sparsity(report: Report) -> float | None:
    """The share of units removed, over all groups; without groups, the share of parameters that are zero."""
    units = sum(group.size for group in report.groups)
    if units:
        return 1 - sum(group.kept for group in report.groups) / units
    if report.after.nonzero is None or not report.after.params:
        return None
    return 1 - report.after.nonzero / report.after.params


def key_metric(report: Report) -> str | None:
    """The metric that stands for quality: the first that any stage knows."""
    return first_metric(report.after.quality, report.before.quality, *report.stages.values())


def stages(report: Report) -> tuple[Stage, ...]:
    """Quality from the dense model to the final one; the final one only if no stage before it says the same."""
    found = [Stage("dense", report.before.quality)] if report.before.quality else []
    found += [Stage(name, quality) for name, quality in report.stages.items()]
    if report.after.quality and not any(dict(s.quality) == dict(report.after.quality) for s in found[-1:]):
        found.append(Stage("final", report.after.quality))
    return tuple(found)


def checks(report: Report) -> tuple[Check, ...]:
    """Each item of the budget with what was reached; none if nothing readable was asked."""
    try:
        budget = Budget.parse(report.budget)
    except BudgetError:
        return ()
    items = [_check(limit, report) for limit in budget.limits]
    return tuple(items if budget.pattern is None else [*items, _pattern(budget.pattern, report)])


def _check(limit: Limit, report: Report) -> Check:
    reached, words = _REACHED.get(limit.cost, _unknown)(report, limit.relative)
    met = None if reached is None else _holds(limit, reached)
    told = "not measured" if reached is None else words(reached)
    return Check(str(limit), told + _predicted(limit, report), met)


def _predicted(limit: Limit, report: Report) -> str:
    """What a limit on time was chosen by, after a comma; empty where nothing was predicted."""
    if report.predicted_speedup is None or limit.metric not in ("speedup", "latency"):
        return ""
    return f", {factor(report.predicted_speedup)} the speed predicted"


def _holds(limit: Limit, reached: float) -> bool:
    if limit.comparison == "=":
        # Units are whole: the nearest possible share may be half a percentage point away.
        return abs(reached - limit.value) <= 5e-3
    slack = _SPEED_SLACK if limit.metric == "speedup" else _SLACK
    if limit.comparison == ">=":
        return reached >= limit.value * (1 - slack)
    return reached <= limit.value * (1 + slack)


def _pattern(pattern: Pattern, report: Report) -> Check:
    removed = sparsity(report)
    # The share says too little to confirm a pattern, but enough to refute one.
    broken = removed is not None and bool(report.groups) and removed < pattern.sparsity - 5e-3
    got = "not measured" if removed is None else f"{share(removed)} removed"
    return Check(str(pattern), got, False if broken else None)


_Reached = tuple[float | None, Callable[[float], str]]


def _side(field: str, words: Callable[[float], str]) -> Callable[[Report, bool], _Reached]:
    def reached(report: Report, relative: bool) -> _Reached:
        after = getattr(report.after, field)
        return (left(getattr(report.before, field), after), share) if relative else (after, words)

    return reached


def _latency(report: Report, relative: bool) -> _Reached:
    if relative:
        times = speedup(report)
        return (None if times is None else 1 / times.median), share
    return (None if report.after.latency is None else report.after.latency.median), duration


def _speedup(report: Report, relative: bool) -> _Reached:
    times = speedup(report)
    return (None if times is None else times.median), factor


def _sparsity(report: Report, relative: bool) -> _Reached:
    return sparsity(report), share


def _unknown(report: Report, relative: bool) -> _Reached:
    return None, share


_REACHED: dict[str, Callable[[Report, bool], _Reached]] = {
    "macs": _side("macs", count),
    "params": _side("params", count),
    "bytes": _side("bytes", file_size),
    "latency": _latency,
    "speedup": _speedup,
    "sparsity": _sparsity,
}


def changed_layers(report: Report) -> tuple[tuple[LayerChange, ...], tuple[LayerChange, ...]]:
    """`(changed, whole)`: layers that lost something, most first, and those that did not, in their own order."""
    lost = [_lost(report.form == "mask", layer) for layer in report.layers]
    return _by_loss(report.layers, lost)


def changed_groups(report: Report) -> tuple[tuple[GroupChange, ...], tuple[GroupChange, ...]]:
    """`(changed, whole)`: groups that lost units, largest share first, and those that did not, in their own order."""
    return _by_loss(report.groups, [(group.sparsity, 0.0) for group in report.groups])


def _lost(masked: bool, layer: LayerChange) -> _Loss:
    stays = layer.nonzero_after if masked and layer.nonzero_after is not None else layer.params_after
    gone = float(layer.params_before - stays)
    return (gone, 0.0) if masked else (layer.macs_before - layer.macs_after, gone)


def _by_loss(items: Sequence[_Item], lost: Sequence[_Loss]) -> tuple[tuple[_Item, ...], tuple[_Item, ...]]:
    order = sorted(range(len(items)), key=lambda i: (-lost[i][0], -lost[i][1], i))
    changed = tuple(items[i] for i in order if any(lost[i]))
    return changed, tuple(item for item, gone in zip(items, lost, strict=True) if not any(gone))


def by_reason(frozen: Iterable[FrozenWidth]) -> dict[str, list[FrozenWidth]]:
    """Frozen widths under their reason, in order of first occurrence."""
    found: dict[str, list[FrozenWidth]] = {}
    for width in frozen:
        found.setdefault(width.reason, []).append(width)
    return found
