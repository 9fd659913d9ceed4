"""Running means and variances, in float64 and without cancellation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .batch import double

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of observations, per position; those of two samples can be merged.

    Args:
        count: number of observations.
        mean: float64 [positions].
        deviation: float64 [positions], the sum over observations of (x - mean)^2.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of `rows` [observations, positions]."""
        rows = double(rows)
        mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        return cls(len(rows), mean, (rows - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both samples together, without cancellation (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        gap = other.mean - self.mean
        deviation = self.deviation + other.deviation + gap.square() * (self.count * share)
        return Moments(count, self.mean + gap * share, deviation)

    @property
    def variance(self) -> Tensor:
        """The variance over the observations, divided by their number: float64 [positions]."""
        return self.deviation / max(self.count, 1)

    @property
    def mean_square(self) -> Tensor:
        """The mean of x^2: float64 [positions]."""
        return self.variance + self.mean.square()
