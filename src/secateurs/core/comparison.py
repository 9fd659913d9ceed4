"""Which weights of one matrix compete, and how many of them stay: what every layer-wise solver is told.

A solver knows errors and inverses; whether it removes half of the matrix, half of each row or two of every four
inputs is a value that it is given. Counts are exact: asked for k of n, k stay, ties by index (`core.select`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .budget import Pattern, units_kept
from .errors import OptionError
from .select import n_of_m, per_row, top

__all__ = ["Comparison", "Within"]

Within = Literal["matrix", "row"]
# Scores that are ranked at a time, where rows are ranked one by one.
_CHUNK = 2**20


@dataclass(frozen=True)
class Comparison:
    """How many entries of a matrix stay, and which of them are compared.

    Args:
        sparsity: the share that goes, in [0, 1); with a pattern, the share of the pattern's removals that is made.
        within: "matrix", all entries together, or "row", the same number in each row.
        pattern: `keep` of every `of` consecutive columns; None for none.

    Raises:
        OptionError: a sparsity outside its range, or an unknown `within`.

    >>> import torch
    >>> Comparison(0.5).keep(torch.tensor([[4.0, 1.0], [3.0, 2.0]])).tolist()
    [[True, False], [True, False]]
    >>> Comparison.of(Pattern(1, 2)).keep(torch.tensor([[4.0, 1.0], [2.0, 3.0]])).tolist()
    [[True, False], [False, True]]
    """

    sparsity: float
    within: Within = "matrix"
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.sparsity < 1 or (self.pattern is not None and self.sparsity == 1)):
            raise OptionError(f"sparsity must lie in [0, 1), got {self.sparsity}.")
        if self.within not in ("matrix", "row"):
            raise OptionError(f"within must be matrix or row, got {self.within!r}.")

    @classmethod
    def of(cls, pattern: Pattern) -> Comparison:
        """All removals of an N:M pattern."""
        return cls(1.0, "row", pattern)

    @property
    def removed(self) -> float:
        """The share of the matrix that goes."""
        if self.pattern is None:
            return self.sparsity
        return (self.pattern.of - self._of_pattern) / self.pattern.of

    def eased(self, progress: float) -> Comparison:
        """The same with `progress` in [0, 1] of the removals: what a gradual solver asks for on its way."""
        return replace(self, sparsity=self.sparsity * progress)

    def keep(self, scores: Tensor) -> Tensor:
        """The mask of the highest: bool, in the shape of `scores` [rows, columns].

        Of columns that are a part of a matrix, the same share goes as of the whole.

        Raises:
            OptionError: NaN among the scores, or a pattern that does not divide the columns.
        """
        if self.pattern is None and self.within == "matrix":
            return top(scores, units_kept(self.sparsity, scores.numel()))
        # Rows have nothing to do with one another, and some at a time need less memory.
        some = max(_CHUNK // max(scores.shape[-1], 1), 1)
        return torch.cat([self._keep_of_rows(rows) for rows in scores.split(some)])

    def _keep_of_rows(self, scores: Tensor) -> Tensor:
        if self.pattern is not None:
            return n_of_m(scores, self._of_pattern, self.pattern.of)
        return per_row(scores, units_kept(self.sparsity, scores.shape[1]))

    def check(self, weight: Tensor, where: str = "the layer") -> None:
        """None; refuses a matrix that the pattern does not divide, before anything is computed.

        Raises:
            OptionError: names the layer.
        """
        if self.pattern is not None and weight.shape[1] % self.pattern.of:
            raise OptionError(
                f"{self.pattern} needs a number of inputs that {self.pattern.of} divides; {where} has "
                f"{weight.shape[1]}: leave it out with ignore=."
            )

    @property
    def _of_pattern(self) -> int:
        assert self.pattern is not None
        return self.pattern.of - int((self.pattern.of - self.pattern.keep) * self.sparsity + 1e-9)
