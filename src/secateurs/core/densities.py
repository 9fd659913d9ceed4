"""Densities around a mean: what matters more keeps a larger share, and all together keep what was asked.

Each function takes a figure per group (a block, a layer) and returns the share of it that stays. Weighted by the
sizes of the groups the shares average to `density` exactly; where one would leave [0, 1], all are brought nearer to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .errors import OptionError

__all__ = ["outlier_densities", "sigmoid_densities"]

# CFSP sums angles over 128·1024 tokens and divides by 10⁴, so that of their mean this is the factor.
_STRENGTH = 13.1072
# Of the room above the mean density this share is used where the released code has to draw densities together.
_ROOM = 1 / 1.05


def sigmoid_densities(
    importance: Mapping[str, float], sizes: Mapping[str, int], density: float, strength: float = _STRENGTH
) -> dict[str, float]:
    """`density · u / mean(u)` with `u = sigmoid(strength · (importance - mean))` (CFSP, arXiv 2409.13199).

    Where a density would reach 1, their spread shrinks until the largest is `1 - p·(1 - 1/1.05)`, with p = 1 - density.

    Args:
        importance: per group, finite.
        sizes: number of units per group, the weights of both means.
        density: the share of all units that stays, in [0, 1].
        strength: 13.1072 (default, the published code's for importances that are means over tokens); 0 is uniform.

    Raises:
        OptionError: a group without importance, or one that is not finite.

    >>> sigmoid_densities({"a": 1.4, "b": 1.0}, {"a": 8, "b": 8}, 0.5, 0.0)
    {'a': 0.5, 'b': 0.5}
    """
    values = _known(importance, sizes, "importance")
    middle = _mean(values, sizes)
    risen = {name: _sigmoid(strength * (value - middle)) for name, value in values.items()}
    level = _mean(risen, sizes)
    return _within({name: density * (u / level - 1) for name, u in risen.items()}, density, _ROOM)


def outlier_densities(
    outliers: Mapping[str, float], sizes: Mapping[str, int], density: float, spread: float = 0.08
) -> dict[str, float]:
    """Densities that grow in a straight line with `outliers` and span `2·spread` (OWL, arXiv 2310.05175).

    The line is shifted so that the mean holds, as in the published code, and may so reach further than `spread` to one
    side. Equal outliers give equal densities.

    Args:
        outliers: per group the share of its weights that are outliers; see `criteria.outliers`.
        sizes: number of units per group, the weights of the mean.
        density: the share of all units that stays, in [0, 1].
        spread: λ, 0.08 by default (the paper's for language models).

    Raises:
        OptionError: a group without a share, or one that is not finite, or a negative spread.
    """
    if spread < 0:
        raise OptionError(f"spread must be at least 0, got {spread}.")
    values = _known(outliers, sizes, "outliers")
    width = max(values.values()) - min(values.values())
    line = {name: 2 * spread * value / width if width > 0 else 0.0 for name, value in values.items()}
    middle = _mean(line, sizes)
    return _within({name: value - middle for name, value in line.items()}, density, 1.0)


def _known(values: Mapping[str, float], sizes: Mapping[str, int], what: str) -> dict[str, float]:
    """The values of the groups in `sizes`."""
    wrong = [name for name in sizes if not math.isfinite(values.get(name, math.nan))]
    if wrong:
        raise OptionError(f"{what} must have a finite number for each group; it has none for {', '.join(wrong[:3])}.")
    return {name: float(values[name]) for name in sizes}


def _mean(values: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    return math.fsum(values[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _sigmoid(x: float) -> float:
    # Of the two forms the one that cannot overflow.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _within(deviations: Mapping[str, float], density: float, room: float) -> dict[str, float]:
    """`density` plus the deviations, scaled down together where one of the sums is no density."""
    highest, lowest = max(deviations.values()), min(deviations.values())
    scale = 1.0
    if highest > 0 and density + highest >= 1:
        scale = room * (1 - density) / highest
    if density + scale * lowest < 0:
        scale = density / -lowest
    return {name: min(max(density + scale * value, 0.0), 1.0) for name, value in deviations.items()}
