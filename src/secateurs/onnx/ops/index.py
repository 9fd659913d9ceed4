"""Indexing by data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .table import Array, Attributes, beside, ints, number, op, tensor, tensors

__all__: list[str] = []

_REDUCE = {"mul": "prod", "max": "amax", "min": "amin"}


@op("Gather")
def gather(a: Attributes, x: Tensor | Array, indices: Tensor | Array) -> Tensor:
    """Positions of one axis."""
    made = tensor(x)
    axis = a.get("axis", 0) % made.dim()
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return made.select(axis, int(indices))
    at = beside(tensor(indices), [made])
    where: list[Any] = [slice(None)] * axis + [at.long()]
    return made[tuple(where)]


def _positive(at: Tensor, size: int) -> Tensor:
    return torch.where(at < 0, at + size, at)


@op("GatherElements")
def gather_elements(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """At each place the value at another position of one axis."""
    axis = a.get("axis", 0)
    made, at = tensors(x, indices)
    return made.gather(axis, _positive(at, made.shape[axis]))


def _batched(x: Tensor, at: Tensor, lead: int) -> tuple[Any, ...]:
    """Index tensors for the axes that the last axis of `at` runs over, after `lead` batch axes."""
    grid = [
        torch.arange(n, device=at.device).reshape(-1, *[1] * (at.dim() - 2 - i)) for i, n in enumerate(x.shape[:lead])
    ]
    return (*grid, *at.unbind(-1))


@op("GatherND")
def gather_nd(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Places named by all their first positions."""
    made, at = tensors(x, indices)
    return made[_batched(made, at, a.get("batch_dims", 0))]


@op("ScatterND")
def scatter_nd(a: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy with other values at places named by their first positions."""
    made, at, new = tensors(x, indices, updates)
    how = a.text("reduction", "none")
    if how not in ("none", "add"):
        raise a.refuse(f"scattering with reduction {how!r}")
    return made.index_put(tuple(at.unbind(-1)), new, accumulate=how == "add")


@op("ScatterElements", "Scatter")
def scatter_elements(a: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy with other values at positions of one axis."""
    made, at, new = tensors(x, indices, updates)
    axis, how = a.get("axis", 0), a.text("reduction", "none")
    at = _positive(at, made.shape[axis])
    if how == "none":
        return made.scatter(axis, at, new)
    return made.scatter_add(axis, at, new) if how == "add" else made.scatter_reduce(axis, at, new, _REDUCE[how])


@op("NonZero")
def nonzero(a: Attributes, x: Tensor) -> Tensor:
    """The positions of what is not zero, an axis a row."""
    return tensor(x).nonzero().t()


@op("OneHot")
def one_hot(a: Attributes, indices: Tensor, depth: Any, values: Any) -> Tensor:
    """A new axis that is one value at a position and another elsewhere."""
    count, (off, on) = int(number(depth)), tensor(values).unbind()
    at = _positive(tensor(indices).long(), count)
    axis = a.get("axis", -1)
    axis = axis + at.dim() + 1 if axis < 0 else axis
    hit = at.unsqueeze(axis) == torch.arange(count, device=at.device).reshape(-1, *[1] * (at.dim() - axis))
    return torch.where(hit, on, off)


@op("TopK")
def top_k(a: Attributes, x: Tensor, count: Any = None) -> tuple[Tensor, Tensor]:
    """The largest (or smallest) values of an axis, and where they are."""
    k = a.get("k") if count is None else ints(count)[0]
    values, at = torch.topk(x, int(k), a.get("axis", -1), bool(a.get("largest", 1)), bool(a.get("sorted", 1)))
    return values, at


@op("ArgMax", "ArgMin")
def arg_extreme(a: Attributes, x: Tensor) -> Tensor:
    """The position of the largest or smallest value of an axis: the first, or the last."""
    axis, keep, last = a.get("axis", 0), bool(a.get("keepdims", 1)), bool(a.get("select_last_index", 0))
    find = torch.argmax if a.op == "ArgMax" else torch.argmin
    at = find(x.flip(axis) if last else x, axis, keepdim=keep)
    return x.shape[axis] - 1 - at if last else at


@op("Compress")
def compress(a: Attributes, x: Tensor, condition: Tensor) -> Tensor:
    """Positions of an axis, or of the flattened tensor, where a condition holds."""
    chosen = tensor(condition).nonzero().flatten()
    axis = a.get("axis")
    return x.reshape(-1).index_select(0, chosen) if axis is None else x.index_select(axis, chosen)


@op("ReverseSequence")
def reverse_sequence(a: Attributes, x: Tensor, lengths: Tensor) -> Tensor:
    """The first positions of each sequence in reverse order."""
    time, batch = a.get("time_axis", 0), a.get("batch_axis", 1)
    long = tensor(lengths).reshape([-1 if i == batch else 1 for i in range(x.dim())])
    steps = torch.arange(x.shape[time], device=long.device).reshape([-1 if i == time else 1 for i in range(x.dim())])
    at = torch.where(steps < long, long - 1 - steps, steps)
    return x.gather(time, beside(at.expand(x.shape), [x]))
