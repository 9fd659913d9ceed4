"""Fluctuation: how much of a unit a constant cannot replace, as the layers that consume it see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import OptionError
from ..core.moments import Moments
from ..core.units import ChannelGroup
from ..solvers.layerwise import seen_of
from ..solvers.sequential import grams_of
from .consumers import Consumer, consumers, unit_scores
from .evidence import samples
from .preserve import preserved
from .registry import criterion

__all__ = ["METRICS", "Metric", "Recursion", "Variance", "fluctuation", "standardized"]

Metric = Literal["wifv", "ifv", "wifn"]
METRICS: tuple[Metric, ...] = ("wifv", "ifv", "wifn")
Variance = Literal["exact", "released"]


@criterion(
    "fluctuation",
    kind="unit",
    groups=("channel",),
    needs=("data",),
    signed=True,
    paper="An et al. 2024, arXiv 2312.11983",
)
def fluctuation(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    data: Sequence[Any],
    seed: int,
    metric: Metric = "wifv",
    standardize: bool = False,
    square_heads: bool = False,
    variance: Variance = "exact",
) -> dict[str, Tensor]:
    """Var(x_j)·||W_:j||², what the loss of input j costs a consumer whose bias takes its mean; the mean over positions.

    Of several consumers the mean counts. Variances are those over all tokens or pixels, in float64.

    Args:
        model, groups, data, seed: see `consumers.consumers`.
        metric: "wifv" (above, the default), "ifv" (the variance alone) or "wifn" (the mean over rows of |w_ij|·||x_j||,
            Wanda of a column).
        standardize: z-scores of the metric over the positions of a group in one consumer, so that layers compare.
        square_heads: the metric of attention heads is squared first, as in the published code.
        variance: "exact" (default), or the "released" running estimate, which leaves out the first sequence, weighs
            later ones more and grows with their length; see `Recursion`.

    Raises:
        ModelError: a group that no linear layer or convolution consumes, or one that the data never reaches.
    """
    if metric not in METRICS or variance not in ("exact", "released"):
        raise OptionError(
            f"metric must be one of {', '.join(METRICS)}, and variance exact or released; got {metric!r} and "
            f"{variance!r}."
        )
    found = consumers(model, groups, data, seed=seed)
    if variance == "released":
        found = _as_released(model, found, data, seed)

    def scores(group: ChannelGroup) -> Tensor:
        power = 2 if square_heads and group.kind == "head" else 1
        scaled: Callable[[Tensor], Tensor] = standardized if standardize else (lambda inside: inside)
        return unit_scores(group, found[group.name], lambda one: _metric(one, metric).pow(power), scaled)

    return {group.name: scores(group) for group in groups}


def standardized(values: Tensor) -> Tensor:
    """`values` [n] minus their mean, over their standard deviation (n - 1 in its divisor); zeros where that is zero."""
    centred = values - values.mean()
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    # Rounding gives equal values a spread, too.
    if spread <= 1e-12 * values.abs().max():
        return torch.zeros_like(values)
    return centred / spread


@dataclass(frozen=True)
class Recursion:
    """The published code's running fluctuation: F = 1/(K-1)·Σ_{k≥2} (k-1)/k·Σ_t (x_kt - m_k)² over K sequences.

    m_k is the mean of the first k sequences. The code means Welford's update, but both of its means are the new one,
    and it divides by sequences instead of tokens.

    Args:
        sequences: K.
        mean: m_K.
        total: of the terms so far.
    """

    sequences: int = 0
    mean: Tensor | float = 0.0
    total: Tensor | float = 0.0

    def add(self, sequence: Moments) -> Recursion:
        """With one more sequence, whose tokens have these moments."""
        k = self.sequences + 1
        mean = self.mean + (sequence.mean - self.mean) / k
        around = sequence.deviation + sequence.count * (sequence.mean - mean).square()
        return Recursion(k, mean, self.total + around * ((k - 1) / k))

    @property
    def fluctuation(self) -> Tensor | float:
        """F; 0 after one sequence."""
        return self.total / max(self.sequences - 1, 1)


def _metric(one: Consumer, metric: Metric) -> Tensor:
    if metric == "wifn":
        return one.along(one.weight.abs() * one.norm[:, None], "mean")
    if metric == "ifv":
        return one.along(one.variance[:, None], "mean")
    return one.along(one.variance[:, None] * one.weight.square())


def _as_released(
    model: nn.Module, found: dict[str, tuple[Consumer, ...]], data: Sequence[Any], seed: int
) -> dict[str, tuple[Consumer, ...]]:
    """The consumers with the released fluctuation for their variances; each sample of the data is a sequence."""
    names = {one.member.tensor.rpartition(".")[0] for several in found.values() for one in several}
    running = dict.fromkeys(names, Recursion())
    with preserved(model, seed=seed):
        for piece in (piece for batch in data for piece in samples(batch)):
            grams, _ = grams_of(model, [piece], list(names), full=False, seen=seen_of([piece]))
            for name, gram in grams.items():
                moments = Moments(gram.count, gram.mean, gram.variance * gram.count)
                running[name] = running[name].add(moments)

    def released(one: Consumer) -> Consumer:
        value = running[one.member.tensor.rpartition(".")[0]].fluctuation
        return replace(one, variance=value + torch.zeros_like(one.variance))

    return {name: tuple(map(released, several)) for name, several in found.items()}
