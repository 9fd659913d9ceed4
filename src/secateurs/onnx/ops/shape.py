"""Ops that move values about without changing them, and those that make values out of sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .conv import spread
from .table import Array, Attributes, beside, dtype_of, ints, number, op, tensor, tensors

__all__: list[str] = []


def _axes(a: Attributes, given: Any, rank: int) -> list[int]:
    """The node's axes, not negative, given as an input or as an attribute."""
    found = a.get("axes") if given is None else given
    return [n % rank for n in ints([] if found is None else found)]


@op("Shape")
def shape(a: Attributes, x: Tensor | Array) -> Array:
    """The sizes of the axes, or of some of them."""
    return np.array(tuple(x.shape)[a.get("start", 0) : a.get("end")], dtype=np.int64)


@op("Size")
def size(a: Attributes, x: Tensor | Array) -> Array:
    """The number of entries."""
    return np.array(math.prod(x.shape), dtype=np.int64)


@op("Reshape")
def reshape(a: Attributes, x: Tensor | Array, wanted: Any = None) -> Tensor:
    """Row-major reshape: -1 is what is left, and 0 keeps a size unless `allowzero`."""
    sizes = ints(a.get("shape") if wanted is None else wanted)
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    # Not `reshape`, which refuses a wrong size before any op is called, and calls others depending on the layout in
    # memory: who follows the ops at another size would lose the thread.
    made: Tensor = torch.ops.aten._reshape_copy(tensor(x), sizes)
    return made


@op("Flatten")
def flatten(a: Attributes, x: Tensor) -> Tensor:
    """Two axes: those before `axis`, and the others."""
    axis = a.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Squeeze")
def squeeze(a: Attributes, x: Tensor | Array, axes: Any = None) -> Tensor:
    """Axes of one position dropped, all of them unless named."""
    made = tensor(x)
    return made.squeeze(tuple(_axes(a, axes, made.dim()) or [i for i, n in enumerate(made.shape) if n == 1]))


@op("Unsqueeze")
def unsqueeze(a: Attributes, x: Tensor | Array, axes: Any = None) -> Tensor:
    """New axes of one position."""
    made = tensor(x)
    named = a.get("axes") if axes is None else axes
    for axis in sorted(n % (made.dim() + len(ints(named))) for n in ints(named)):
        made = made.unsqueeze(axis)
    return made


@op("Transpose")
def transpose(a: Attributes, x: Tensor | Array) -> Tensor:
    """Axes in another order, reversed unless told."""
    made = tensor(x)
    return made.permute(list(a.get("perm", range(made.dim() - 1, -1, -1))))


@op("Concat")
def concatenate(a: Attributes, *xs: Tensor | Array) -> Tensor:
    """One axis joined."""
    return torch.cat(tensors(*xs), a.get("axis", 1))


@op("Split")
def split(a: Attributes, x: Tensor | Array, sizes: Any = None) -> tuple[Tensor, ...]:
    """One axis cut into parts, of one size unless told; the last may be smaller."""
    made, axis = tensor(x), a.get("axis", 0)
    given = a.get("split") if sizes is None else sizes
    parts = -(-made.shape[axis] // a.outputs) if given is None else ints(given)
    found: tuple[Tensor, ...] = made.split(parts, axis)
    return found


@op("Slice")
def slice_(
    a: Attributes, x: Tensor | Array, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Tensor:
    """Ranges of some axes; a negative step runs backwards."""
    made = tensor(x)
    begin = ints(a.get("starts") if starts is None else starts)
    stop = ints(a.get("ends") if ends is None else ends)
    along = _axes(a, axes, made.dim()) or list(range(len(begin)))
    by = [1] * len(begin) if steps is None else ints(steps)
    for axis, start, end, step in zip(along, begin, stop, by, strict=True):
        made = _range_of(made, axis, slice(start, end, step))
    return made


def _range_of(x: Tensor, axis: int, wanted: slice) -> Tensor:
    def along(part: slice) -> Tensor:
        where = [slice(None)] * axis + [part]
        return x[tuple(where)]

    if wanted.step > 0:
        return along(wanted)
    taken = range(x.shape[axis])[wanted]
    if not taken:
        return along(slice(0, 0))
    return along(slice(taken[-1], taken[0] + 1, -wanted.step)).flip(axis)


@op("Expand")
def expand(a: Attributes, x: Tensor | Array, wanted: Any) -> Tensor:
    """Broadcast to a shape, which is itself broadcast to that of the input."""
    made, sizes = tensor(x), ints(wanted)
    sizes = [1] * (made.dim() - len(sizes)) + sizes
    own = [1] * (len(sizes) - made.dim()) + list(made.shape)
    return made.expand([m if n == 1 else n for m, n in zip(own, sizes, strict=True)])


@op("Tile")
def tile(a: Attributes, x: Tensor | Array, repeats: Any) -> Tensor:
    """Each axis repeated as a whole."""
    return tensor(x).repeat(ints(repeats))


@op("Pad")
def pad(a: Attributes, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    """Positions added at the ends of axes: a constant, or the axis's own values."""
    amounts = ints(a.get("pads") if pads is None else pads)
    along = _axes(a, axes, x.dim()) or list(range(x.dim()))
    begin, end = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(along):
        begin[axis], end[axis] = amounts[i], amounts[len(along) + i]
    mode = a.text("mode", "constant")
    if mode == "constant":
        return F.pad(tensor(x), spread(begin, end), value=number(value, a.get("value", 0.0)))
    made = tensor(x)
    for axis, (low, high) in enumerate(zip(begin, end, strict=True)):
        if (low, high) != (0, 0):
            at = _mirrored(torch.arange(-low, made.shape[axis] + high), made.shape[axis], mode)
            made = made.index_select(axis, beside(at, [made]))
    return made


def _mirrored(at: Tensor, size: int, mode: str) -> Tensor:
    """Positions beyond an axis, as positions on it."""
    if mode == "edge":
        return at.clamp(0, size - 1)
    if mode == "wrap":
        return at % size
    there_and_back = at % max(2 * size - 2, 1)
    return torch.minimum(there_and_back, 2 * size - 2 - there_and_back)


@op("DepthToSpace")
def depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    """Channels traded for pixels."""
    b, (n, c, h, w) = a.get("blocksize"), x.shape
    if a.text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    parts = x.reshape(n, b, b, c // (b * b), h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    """Pixels traded for channels, those of one place far apart."""
    b, (n, c, h, w) = a.get("blocksize"), x.shape
    parts = x.reshape(n, c, h // b, b, w // b, b)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("ConstantOfShape")
def constant_of_shape(a: Attributes, sizes: Any) -> Tensor:
    """A tensor of one value."""
    value, kind = a.get("value", 0.0), dtype_of(a.get("value_dtype", 1))
    return torch.full(ints(sizes), value, dtype=kind)


@op("Range")
def range_(a: Attributes, start: Any, limit: Any, step: Any) -> Tensor:
    """Numbers from a start up to a limit."""
    return torch.arange(number(start), number(limit), number(step), dtype=tensor(start).dtype)


@op("EyeLike")
def eye_like(a: Attributes, x: Tensor) -> Tensor:
    """Ones on a diagonal."""
    kind = dtype_of(a.get("dtype")) if a.get("dtype") else x.dtype
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
    return torch.eq(columns - rows, a.get("k", 0)).to(kind)


@op("Trilu")
def triangle(a: Attributes, x: Tensor, k: Any = None) -> Tensor:
    """The part of a matrix above or below a diagonal, zero elsewhere."""
    return (torch.triu if a.get("upper", 1) else torch.tril)(tensor(x), number(k, 0))
