"""Units: what can go. A group is a set of comparable units; one of them must always survive.

Two kinds of group cover everything that lives in a model's tensors:
`ChannelGroup` — positions of an atom (a width, a head, an expert) and every tensor axis that carries it, so that
removing unit i removes slice i everywhere at once; `WeightGroup` — the entries (or blocks) of one weight tensor.
Both can `lift` an elementwise saliency to unit scores and `spread` a decision over units to tensor masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .dims import Dim, index
from .errors import OptionError

__all__ = [
    "ChannelGroup",
    "Group",
    "Member",
    "Reduce",
    "WeightGroup",
    "combine",
    "marginals",
    "normalized",
    "reduce_rows",
    "reduce_units",
]

Reduce = Literal["sum", "mean", "max"]
# Rows already reduced, by (tensor, axis, reduction).
Cache = dict[tuple[str, int, str], Tensor]


class Group(Protocol):
    """A set of comparable units."""

    @property
    def name(self) -> str:
        """Unique within a model; the key of scores, counts and decisions."""

    @property
    def size(self) -> int:
        """Number of units."""

    @property
    def kind(self) -> str:
        """What a unit is: channel, head, weight, block …"""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Qualified names of the parameters that carry the units, without repetition."""

    def lift(
        self, saliency: Mapping[str, Tensor], reduce: Reduce = "sum", cache: Cache | None = None
    ) -> dict[str, Tensor]:
        """Per tensor present in `saliency`, the reduction of its entries over each unit: float [size].

        Groups that share wide tensors share `cache`, a dict, so that no tensor is summed twice.
        """

    def spread(self, keep: Tensor) -> dict[str, Tensor]:
        """Per tensor the bool mask, broadcastable to its shape, of the entries that stay; `keep` is bool [size]."""


@dataclass(frozen=True)
class Member:
    """One tensor axis that carries the units of a group.

    Args:
        tensor: qualified name of a parameter or buffer.
        axis: the axis, not negative.
        dim: what the whole axis is made of; the group's atom occurs in it.
        rank: number of axes of the tensor.
        role: "out" where the units are produced (rows of a weight, bias, norm), "in" where they are contracted.
    """

    tensor: str
    axis: int
    dim: Dim
    rank: int
    role: Literal["out", "in"] = "out"


