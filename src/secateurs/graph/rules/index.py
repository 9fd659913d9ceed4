"""Indexing: by data, which fixes the indexed axis, or by positions that were chosen along an axis, which are that axis.

Positions of an axis of experts never name one that was removed, since what chose them had only the others to choose
from. Whatever is looked up at them, or counted by them, is the same for those that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.dims import ONE, Atom, Dim, Fixed, size
from ..records import Type
from ..trace import Call
from .pointwise import broadcast, fixed
from .registry import rule

__all__: list[str] = []


def _look_up(call: Call, dim: Dim, index: Type) -> None:
    """`dim` is indexed by `index`: it is what its values are positions in, or fixed."""
    into = call.into(index)
    if into is None:
        call.freeze([dim], f"indexed by data: {call.why}")
    else:
        call.trace.solver.unify(dim, into, call.why)


@rule("embedding", points=True)
def embedding(call: Call) -> Type:
    """Rows looked up by number: the width goes out; the vocabulary is fixed, unless the numbers were chosen."""
    weight, ids = call.type_of(call.args["weight"]), call.type_of(call.args["indices"])
    _look_up_rows(call, weight.dims[0], ids)
    return Type((*ids.dims, weight.dims[1]), weight.zero and call.all_fixed(ids.dims))


def _look_up_rows(call: Call, rows: Dim, ids: Type) -> None:
    if call.into(ids) is not None:
        _look_up(call, rows, ids)
        return
    known = call.trace.solver.reason(ids.into.name) if isinstance(ids.into, Atom) else None
    call.freeze([rows], known or f"looked up by number: {call.why}")


@rule("_embedding_bag", "_embedding_bag_forward_only", points=True)
def embedding_bag(call: Call) -> list[Type]:
    """Rows looked up by number and folded into one for each bag: the width goes out."""
    weight, ids = call.type_of(call.args["weight"]), call.type_of(call.args["indices"])
    _look_up_rows(call, weight.dims[0], ids)
    shape = call.outputs[0].shape
    bags = (Fixed(shape[0]), weight.dims[1])
    # Beside the rows it tells what belongs to which bag and, of the largest, where each value is from.
    others = [Type(bags if t.shape == shape else tuple(map(Fixed, t.shape))) for t in call.outputs[1:]]
    return [Type(bags, weight.zero), *others]


@rule("nll_loss_forward", "nll_loss2d_forward", points=True)
def nll_loss(call: Call) -> list[Type]:
    """Of each row the value at a position: what is left out or weighted goes by position, too."""
    values, target = call.type_of(call.args["self"]), call.type_of(call.args["target"])
    axis = min(len(values.dims) - 1, 1)
    weights = [call.type_of(call.args["weight"]).dims[0]] if call.args.get("weight") is not None else []
    _look_up(call, values.dims[axis], target)
    call.trace.solver.unify_all([values.dims[axis], *weights], call.why)
    call.freeze([dim for i, dim in enumerate(values.dims) if i != axis])
    return fixed(call)


@rule("index", "_unsafe_index", points=True)
def index(call: Call) -> Type:
    """Advanced indexing: the results of the indexed axes stand where NumPy puts them."""
    kind = call.type_of(call.args["self"])
    indices: list[Tensor | None] = list(call.args["indices"])
    indexed = {i: call.type_of(t) for i, t in enumerate(indices) if t is not None}
    shape = call.outputs[0].shape
    if any(t is not None and not t.dtype.is_signed and t.dim() > 1 for t in indices):
        call.freeze(kind.dims, f"indexed by a mask: {call.why}")
        return Type(tuple(Fixed(n) for n in shape), into=kind.into)
    for i, found in indexed.items():
        _look_up(call, kind.dims[i], found)
    rest = [d for i, d in enumerate(kind.dims) if i not in indexed]
    new = len(shape) - len(rest)
    first, *_, last = (*indexed, *indexed)
    at = first if list(indexed) == list(range(first, last + 1)) else 0
    places = tuple(shape[at : at + new])
    masked = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)
    found_at = tuple(map(Fixed, places)) if masked else broadcast(call, list(indexed.values()), places)
    zero = kind.zero and call.all_fixed(found_at)
    return Type((*rest[:at], *found_at, *rest[at:]), zero, into=kind.into)


@rule("index_select", points=True)
def index_select(call: Call) -> Type:
    """Positions of one axis chosen by data."""
    kind = call.type_of(call.args["self"])
    axis = call.axis(call.args["dim"], len(kind.dims))
    found = call.type_of(call.args["index"])
    _look_up(call, kind.dims[axis], found)
    # A number stands for a list of one.
    places = found.dims or (ONE,)
    dims = (*kind.dims[:axis], *places, *kind.dims[axis + 1 :])
    return Type(dims, kind.zero and call.all_fixed(places), into=kind.into)


@rule("gather", points=True)
def gather(call: Call) -> list[Type]:
    """Of each line along an axis the values at the positions of another tensor: its other axes are those of that."""
    own, index = call.type_of(call.args["self"]), call.type_of(call.args["index"])
    if call.into(index) is None:
        return [replace(kind, into=own.into) for kind in scattered(call)]
    axis = call.axis(call.args["dim"], len(own.dims))
    _look_up(call, own.dims[axis], index)
    _line_up(call, [own.dims, index.dims], axis)
    return [Type(index.dims, into=own.into)]


@rule("scatter", "scatter_add", "scatter_reduce", points=True)
def scatter(call: Call) -> list[Type]:
    """Values written, or added, at positions along an axis: what goes out is what is written to."""
    own, index = call.type_of(call.args["self"]), call.type_of(call.args["index"])
    written = [call.type_of(t) for t in (call.args.get("src"), call.args.get("value")) if isinstance(t, Tensor)]
    call.freeze([k.into for k in (own, *written) if k.into is not None], f"positions are looked up: {call.why}")
    if call.into(index) is None:
        return scattered(call)
    axis = call.axis(call.args["dim"], len(own.dims))
    _look_up(call, own.dims[axis], index)
    sources = [kind.dims for kind in (index, *written) if kind.dims]
    call.freeze([dims[axis] for dims in sources])
    _line_up(call, [own.dims, *sources], axis)
    others = tuple(d for i, d in enumerate(own.dims) if i != axis)
    return [Type(own.dims, own.zero and call.all_fixed(others))]


def _line_up(call: Call, several: Sequence[Sequence[Dim]], axis: int) -> None:
    """Axes other than `axis` are one where they are of one size; where not, only the first positions of some are."""
    for other in (i for i in range(len(several[0])) if i != axis):
        dims = [one[other] for one in several]
        if len({size(d) for d in dims}) == 1:
            call.trace.solver.unify_all(dims, call.why)
        else:
            call.freeze(dims)


@rule("histc", "bincount", points=True)
def counted(call: Call) -> list[Type]:
    """How often each value occurs: of positions, one count for each, and none for those that were removed."""
    kind = call.types()[0]
    into, made = call.into(kind), call.outputs[0]
    if into is None or made.shape[0] != size(into) or call.args.get("weights") is not None or not _each_its_own(call):
        call.freeze([] if into is None else [into], f"positions are looked up: {call.why}")
        return scattered(call)
    call.freeze(kind.dims, f"counted: {call.why}")
    return [Type((into,), True)]


def _each_its_own(call: Call) -> bool:
    """Whether whole numbers from zero fall into bins of their own."""
    if call.name == "bincount":
        return True
    low, high, bins = call.args["min"], call.args["max"], call.args["bins"]
    return bool(low == 0 and bins - 1 <= high <= bins)


@rule(
    "index_put", "_index_put_impl", "index_add", "index_copy", "index_fill", "masked_select", "masked_scatter", "take",
    "grid_sampler_2d", "put", "_unsafe_index_put", "isin",
)  # fmt: skip
def scattered(call: Call) -> list[Type]:
    """Positions written or read by data on every axis: all are fixed."""
    for kind in call.types():
        call.freeze(kind.dims, f"indexed by data: {call.why}")
    return fixed(call)
