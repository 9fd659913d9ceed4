"""Integers in proportion: how a whole number of units is shared out between bounds, exactly."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

__all__ = ["apportion"]

# Of the largest weight; a bound divided by less than this may be infinite.
_LEAST = 1e-290


def apportion(
    weights: Mapping[str, float], total: int, floors: Mapping[str, int], caps: Mapping[str, int]
) -> dict[str, int]:
    """Integers in proportion to `weights` that lie within floors and caps and add up to `total` exactly.

    Water filling: `x = min(max(λ·weight, floor), cap)` with the λ at which the x add up; then the largest remainders
    are rounded up, the earlier group first among equals. Groups of weight 0 get more than their floor only when all
    others are at their caps, then in proportion to their room.

    Args:
        weights: at least 0 each, finite.
        total: between the sums of floors and caps.
        floors: integers, per group.
        caps: integers, per group, at least the floor.

    >>> apportion({"a": 1.0, "b": 1.0, "c": 2.0}, 10, dict.fromkeys("abc", 0), {"a": 9, "b": 9, "c": 4})
    {'a': 3, 'b': 3, 'c': 4}
    """
    names = list(weights)
    spent = sum(caps[n] if weights[n] > 0 else floors[n] for n in names)
    if total > spent:
        idle = {n: float(caps[n] - floors[n]) for n in names if weights[n] <= 0}
        rest = apportion(idle, total - sum(caps[n] for n in names if n not in idle), floors, caps)
        return {n: rest.get(n, caps[n]) for n in names}
    weights = _scaled(weights)
    level = _water_level(weights, total, floors, caps)
    exact = {n: min(max(level * weights[n], floors[n]), caps[n]) for n in names}
    return _largest_remainders(exact, total)


def _scaled(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights times a power of two, which rounds nothing, so that the largest is near 1."""
    exponent = math.frexp(max(weights.values(), default=0.0))[1]
    return {name: max(math.ldexp(weight, -exponent), _LEAST) if weight > 0 else 0.0 for name, weight in weights.items()}


def _water_level(weights: Mapping[str, float], total: int, floors: Mapping[str, int], caps: Mapping[str, int]) -> float:
    """The λ at which `min(max(λ·weight, floor), cap)` adds up to `total`: linear between its kinks, so exact."""
    rising = {name: weight for name, weight in weights.items() if weight > 0}
    fixed = sum(floors[name] for name in weights if name not in rising)

    def filled(level: float) -> float:
        return fixed + math.fsum(min(max(level * w, floors[n]), caps[n]) for n, w in rising.items())

    kinks = sorted({0.0, *(bound[n] / w for n, w in rising.items() for bound in (floors, caps))})
    right = min(bisect_left(kinks, float(total), key=filled), len(kinks) - 1)
    left = max(right - 1, 0)
    below, above = filled(kinks[left]), filled(kinks[right])
    passed = (total - below) / (above - below) if above > below else 0.0
    return kinks[left] + (kinks[right] - kinks[left]) * passed


def _largest_remainders(exact: Mapping[str, float], total: int) -> dict[str, int]:
    counts = {name: math.floor(x) for name, x in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
