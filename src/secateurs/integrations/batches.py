"""Data sets as batches: iterated over in the order in which they are stored, called with the number of a pass for a
shuffled one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from ..core.errors import DataError, OptionError

__all__ = ["Batches", "Loader"]


@dataclass(frozen=True)
class Batches:
    """Batches of a data set whose samples can be fetched by their positions.

    `for batch in batches` goes over all samples in order. `batches(epoch)` is a pass over them for training: in an
    order that follows from `seed` and `epoch`, without the last incomplete batch where there is a complete one, since
    batch norm cannot be trained on a single sample.

    Args:
        count: number of samples.
        fetch: positions to a batch.
        size: samples a batch.
        seed: of all orders.

    Raises:
        DataError: there is no sample.
        OptionError: a batch of no samples.
    """

    count: int
    fetch: Callable[[list[int]], Any]
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OptionError(f"a batch has at least 1 sample, got {self.size}.")
        if self.count < 1:
            raise DataError("the data is empty: at least one sample is needed.")

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Any]:
        return iter(_Pass(list(range(self.count)), self.size, self.fetch))

    def __call__(self, epoch: int) -> Iterable[Any]:
        order = self._order(epoch)
        complete = len(order) - len(order) % self.size
        return _Pass(order[:complete] or order, self.size, self.fetch)

    def sample(self, batches: int) -> Batches:
        """At most so many batches of samples drawn without replacement, which stored order alone would not mix."""
        if batches < 1:
            raise OptionError(f"a limit is at least 1 batch, got {batches}.")
        drawn = self._order(-1)[: batches * self.size]
        return replace(self, count=len(drawn), fetch=lambda positions: self.fetch([drawn[i] for i in positions]))

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
        drawn: list[int] = torch.randperm(self.count, generator=generator).tolist()
        return drawn


@dataclass(frozen=True)
class _Pass:
    """Samples in a given order; its length is known, so that learning rates can follow it."""

    order: list[int]
    size: int
    fetch: Callable[[list[int]], Any]

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.order), self.size):
            yield self.fetch(self.order[start : start + self.size])


@dataclass(frozen=True)
class Loader:
    """Batches that a function of the user's makes anew for each pass over them.

    Args:
        make: returns an iterable of batches.
        limit: at most so many batches of it; None for all.
    """

    make: Callable[[], Iterable[Any]]
    limit: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.make()), self.limit)

    def __call__(self, _epoch: int) -> Iterable[Any]:
        return self.make()

    def sample(self, batches: int) -> Loader:
        """The first so many batches."""
        if batches < 1:
            raise OptionError(f"a limit is at least 1 batch, got {batches}.")
        return replace(self, limit=batches)
