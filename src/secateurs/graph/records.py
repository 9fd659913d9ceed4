"""What a trace notes: types of tensors, ops, calls of modules, and where removing is not zeroing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.dims import Dim, atoms

__all__ = ["Choice", "Doubted", "OpRecord", "Seen", "Span", "Type"]


@dataclass(frozen=True)
class Type:
    """What a tensor's axes are made of.

    Args:
        dims: one type per axis.
        zero: whether entries of removed units are exactly zero once the parameters that carry them are zeroed.
        param: qualified name if the tensor is a parameter or buffer, or a transposed or sliced view of one.
        axes: for such a view, which axes of the parameter each of its axes runs over.
        into: where its values are positions that were chosen along an axis, that axis; none is ever a removed one.
    """

    dims: tuple[Dim, ...]
    zero: bool = False
    param: str | None = None
    axes: tuple[tuple[int, ...], ...] = ()
    into: Dim | None = None


@dataclass(frozen=True)
class Seen:
    """A tensor in what a module returned: the types of its axes, and its dtype."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Span:
    """One call of a module.

    Args:
        start, stop: the ops of the trace that ran inside it, as numbers of the first and of the one after the last.
        output: what it returned, with a `Seen` in the place of each tensor; None where that cannot be told.
    """

    start: int
    stop: int
    output: Any


@dataclass(frozen=True)
class OpRecord:
    """One op of the trace.

    Args:
        name, module: what was called, and the path of the module that called it.
        dims, dtypes: of what came out.
        inputs: the types of what went in.
        ints: the integers it was given, any of which may be a size.
        factors: the numbers that values were computed with.
        slots: for integers that place positions and do not show in a shape, by their place in `ints`, what they equal.
    """

    name: str
    module: str
    dims: tuple[tuple[Dim, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    inputs: tuple[tuple[Dim, ...], ...]
    ints: tuple[int, ...]
    factors: tuple[float, ...]
    slots: Mapping[int, Dim] = field(default_factory=dict)


@dataclass(frozen=True)
class Doubted:
    """An op for which units that are removed and units that are zero are not the same.

    Args:
        module, name, nth: the caller, the op, and which of the caller's calls of it.
        inputs, outputs: the types of its tensors, in the order of its arguments and results.
        into: for each result that holds positions the axis they are positions in, None for the others.
    """

    module: str
    name: str
    nth: int
    inputs: tuple[tuple[Dim, ...], ...]
    outputs: tuple[tuple[Dim, ...], ...]
    into: tuple[Dim | None, ...] = ()

    @property
    def live(self) -> bool:
        """Whether any position of its tensors can go."""
        return any(True for dims in (*self.inputs, *self.outputs) for dim in dims for _ in atoms(dim))

    def mapped(self, change: Callable[[Dim], Dim]) -> Doubted:
        """The same op with other dimensions."""
        inputs, outputs = (tuple(tuple(map(change, dims)) for dims in side) for side in (self.inputs, self.outputs))
        into = tuple(None if dim is None else change(dim) for dim in self.into)
        return replace(self, inputs=inputs, outputs=outputs, into=into)


@dataclass(frozen=True)
class Choice:
    """Positions chosen along an axis: how many for each place, and whether in the run in training mode."""

    dim: Dim
    count: int
    training: bool
