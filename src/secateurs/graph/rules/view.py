"""Views: axes are renamed, split, merged, joined or sliced; no value changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

from ...core.dims import Dim, Fixed, concat, product, size
from ..records import Type
from ..trace import Call
from .pointwise import fixed, fixed_dims
from .registry import rule

__all__: list[str] = []


def _one(call: Call) -> tuple[Type, int]:
    kind = call.type_of(call.args["self"])
    return kind, len(kind.dims)


def _view(kind: Type, order: list[int]) -> Type:
    """The axes of `kind` that `order` names; knows that it is still a view of the parameter."""
    axes = tuple(kind.axes[i] for i in order) if kind.param else ()
    return Type(tuple(kind.dims[i] for i in order), kind.zero, kind.param, axes)


def _covered(
    axes: tuple[tuple[int, ...], ...], sizes: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Which axes of a parameter each axis of a reshape of its view runs over: those that share one of its strides."""
    if not axes:
        return ()
    spans = list(zip(_spans(sizes), axes, strict=True))
    return tuple(
        tuple(a for (low, high), own in spans if max(low, start) < min(high, stop) for a in own)
        for start, stop in _spans(shape)
    )


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Of each axis the product of the sizes before it, without and with its own."""
    ends = list(accumulate(sizes, mul, initial=1))
    return list(pairwise(ends))


@rule("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "view_copy", moves=True)
def reshape(call: Call) -> Type:
    """Row-major reshape."""
    kind, _ = _one(call)
    shape = tuple(call.outputs[0].shape)
    sizes = tuple(size(d) for d in kind.dims)
    if sizes == shape:
        return kind
    dims = tuple(call.trace.solver.reshape(kind.dims, shape, call.why))
    return Type(dims, kind.zero, kind.param, _covered(kind.axes, sizes, shape))


@rule("t", "transpose", "permute", "transpose_copy", "permute_copy", moves=True)
def permute(call: Call) -> Type:
    """Axes in another order."""
    kind, rank = _one(call)
    order = list(range(rank))
    if "dims" in call.args:
        order = [call.axis(d, rank) for d in call.args["dims"]]
    elif "dim0" in call.args:
        a, b = call.axis(call.args["dim0"], rank), call.axis(call.args["dim1"], rank)
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return _view(kind, order)


@rule("unsqueeze", moves=True)
def unsqueeze(call: Call) -> Type:
    """A new axis of one position."""
    kind, rank = _one(call)
    at = call.axis(call.args["dim"], rank + 1)
    axes = (*kind.axes[:at], (), *kind.axes[at:]) if kind.param else ()
    return Type((*kind.dims[:at], Fixed(1), *kind.dims[at:]), kind.zero, kind.param, axes)


@rule("squeeze", moves=True)
def squeeze(call: Call) -> Type:
    """Axes of one position dropped."""
    kind, rank = _one(call)
    named = call.args.get("dim", list(range(rank)))
    axes = {call.axis(d, rank) for d in (named if isinstance(named, (list, tuple)) else [named])}
    return _view(kind, [i for i, d in enumerate(kind.dims) if not (i in axes and size(d) == 1)])


@rule("expand", always=True, moves=True)
def expand(call: Call) -> Type:
    """Axes of one position repeated."""
    kind, rank = _one(call)
    shape = call.outputs[0].shape
    new = len(shape) - rank
    own = [Fixed(1)] * new + list(kind.dims)
    return Type(tuple(d if size(d) == n else call.repeated(n) for d, n in zip(own, shape, strict=True)), kind.zero)


@rule("repeat", moves=True)
def repeat(call: Call) -> Type:
    """Each axis repeated as a whole: the repetition is the slow factor."""
    kind, rank = _one(call)
    times = call.args["repeats"]
    own = [Fixed(1)] * (len(times) - rank) + list(kind.dims)
    return Type(tuple(product(call.repeated(r), d) for r, d in zip(times, own, strict=True)), kind.zero)


@rule("cat", moves=True)
def cat(call: Call) -> Type:
    """One axis joined, the others one."""
    kinds = [k for k, t in zip(call.types(), call.tensors, strict=True) if t.numel() or t.dim() > 1]
    axis = call.axis(call.args["dim"], len(kinds[0].dims))
    dims: list[Dim] = []
    for i in range(len(kinds[0].dims)):
        along = [k.dims[i] for k in kinds]
        dims.append(concat(*along) if i == axis else call.trace.solver.unify_all(along, call.why))
    return Type(tuple(dims), all(k.zero for k in kinds))


@rule("stack", moves=True)
def stack(call: Call) -> Type:
    """A new axis over the operands; all their axes are one."""
    kinds = call.types()
    at = call.axis(call.args["dim"], len(kinds[0].dims) + 1)
    dims = [call.trace.solver.unify_all([k.dims[i] for k in kinds], call.why) for i in range(len(kinds[0].dims))]
    dims.insert(at, Fixed(len(kinds)))
    return Type(tuple(dims), all(k.zero for k in kinds))


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", moves=True)
def split(call: Call) -> list[Type]:
    """One axis cut into consecutive parts."""
    kind, rank = _one(call)
    axis = call.axis(call.args["dim"], rank)
    out, start = [], 0
    for tensor in call.outputs:
        stop = start + tensor.shape[axis]
        part = call.trace.solver.cut_at(kind.dims[axis], start, stop, call.why)
        dims = (*kind.dims[:axis], part, *kind.dims[axis + 1 :])
        out.append(Type(dims, kind.zero, kind.param, kind.axes))
        start = stop
    return out


@rule("slice", moves=True)
def slice_(call: Call) -> Type:
    """A range of one axis. A step other than one fixes it."""
    kind, rank = _one(call)
    axis = call.axis(call.args["dim"], rank)
    n, length = size(kind.dims[axis]), call.outputs[0].shape[axis]
    start = call.args.get("start") or 0
    start = min(max(start + n if start < 0 else start, 0), n)
    if call.args.get("step", 1) != 1:
        call.freeze([kind.dims[axis]], f"sliced with a step: {call.why}")
        part: Dim = Fixed(length)
    else:
        part = call.trace.solver.cut_at(kind.dims[axis], start, start + length, call.why)
    dims = (*kind.dims[:axis], part, *kind.dims[axis + 1 :])
    return Type(dims, kind.zero, kind.param, kind.axes)


@rule("select", "unbind", moves=True)
def select(call: Call) -> list[Type]:
    """One position of an axis: its number is in the code, so the axis is fixed."""
    kind, rank = _one(call)
    axis = call.axis(call.args["dim"], rank)
    call.freeze([kind.dims[axis]], f"indexed at a fixed position: {call.why}")
    dims = (*kind.dims[:axis], *kind.dims[axis + 1 :])
    return [Type(dims, kind.zero) for _ in call.outputs]


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(call: Call) -> Type:
    """Positions added at the ends of the last axes."""
    kind, rank = _one(call)
    amounts = list(call.args.get("pad") or call.args["padding"])
    dims = list(kind.dims)
    for i in range(len(amounts) // 2):
        axis, (low, high) = rank - 1 - i, amounts[2 * i : 2 * i + 2]
        if call.name != "constant_pad_nd" or min(low, high) < 0:
            if (low, high) != (0, 0):
                call.freeze([dims[axis]], f"padded from its own values: {call.why}")
                dims[axis] = Fixed(size(dims[axis]) + low + high)
        else:
            before, after = call.free(low), call.free(high)
            call.slots.update({2 * i: before, 2 * i + 1: after})
            dims[axis] = concat(before, dims[axis], after)
    return Type(tuple(dims), kind.zero and not call.args.get("value"))


@rule("flip", "roll", moves=True)
def reorder(call: Call) -> Type:
    """Positions of some axes moved about: those axes are fixed."""
    kind, rank = _one(call)
    axes = [call.axis(d, rank) for d in call.args["dims"]] or list(range(rank))
    return Type(tuple(call.freeze_axes(kind.dims, axes, f"reordered: {call.why}")), kind.zero)


@rule("glu")
def glu(call: Call) -> Type:
    """The first half of an axis, gated by the second: they are one."""
    kind, rank = _one(call)
    axis = call.axis(call.args["dim"], rank)
    half = size(kind.dims[axis]) // 2
    halves = [call.trace.solver.cut_at(kind.dims[axis], at, at + half, call.why) for at in (0, half)]
    return Type((*kind.dims[:axis], call.trace.solver.unify_all(halves, call.why), *kind.dims[axis + 1 :]), kind.zero)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Type:
    """Channels as groups × channels of a group, transposed."""
    kind, _ = _one(call)
    groups = call.args["groups"]
    sizes = (groups, size(kind.dims[1]) // groups)
    slow, fast = call.trace.solver.reshape([kind.dims[1]], sizes, call.why)
    return Type((kind.dims[0], product(fast, slow), *kind.dims[2:]), kind.zero)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Type:
    """Channels × the square of a factor traded for pixels: the square is fixed, the other channels pass."""
    kind, rank = _one(call)
    at, after = rank - 3, call.outputs[0].shape[-3]
    channels = kind.dims[at]
    call.freeze(kind.dims[at + 1 :], f"spatial axes: {call.why}")
    if call.name == "pixel_shuffle":
        channels, square = call.trace.solver.reshape([channels], (after, size(channels) // after), call.why)
        call.freeze([square], f"channels that become pixels: {call.why}")
    else:
        channels = product(channels, Fixed(after // size(channels)))
    return Type((*kind.dims[:at], channels, *fixed_dims(call.outputs[0])[at + 1 :]), kind.zero)


@rule("as_strided", "diagonal", "unfold", "im2col")
def opaque(call: Call) -> list[Type]:
    """Views that are not followed: everything they touch is fixed."""
    for kind in call.types():
        call.freeze(kind.dims)
    return fixed(call)
