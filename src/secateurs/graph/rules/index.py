"""Indexing by data: the indexed axis is fixed, the others pass."""

from __future__ import annotations

from torch import Tensor

from ...core.dims import Dim, Fixed
from ..trace import Call, Type, rule
from .pointwise import fixed

__all__: list[str] = []


@rule("embedding")
def embedding(call: Call) -> Type:
    """Rows looked up by number: the vocabulary is fixed, the width goes out."""
    weight, ids = call.type_of(call.args["weight"]), call.type_of(call.args["indices"])
    call.freeze([weight.dims[0]], f"looked up by number: {call.why}")
    return Type((*ids.dims, weight.dims[1]), weight.zero)


@rule("index", "_unsafe_index")
def index(call: Call) -> Type:
    """Advanced indexing: the indexed axes are fixed; their results stand where NumPy puts them."""
    kind = call.type_of(call.args["self"])
    indices: list[Tensor | None] = list(call.args["indices"])
    indexed = [i for i, t in enumerate(indices) if t is not None]
    if any(t is not None and not t.dtype.is_signed and t.dim() > 1 for t in indices):
        call.freeze(kind.dims, f"indexed by a mask: {call.why}")
        return Type(tuple(Fixed(n) for n in call.outputs[0].shape))
    call.freeze([kind.dims[i] for i in indexed], f"indexed by data: {call.why}")
    rest = [d for i, d in enumerate(kind.dims) if i not in indexed]
    new = len(call.outputs[0].shape) - len(rest)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    shape = call.outputs[0].shape
    dims: list[Dim] = [*rest[:at], *(Fixed(n) for n in shape[at : at + new]), *rest[at:]]
    return Type(tuple(dims), kind.zero)


@rule("index_select")
def index_select(call: Call) -> Type:
    """Positions of one axis chosen by data."""
    kind = call.type_of(call.args["self"])
    axis = call.axis(call.args["dim"], len(kind.dims))
    call.freeze([kind.dims[axis]], f"indexed by data: {call.why}")
    dims = [Fixed(n) if i == axis else d for i, (d, n) in enumerate(zip(kind.dims, call.outputs[0].shape, strict=True))]
    return Type(tuple(dims), kind.zero)


@rule(
    "gather", "scatter", "scatter_add", "scatter_reduce", "index_put", "_index_put_impl", "index_add", "index_copy",
    "index_fill", "masked_select", "masked_scatter", "take", "grid_sampler_2d", "put", "_unsafe_index_put", "isin",
    "bincount", "histc",
)  # fmt: skip
def scattered(call: Call) -> list[Type]:
    """Positions written or read by data on every axis: all are fixed."""
    for kind in call.types():
        call.freeze(kind.dims, f"indexed by data: {call.why}")
    return fixed(call)
