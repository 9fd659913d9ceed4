"""Reductions and ops that mix the positions of an axis."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...core.dims import Dim, Fixed
from ..records import Type
from ..trace import Call
from .pointwise import fixed
from .registry import rule

__all__: list[str] = []


def _reduced(call: Call, kind: Type) -> list[int]:
    rank = len(kind.dims)
    named = call.args.get("dim")
    if named is None or named == []:
        return list(range(rank))
    return [call.axis(d, rank) for d in (named if isinstance(named, (list, tuple)) else [named])]


# Of what these choose along an axis they tell the position, too.
_CHOOSING = ("argmax", "argmin", "max", "min", "median")


@rule(
    "mean", "sum", "amax", "amin", "aminmax", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "prod", "logsumexp", "any", "all", "max", "min", "argmax", "argmin", "median", "nansum",
)  # fmt: skip
def reduce(call: Call) -> list[Type]:
    """Axes folded into one number. Only a sum of exact zeros does not notice what was removed."""
    kind = call.types()[0]
    axes = _reduced(call, kind)
    neutral = call.name == "sum" and kind.zero
    if not neutral:
        for axis in axes:
            call.doubt(kind.dims[axis], f"reduced over: {call.why}")
    into = None
    if any(t.dtype == torch.int64 for t in call.outputs):
        if call.name in _CHOOSING and isinstance(call.args.get("dim"), int) and kind.dims:
            into = call.choice(kind.dims[axes[0]], 1)
        else:
            call.freeze([kind.dims[a] for a in axes], f"positions are looked up: {call.why}")
    keepdim = bool(call.args.get("keepdim"))
    dims: list[Dim] = [Fixed(1) if i in axes else d for i, d in enumerate(kind.dims) if keepdim or i not in axes]
    # Of zeros all are zero but the logarithm of a sum of exponentials, and the positions that some return as well.
    zero = kind.zero and call.name != "logsumexp"
    return [
        Type(tuple(dims), zero and t.is_floating_point(), into=into if t.dtype == torch.int64 else None)
        for t in call.outputs
    ]


@rule("_softmax", "_log_softmax", "_safe_softmax", "logcumsumexp")
def softmax(call: Call) -> Type:
    """Values of one axis normalised by their sum."""
    kind = call.types()[0]
    axis = call.axis(call.args["dim"], len(kind.dims))
    call.doubt(kind.dims[axis], f"normalised over: {call.why}")
    return Type(kind.dims)


@rule("topk")
def topk(call: Call) -> list[Type]:
    """The largest along an axis, and where they stand: of what is left, others are chosen."""
    kind = call.types()[0]
    axis = call.axis(call.args["dim"], len(kind.dims))
    count = call.outputs[0].shape[axis]
    into = call.choice(kind.dims[axis], count)
    dims = (*kind.dims[:axis], Fixed(count), *kind.dims[axis + 1 :])
    return [Type(dims), Type(dims, into=into)]


@rule("sort", points=True)
def sort(call: Call) -> list[Type]:
    """Positions are ordered along an axis, so it is fixed; values that are positions keep their order in a cut."""
    values, places = ordered(call)
    return [replace(values, into=call.types()[0].into), places]


@rule("cumsum")
def cumsum(call: Call) -> list[Type]:
    """Sums up to each position of an axis: those of zeros do not notice what was removed."""
    kind = call.types()[0]
    return [Type(kind.dims)] if kind.zero and kind.dims else ordered(call)


@rule("cumprod", "triu", "tril", "cummax", "cummin")
def ordered(call: Call) -> list[Type]:
    """Positions are ordered along an axis, so it is fixed."""
    kind = call.types()[0]
    rank = len(kind.dims)
    axes = [rank - 2, rank - 1] if call.name in ("triu", "tril") else [call.axis(call.args.get("dim", -1), rank)]
    dims = call.freeze_axes(kind.dims, axes, f"ordered: {call.why}")
    return [Type(tuple(dims)) for _ in call.outputs]


@rule("equal", "nonzero")
def read(call: Call) -> list[Type]:
    """Python looks at values: what it does with them is not known."""
    for kind in call.types():
        call.freeze(kind.dims, f"values read by Python: {call.why}")
    return fixed(call)
