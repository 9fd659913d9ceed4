"""Reductions and running sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce as fold
from typing import Any

from torch import Tensor

from .table import Array, Attributes, ints, number, op, tensor

__all__: list[str] = []

_Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    made = fold(lambda t, axis: t.prod(axis, keepdim=True), axes, x)
    return made if keep else made.squeeze(tuple(axes))


_REDUCTIONS: dict[str, _Reduction] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


@op(*_REDUCTIONS)
def reduce(a: Attributes, x: Tensor | Array, axes: Any = None) -> Tensor:
    """Axes folded into one number each: all of them unless named."""
    made = tensor(x)
    named = ints(a.get("axes", []) if axes is None else axes)
    if not named and a.get("noop_with_empty_axes", 0):
        return made
    along = [n % made.dim() for n in named] or list(range(made.dim()))
    return _REDUCTIONS[a.op](made, along, bool(a.get("keepdims", 1)))


@op("CumSum")
def cumulative_sum(a: Attributes, x: Tensor, axis: Any) -> Tensor:
    """Running sums along an axis, from either end, with or without the place itself."""
    along = int(number(axis))
    made = tensor(x)
    made = made.flip(along) if a.get("reverse", 0) else made
    sums = made.cumsum(along, dtype=made.dtype)
    sums = sums - made if a.get("exclusive", 0) else sums
    return sums.flip(along) if a.get("reverse", 0) else sums