@dataclass(frozen=True)
class ChannelGroup:
    """Positions of one atom, coupled over every tensor axis in `members`.

    Args:
        multiple: the number of units kept must be one of this, since a kernel of the model runs at no other.
        least: fewest units that may stay, such as the experts that each token is sent to.
        stays: the units that may not go.
        inputs: the places among a model's inputs (see `core.ids`) whose values are numbers of units.
    """

    name: str
    size: int
    kind: str
    members: tuple[Member, ...]
    multiple: int = 1
    least: int = 1
    stays: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.tensor for m in self.members))

    def multiple_for(self, width: int) -> int:
        """What kept counts must be a multiple of, so that widths are one of `width`: a head is as wide as its size.

        Experts have no width.
        """
        if self.kind == "expert":
            return self.multiple
        counts = [int((self.units_along(m) >= 0).sum()) // self.size for m in self.members if self.kind == "head"]
        each = min((count for count in counts if count > 1), default=1)
        return math.lcm(self.multiple, width // math.gcd(width, each))

    def units_along(self, member: Member) -> Tensor:
        """For each position of the member's axis the unit it belongs to: int64 [axis], -1 for none."""
        return index(member.dim, self.name)

    def lift(
        self, saliency: Mapping[str, Tensor], reduce: Reduce = "sum", cache: Cache | None = None
    ) -> dict[str, Tensor]:
        """See `Group.lift`. A tensor that carries the group on two axes counts each entry once per axis."""
        lifted: dict[str, Tensor] = {}
        cache = {} if cache is None else cache
        for member in self.members:
            key = (member.tensor, member.axis, reduce)
            if key not in cache and member.tensor not in saliency:
                continue
            if key not in cache:
                cache[key] = reduce_rows(saliency[member.tensor].movedim(member.axis, 0), reduce)
            scores = _reduce_positions(cache[key], self.units_along(member), self.size, reduce)
            lifted[member.tensor] = lifted[member.tensor] + scores if member.tensor in lifted else scores
        return lifted

    def spread(self, keep: Tensor) -> dict[str, Tensor]:
        """See `Group.spread`."""
        masks: dict[str, Tensor] = {}
        for member in self.members:
            units = self.units_along(member).to(keep.device)
            stays = torch.where(units >= 0, keep[units.clamp(min=0)], True)
            mask = stays.view([-1 if axis == member.axis else 1 for axis in range(member.rank)])
            masks[member.tensor] = masks[member.tensor] & mask if member.tensor in masks else mask
        return masks


@dataclass(frozen=True)
class WeightGroup:
    """Single entries, or `block`s of rows × columns, of one weight tensor seen as [shape[0], rest].

    Edge blocks of a shape that does not divide are smaller.

    Args:
        inputs: the axis of the layer's inputs, along which N:M patterns run; 0 in Hugging Face's `Conv1D`.
    """

    name: str
    shape: tuple[int, ...]
    block: tuple[int, int] = (1, 1)
    inputs: int = 1

    def __post_init__(self) -> None:
        if min(self.block) < 1:
            raise OptionError(f"block sizes must be positive, got {self.block} for {self.name}.")

    @property
    def kind(self) -> str:
        return "weight" if self.block == (1, 1) else "block"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        rows, columns = self.matrix
        return math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1])

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as a matrix: rows, columns."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        return math.prod(self.grid)

    @property
    def entries(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    def units(self) -> Tensor:
        """The unit of each entry: int64 [rows·columns]."""
        rows, columns = self.matrix
        down = torch.arange(rows) // self.block[0]
        across = torch.arange(columns) // self.block[1]
        return (down[:, None] * self.grid[1] + across[None, :]).flatten()

    def lift(
        self, saliency: Mapping[str, Tensor], reduce: Reduce = "sum", cache: Cache | None = None
    ) -> dict[str, Tensor]:
        """See `Group.lift`."""
        if self.name not in saliency:
            return {}
        flat = saliency[self.name].flatten()
        if self.block == (1, 1):
            return {self.name: flat}
        return {self.name: reduce_units(flat[:, None], self.units().to(flat.device), self.size, reduce)}

    def spread(self, keep: Tensor) -> dict[str, Tensor]:
        """See `Group.spread`."""
        flat = keep if self.block == (1, 1) else keep[self.units().to(keep.device)]
        return {self.name: flat.view(self.shape)}


def reduce_units(values: Tensor, units: Tensor, size: int, reduce: Reduce = "sum") -> Tensor:
    """Reduction of `values` [positions, …] over all entries whose position belongs to each unit: [size].

    Args:
        values: first axis is the position; reduced over the other axes.
        units: int64 [positions], the unit of each position, negative for none.
        size: number of units.
        reduce: "sum", "mean" over the unit's entries, or "max". Sums are taken in float32 or wider.

    Raises:
        OptionError: an unknown reduction.
    """
    return _reduce_positions(reduce_rows(values, reduce), units, size, reduce)


def reduce_rows(values: Tensor, reduce: Reduce = "sum") -> Tensor:
    """`values` [positions, …] reduced over all axes but the first: [positions], in float32 or wider.

    Raises:
        OptionError: an unknown reduction.
    """
    if reduce not in ("sum", "mean", "max"):
        raise OptionError(f"reduce must be sum, mean or max, got {reduce!r}.")
    wide = torch.promote_types(values.dtype, torch.float32)
    if values.dim() == 1:
        return values.to(wide)
    axes = tuple(range(1, values.dim()))
    if reduce == "max":
        return values.amax(axes).to(wide)
    return values.sum(axes, dtype=wide) if reduce == "sum" else values.mean(axes, dtype=wide)


def marginals(values: Tensor, axes: Iterable[int], reduce: Reduce = "sum") -> dict[int, Tensor]:
    """`reduce_rows` along each of `axes`, what lies before the axis first: sums over long rows are the fast ones."""
    wide = torch.promote_types(values.dtype, torch.float32)
    made: dict[int, Tensor] = {}
    for axis in sorted(set(axes)):
        before = tuple(range(axis))
        if not before or reduce == "max":
            made[axis] = reduce_rows(values.movedim(axis, 0), reduce)
        else:
            inner = values.sum(before, dtype=wide) if reduce == "sum" else values.mean(before, dtype=wide)
            made[axis] = reduce_rows(inner, reduce)
    return made


def _reduce_positions(rows: Tensor, units: Tensor, size: int, reduce: Reduce) -> Tensor:
    """One value a unit from one value a position; units of one tensor all have rows of the same width."""
    units = units.to(rows.device)
    inside = units >= 0
    rows, units = rows[inside], units[inside]
    if reduce == "max":
        return rows.new_full((size,), -torch.inf).scatter_reduce(0, units, rows, "amax")
    total = rows.new_zeros(size).index_add_(0, units, rows)
    return total if reduce == "sum" else total / torch.bincount(units, minlength=size).clamp(min=1)


def normalized(scores: Tensor, how: str) -> Tensor:
    """`scores` [units] on a scale that can be compared across groups (SPA, section 3).

    Args:
        how: "none", "sum", "mean", "max", "minmax" or "gaussian". A group whose divisor is not positive
            keeps its scores, since dividing would turn their order round or lose it.
    """
    match how:
        case "none":
            return scores
        case "sum":
            return _over(scores, scores.sum())
        case "mean":
            return _over(scores, scores.mean())
        case "max":
            return _over(scores, scores.max())
        case "minmax":
            return (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
        case "gaussian":
            return (scores - scores.mean()) / (scores.std(correction=0) + 1e-8)
    raise OptionError(f"normalize must be none, sum, mean, max, minmax or gaussian, got {how!r}.")


def _over(scores: Tensor, divisor: Tensor) -> Tensor:
    return scores / divisor if divisor > 0 else scores


def combine(parts: Sequence[Tensor], how: Literal["sum", "mean", "max", "prod", "first"] = "mean") -> Tensor:
    """One score per unit from its scores in each tensor: float [units] (SPA, section 3: R_out)."""
    stacked = torch.stack([p.float() for p in parts])
    match how:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)
        case "prod":
            return stacked.prod(0)
        case "first":
            return stacked[0]
    raise OptionError(f"combine must be sum, mean, max, prod or first, got {how!r}.")
