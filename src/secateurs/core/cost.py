"""Costs as polynomials in the number of units kept.

The MACs of a convolution are a product of dimension sizes, so the cost of a whole model is a sum of such products.
With dimension types for sizes it can be evaluated for any decision without touching the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .dims import Dim, atoms, parse, size

__all__ = ["CostModel", "Monomial", "constant", "gather"]


@dataclass(frozen=True)
class Monomial:
    """`coefficient` times the product of the sizes of `dims`; `source` says whose cost it is (a layer, a tensor)."""

    coefficient: float
    dims: tuple[Dim, ...]
    source: str = ""

    def value(self, counts: Mapping[str, int]) -> float:
        """The cost with `counts[atom]` units kept."""
        return self.coefficient * math.prod(size(d, counts) for d in self.dims)


@dataclass(frozen=True)
class CostModel:
    """Named costs of a model, each a sum of monomials.

    Args:
        metrics: "params" (entries), "macs" (multiply–accumulates for the example input), "bytes" (of parameters
            and buffers); each a tuple of monomials.
    """

    metrics: Mapping[str, tuple[Monomial, ...]]

    def total(self, metric: str, counts: Mapping[str, int] | None = None) -> float:
        """The cost with `counts` units kept per group; without counts, of the whole model."""
        return sum(m.value(counts or {}) for m in self.metrics[metric])

    def by_source(self, metric: str, counts: Mapping[str, int] | None = None) -> dict[str, float]:
        """The same, split over sources (layers or tensors) in the order in which they first occur."""
        out: dict[str, float] = {}
        for m in self.metrics[metric]:
            out[m.source] = out.get(m.source, 0.0) + m.value(counts or {})
        return out

    def to_dict(self) -> dict[str, list[list[Any]]]:
        """The costs as plain JSON values: per metric a list of [coefficient, dims in their notation, source]."""
        return {
            metric: [[m.coefficient, [str(d) for d in m.dims], m.source] for m in monomials]
            for metric, monomials in self.metrics.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Iterable[Sequence[Any]]], sizes: Mapping[str, int]) -> CostModel:
        """The costs that `to_dict` wrote, given the size of each group by name."""
        return cls(
            {
                metric: tuple(Monomial(c, tuple(parse(d, sizes) for d in dims), source) for c, dims, source in rows)
                for metric, rows in data.items()
            }
        )

    def unit(self, metric: str, group: str, sizes: Mapping[str, int]) -> float:
        """What the removal of one unit of `group` saves while all others are whole; `sizes` maps group to size."""
        fewer = {group: sizes[group] - 1}
        touched = [m for m in self.metrics[metric] if any(a.name == group for d in m.dims for a in atoms(d))]
        return sum(m.value({}) - m.value(fewer) for m in touched)


def constant(value: float, source: str = "") -> Monomial:
    """A cost that no decision changes."""
    return Monomial(value, (), source)


def gather(monomials: Iterable[Monomial]) -> tuple[Monomial, ...]:
    """`monomials` with those of equal dims and source added up, in order of first occurrence."""
    merged: dict[tuple[tuple[Dim, ...], str], float] = {}
    for m in monomials:
        merged[m.dims, m.source] = merged.get((m.dims, m.source), 0.0) + m.coefficient
    return tuple(Monomial(c, dims, source) for (dims, source), c in merged.items())
