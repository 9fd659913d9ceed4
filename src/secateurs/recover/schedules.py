"""Learning-rate rules: functions from progress in [0, 1] to a factor on the initial rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..core.errors import OptionError, unknown_name

__all__ = ["Rate", "get_rate", "linear", "steps_down"]

Rate = Callable[[float], float]


def cosine(progress: float) -> float:
    """½·(1 + cos πp): from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(warmup: float = 0.1) -> Rate:
    """A rule that rises from 0 to 1 over the share `warmup` of the training, then falls to 0, both on a line.

    0.1 is PERP's (arXiv 2312.15230), as the usual rule for language models; 0 begins at 1.

    Raises:
        OptionError: `warmup` outside [0, 1).

    >>> [round(linear()(p), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not 0 <= warmup < 1:
        raise OptionError(f"warmup is a share of the training in [0, 1), got {warmup}.")
    return lambda progress: progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def steps_down(milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> Rate:
    """A rule that multiplies by `factor` at each milestone, a share of the training (CIFAR recipe: ×0.1 at ½ and ¾).

    Raises:
        OptionError: a milestone outside [0, 1].

    >>> [round(steps_down()(p), 3) for p in (0.0, 0.5, 0.8)]
    [1.0, 0.1, 0.01]
    """
    if any(not 0 <= m <= 1 for m in milestones):
        raise OptionError(f"milestones are shares of the training in [0, 1], got {list(milestones)}.")
    # A milestone such as 80/160 epochs must be met by the batch that starts epoch 80, whatever the rounding.
    return lambda progress: factor ** sum(progress >= m - 1e-9 for m in milestones)


_RATES: dict[str, Rate] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear(0.0),
    "linear-warmup": linear(),
    "step": steps_down(),
}


def get_rate(rate: str | Rate) -> Rate:
    """The rule called `rate` (cosine, constant, linear, linear-warmup or step), or `rate` itself if it is a function.

    Raises:
        OptionError: an unknown name; the nearest are listed.
    """
    if callable(rate):
        return rate
    if rate not in _RATES:
        raise unknown_name("learning-rate schedule", rate, _RATES)
    return _RATES[rate]
