"""Dimension types: what one axis of a tensor is made of.

An axis is a fixed number, an atom (a set of positions that can go: a width, a head count), a product
(row-major flattening, the last factor runs fastest) or a concatenation of such. `12·64` is twelve heads of
sixty-four; `a+b` is two widths one after the other; `a·49` is a width flattened with 7×7 pixels.
The constructors `product` and `concat` normalise, so no later code meets a product of one factor or a nested sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OptionError

__all__ = [
    "ONE",
    "Atom",
    "Concat",
    "Dim",
    "Fixed",
    "Product",
    "atoms",
    "concat",
    "index",
    "kept",
    "parse",
    "product",
    "size",
]


@dataclass(frozen=True, slots=True)
class Fixed:
    """An axis of `n` positions of which none can go."""

    n: int

    def __str__(self) -> str:
        return str(self.n)


@dataclass(frozen=True, slots=True)
class Atom:
    """An axis of `n` positions that can go one by one; `name` is unique within a model."""

    name: str
    n: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major flattening of `factors`; build it with `product`."""

    factors: tuple[Dim, ...]

    def __str__(self) -> str:
        return "·".join(f"({f})" if isinstance(f, Concat) else str(f) for f in self.factors)


@dataclass(frozen=True, slots=True)
class Concat:
    """`parts` one after the other; build it with `concat`."""

    parts: tuple[Dim, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


Dim = Fixed | Atom | Product | Concat
ONE = Fixed(1)


def product(*dims: Dim) -> Dim:
    """The flattening of `dims`: nested products opened, ones dropped, neighbouring numbers multiplied.

    >>> str(product(Atom("heads", 12), Fixed(8), Fixed(8)))
    'heads·64'
    """
    flat: list[Dim] = []
    for dim in dims:
        for factor in dim.factors if isinstance(dim, Product) else (dim,):
            if factor == ONE:
                continue
            if isinstance(factor, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].n * factor.n)
            else:
                flat.append(factor)
    if not flat:
        return ONE
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(*dims: Dim) -> Dim:
    """`dims` one after the other: nested sums opened, empty parts dropped, neighbouring numbers added.

    >>> str(concat(Atom("a", 4), Fixed(1), Fixed(2)))
    'a+3'
    """
    flat: list[Dim] = []
    for dim in dims:
        for part in dim.parts if isinstance(dim, Concat) else (dim,):
            if part == Fixed(0):
                continue
            if isinstance(part, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].n + part.n)
            else:
                flat.append(part)
    if not flat:
        return Fixed(0)
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def size(dim: Dim, counts: Mapping[str, int] | None = None) -> int:
    """Number of positions of `dim`, with `counts[name]` in place of an atom's own size where given."""
    match dim:
        case Fixed(n):
            return n
        case Atom(name, n):
            return n if counts is None else counts.get(name, n)
        case Product(factors):
            return math.prod(size(f, counts) for f in factors)
        case Concat(parts):
            return sum(size(p, counts) for p in parts)


def kept(dim: Dim, masks: Mapping[str, Tensor]) -> Tensor:
    """Which positions of `dim` stay: bool [size], given bool masks [n] of atoms (an atom without a mask stays whole).

    >>> kept(product(Atom("a", 2), Fixed(2)), {"a": torch.tensor([True, False])}).tolist()
    [True, True, False, False]
    """
    match dim:
        case Fixed(n):
            return torch.ones(n, dtype=torch.bool)
        case Atom(name, n):
            return masks[name].cpu() if name in masks else torch.ones(n, dtype=torch.bool)
        case Product(factors):
            out = torch.ones(1, dtype=torch.bool)
            for factor in factors:
                out = (out[:, None] & kept(factor, masks)[None, :]).flatten()
            return out
        case Concat(parts):
            return torch.cat([kept(p, masks) for p in parts])


def index(dim: Dim, atom: str) -> Tensor:
    """For each position of `dim` the unit of `atom` that it belongs to: int64 [size], -1 where it belongs to none.

    >>> index(product(Atom("h", 2), Fixed(2)), "h").tolist(), index(concat(Atom("a", 2), Fixed(1)), "a").tolist()
    ([0, 0, 1, 1], [0, 1, -1])
    """
    match dim:
        case Fixed(n):
            return torch.full((n,), -1)
        case Atom(name, n):
            return torch.arange(n) if name == atom else torch.full((n,), -1)
        case Product(factors):
            out = torch.full((1,), -1)
            for factor in factors:
                inner = index(factor, atom)
                # At most one factor carries the atom (the shape algebra freezes the rest), so the maximum picks it.
                out = torch.maximum(out[:, None], inner[None, :]).flatten()
            return out
        case Concat(parts):
            return torch.cat([index(p, atom) for p in parts])


def atoms(dim: Dim) -> Iterator[Atom]:
    """The atoms of `dim` from left to right, repeated where they occur repeatedly."""
    match dim:
        case Atom():
            yield dim
        case Product(factors):
            for factor in factors:
                yield from atoms(factor)
        case Concat(parts):
            for part in parts:
                yield from atoms(part)


def substitute(dim: Dim, known: Mapping[str, Dim]) -> Dim:
    """`dim` with each atom that `known` names replaced, in normal form.

    >>> str(substitute(product(Atom("a", 2), Atom("b", 3)), {"a": Fixed(2)}))
    '2·b'
    """
    match dim:
        case Atom(name):
            return known.get(name, dim)
        case Product(factors):
            return product(*(substitute(f, known) for f in factors))
        case Concat(parts):
            return concat(*(substitute(p, known) for p in parts))
    return dim


def parse(text: str, sizes: Mapping[str, int]) -> Dim:
    """The dimension that prints as `text`, given the size of each atom by name.

    Raises:
        OptionError: `text` is not in the notation, or names an atom without a size.

    >>> str(parse("h·(a+a)", {"h": 4, "a": 8}))
    'h·(a+a)'
    """
    dim, rest = _parse_sum(text, sizes)
    if rest:
        raise OptionError(f"cannot read dimension {text!r}: unexpected {rest[0]!r}.")
    return dim


def _parse_sum(text: str, sizes: Mapping[str, int]) -> tuple[Dim, str]:
    parts: list[Dim] = []
    while True:
        part, text = _parse_product(text, sizes)
        parts.append(part)
        if not text.startswith("+"):
            return concat(*parts), text
        text = text[1:]


def _parse_product(text: str, sizes: Mapping[str, int]) -> tuple[Dim, str]:
    factors: list[Dim] = []
    while True:
        factor, text = _parse_factor(text, sizes)
        factors.append(factor)
        if not text.startswith("·"):
            return product(*factors), text
        text = text[1:]


def _parse_factor(text: str, sizes: Mapping[str, int]) -> tuple[Dim, str]:
    if text.startswith("("):
        inner, rest = _parse_sum(text[1:], sizes)
        if not rest.startswith(")"):
            raise OptionError(f"cannot read dimension: no closing bracket before {rest!r}.")
        return inner, rest[1:]
    end = next((i for i, c in enumerate(text) if c in "·+()"), len(text))
    token, rest = text[:end], text[end:]
    if token.isdecimal():
        return Fixed(int(token)), rest
    if token not in sizes:
        raise OptionError(f"cannot read dimension: {token!r} is no number and no known atom.")
    return Atom(token, sizes[token]), rest
