"""Unification with refinement over dimension types.

Every axis of every parameter starts as one fresh atom. Ops say which axes are the same (`unify`), which are seen
through a finer grid (`take`, `cut_at` split an atom into a product or a concatenation), and which cannot change
(`freeze`). An atom that is refined is bound to its refinement, and everything that mentions it sees the change.
Whatever cannot be aligned is frozen with the reason: never cut what is not understood.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..core.dims import ONE, Atom, Concat, Dim, Fixed, Product, atoms, concat, product, size

__all__ = ["Solver"]


class _Unalignable(Exception):
    """Two types of equal size have no common refinement; the caller freezes both."""


class Solver:
    """Union-find over atoms with product and concatenation terms as values."""

    def __init__(self) -> None:
        self._bound: dict[str, Dim] = {}
        self._resolved: dict[str, Dim] = {}
        self._reasons: dict[str, str] = {}
        self.entangled: dict[str, str] = {}
        self._count = 0

    def fresh(self, n: int) -> Dim:
        """A new atom of `n` positions; of one position, the number one."""
        if n <= 1:
            return Fixed(n)
        self._count += 1
        return Atom(f"#{self._count}", n)

    def resolve(self, dim: Dim) -> Dim:
        """`dim` with every bound atom replaced by what it is known to be, in normal form."""
        match dim:
            case Fixed():
                return dim
            case Atom(name):
                if name not in self._bound:
                    return dim
                # A value computed earlier can itself have been refined since, so it is resolved again.
                known = self.resolve(self._resolved.get(name, self._bound[name]))
                self._resolved[name] = known
                return known
            case Product(factors):
                return _distribute([self.resolve(f) for f in factors])
            case Concat(parts):
                return concat(*(self.resolve(p) for p in parts))

    def reason(self, atom: str) -> str | None:
        """Why an atom cannot go, looking through its refinements; None if it can."""
        if atom in self._reasons:
            return self._reasons[atom]
        for inner in atoms(self._bound.get(atom, ONE)):
            if found := self.reason(inner.name):
                return found
        return None

    def freeze(self, dim: Dim, why: str) -> None:
        """Fix every atom of `dim` for the reason `why`; the first reason is kept."""
        for atom in {a.name: a for a in atoms(self.resolve(dim))}.values():
            self._reasons.setdefault(atom.name, why)
            self._bound[atom.name] = Fixed(atom.n)

    def entangle(self, dim: Dim, why: str) -> None:
        """Note that removing units of `dim` is not the same as zeroing them."""
        for atom in atoms(self.resolve(dim)):
            self.entangled.setdefault(atom.name, why)

    def is_entangled(self, atom: str) -> str | None:
        """Why removal differs from zeroing for a resolved atom; the mark is inherited by refinements."""
        for name, why in self.entangled.items():
            if any(a.name == atom for a in atoms(self.resolve(Atom(name, 0)))):
                return why
        return None

    def unify(self, a: Dim, b: Dim, why: str) -> None:
        """Make two axes one. Where they have no common refinement, both are frozen."""
        try:
            self._unify(a, b, why)
        except _Unalignable:
            self.freeze(a, f"two layouts that do not align: {why}")
            self.freeze(b, f"two layouts that do not align: {why}")

    def unify_all(self, dims: Iterable[Dim], why: str) -> Dim:
        """Make several axes one and return it."""
        first, *rest = dims
        for other in rest:
            self.unify(first, other, why)
        return first

    def _unify(self, a: Dim, b: Dim, why: str) -> None:
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if size(a) != size(b):
            raise _Unalignable
        match a, b:
            case (Atom(name), _) if all(x.name != name for x in atoms(b)):
                self._bind(a, b, why)
            case (_, Atom(name)) if all(x.name != name for x in atoms(a)):
                self._bind(b, a, why)
            case (Fixed(), _):
                self.freeze(b, f"tied to a fixed axis: {why}")
            case (_, Fixed()):
                self.freeze(a, f"tied to a fixed axis: {why}")
            case (Concat(), _) | (_, Concat()):
                self._unify_sums(_parts(a), _parts(b), why)
            case _:
                self._unify_products(_factors(a), _factors(b), why)

    def _bind(self, atom: Dim, dim: Dim, why: str) -> None:
        assert isinstance(atom, Atom)
        self._bound[atom.name] = dim
        if isinstance(dim, Fixed):
            self._reasons.setdefault(atom.name, f"tied to a fixed axis: {why}")

    def _unify_products(self, left: list[Dim], right: list[Dim], why: str) -> None:
        while left and right:
            m, n = size(left[0]), size(right[0])
            if m > n:
                left, right, m, n = right, left, n, m
            lead, rest = self._split_product(right[0], m) if m < n else (right[0], ONE)
            self._unify(left[0], lead, why)
            left, right = left[1:], ([rest] if rest != ONE else []) + right[1:]

    def _unify_sums(self, left: list[Dim], right: list[Dim], why: str) -> None:
        while left and right:
            m, n = size(left[0]), size(right[0])
            if m > n:
                left, right, m, n = right, left, n, m
            head, tail = self._split_sum(right[0], m) if m < n else (right[0], Fixed(0))
            self._unify(left[0], head, why)
            left, right = left[1:], ([tail] if size(tail) else []) + right[1:]

    def _split_product(self, dim: Dim, lead: int) -> tuple[Dim, Dim]:
        """`dim` as (slow axis of `lead` positions, fast axis), refining atoms where needed."""
        dim = self.resolve(dim)
        n = size(dim)
        if lead == 1:
            return ONE, dim
        if lead == n:
            return dim, ONE
        if n % lead:
            raise _Unalignable
        match dim:
            case Fixed():
                return Fixed(lead), Fixed(n // lead)
            case Atom():
                slow, fast = self.fresh(lead), self.fresh(n // lead)
                self._refine(dim, product(slow, fast))
                return slow, fast
            case Product(factors):
                first = size(factors[0])
                if lead % first == 0:
                    slow, fast = self._split_product(product(*factors[1:]), lead // first)
                    return product(factors[0], slow), fast
                slow, fast = self._split_product(factors[0], lead)
                return slow, product(fast, *factors[1:])
            case Concat(parts):
                return self._split_concat_as_product(parts, lead, n // lead)

    def _split_concat_as_product(self, parts: tuple[Dim, ...], lead: int, trail: int) -> tuple[Dim, Dim]:
        if all(size(p) % trail == 0 for p in parts):
            pairs = [self._split_product(p, size(p) // trail) for p in parts]
            for _, fast in pairs[1:]:
                self._unify(pairs[0][1], fast, "parts of one concatenation seen as rows")
            return concat(*(slow for slow, _ in pairs)), pairs[0][1]
        rest: Dim = concat(*parts)
        rows: list[Dim] = []
        for _ in range(lead - 1):
            row, rest = self._split_sum(rest, trail)
            rows.append(row)
        for row in rows:
            self._unify(row, rest, "rows of one concatenation")
        return Fixed(lead), rest

    def _split_sum(self, dim: Dim, at: int) -> tuple[Dim, Dim]:
        """`dim` as (first `at` positions, the others), refining atoms where needed."""
        dim = self.resolve(dim)
        n = size(dim)
        if at in (0, n):
            return (Fixed(0), dim) if at == 0 else (dim, Fixed(0))
        match dim:
            case Fixed():
                return Fixed(at), Fixed(n - at)
            case Atom():
                head, tail = self.fresh(at), self.fresh(n - at)
                self._refine(dim, concat(head, tail))
                return head, tail
            case Concat(parts):
                first = size(parts[0])
                if at >= first:
                    head, tail = self._split_sum(concat(*parts[1:]), at - first)
                    return concat(parts[0], head), tail
                head, tail = self._split_sum(parts[0], at)
                return head, concat(tail, *parts[1:])
            case Product(factors):
                trail = product(*factors[1:])
                if at % size(trail):
                    raise _Unalignable
                head, tail = self._split_sum(factors[0], at // size(trail))
                return product(head, trail), product(tail, trail)

    def _refine(self, atom: Atom, dim: Dim) -> None:
        self._bound[atom.name] = dim
        if atom.name in self.entangled:
            for inner in atoms(dim):
                self.entangled.setdefault(inner.name, self.entangled[atom.name])

    def cut_at(self, dim: Dim, start: int, stop: int, why: str) -> Dim:
        """The positions [start, stop) of `dim` as a type of their own."""
        try:
            _, tail = self._split_sum(dim, start)
            head, _ = self._split_sum(tail, stop - start)
            return head
        except _Unalignable:
            self.freeze(dim, f"sliced inside a product: {why}")
            return Fixed(stop - start)

    def reshape(self, dims: Sequence[Dim], sizes: Sequence[int], why: str) -> list[Dim]:
        """Types of the axes of a row-major reshape of axes `dims` to `sizes`.

        Walks both shapes from the left and cuts them where the running products meet; atoms that a cut runs through
        are refined. Where they do not meet, what is left of both is frozen.
        """
        if 0 in sizes:
            return self._reshape_empty(dims, sizes, why)
        pending = [f for d in dims for f in _factors(self.resolve(d))]
        out: list[Dim] = []
        for n in sizes:
            taken, pending, missing = self._take(pending, n)
            out.append(_distribute([taken, Fixed(missing)]))
            if missing > 1:
                for dim in pending:
                    self.freeze(dim, f"reshaped across its boundaries: {why}")
                return out + [Fixed(m) for m in sizes[len(out) :]]
        return out

    def _reshape_empty(self, dims: Sequence[Dim], sizes: Sequence[int], why: str) -> list[Dim]:
        """Without entries any reshape is allowed; the axes beside the empty one are followed where they align."""
        left, right = [d for d in dims if size(d)], [n for n in sizes if n]
        if math.prod(map(size, left)) != math.prod(right):
            for dim in left:
                self.freeze(dim, f"reshaped without entries: {why}")
            return [Fixed(n) for n in sizes]
        others = iter(self.reshape(left, right, why))
        return [next(others) if n else Fixed(0) for n in sizes]

    def _take(self, pending: list[Dim], n: int) -> tuple[Dim, list[Dim], int]:
        """The leading `n` positions of a product of factors as one type, the factors left, what is missing of `n`."""
        taken: list[Dim] = []
        while n > 1 and pending:
            first = self.resolve(pending[0])
            m = size(first)
            if m > n and m % n == 0:
                try:
                    slow, fast = self._split_product(first, n)
                except _Unalignable:
                    break
            elif n % m == 0:
                slow, fast = first, Fixed(1)
            else:
                break
            taken.append(slow)
            pending = [*_factors(self.resolve(fast)), *pending[1:]]
            n //= size(slow)
        return _distribute(taken), pending, n


def _factors(dim: Dim) -> list[Dim]:
    return list(dim.factors) if isinstance(dim, Product) else [dim] if dim != ONE else []


def _parts(dim: Dim) -> list[Dim]:
    return list(dim.parts) if isinstance(dim, Concat) else [dim]


def _distribute(factors: Sequence[Dim]) -> Dim:
    """The product in normal form: a leading concatenation is multiplied out, since (a+b)·c is a·c followed by b·c."""
    flat = product(*factors)
    if isinstance(flat, Product) and isinstance(flat.factors[0], Concat):
        return concat(*(product(p, *flat.factors[1:]) for p in flat.factors[0].parts))
    return flat
