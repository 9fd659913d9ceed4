"""What one run of a model taught, and what a rule of the shape algebra sees of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..core.dims import Dim, Fixed, atoms, size
from .records import Choice, Doubted, OpRecord, Span, Type
from .run import tensors_in
from .solver import Solver

__all__ = ["Call", "Trace"]


@dataclass
class Trace:
    """What one run of the model taught: types, costs, and which axis of a parameter is contracted.

    `heads` holds, of each product of activations, the axis it is batched over and its other axes; `repeats` the axes
    that are copies; `aligned` axes whose size a kernel wants to be a multiple; `chosen` axes along which positions are
    chosen, `pointed` those of which an op was given the positions; `least` of some how many must stay; `ids`, by place,
    what those inputs are positions in that are ids, and `made` the same of results of ops, by (module, op, which of its
    calls, which result); see `vocabulary`.
    `copy` is the model that ran. `outputs` has the axes of what it returned. They, ops, spans (by the path of the
    module, in the order of its calls) and MACs are of this run; all else may be shared by the traces of several runs of
    one model.
    """

    training: bool = False
    real: bool = False
    copy: nn.Module | None = None
    ops: list[OpRecord] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    macs: list[tuple[tuple[Dim, ...], str]] = field(default_factory=list)
    doubted: list[Doubted] = field(default_factory=list)
    solver: Solver = field(default_factory=Solver)
    params: dict[str, Type] = field(default_factory=dict)
    contracted: set[tuple[str, int]] = field(default_factory=set)
    heads: list[tuple[Dim, tuple[Dim, ...]]] = field(default_factory=list)
    aligned: list[tuple[Dim, int]] = field(default_factory=list)
    repeats: list[Dim] = field(default_factory=list)
    chosen: list[Choice] = field(default_factory=list)
    pointed: list[Dim] = field(default_factory=list)
    least: list[tuple[Dim, int]] = field(default_factory=list)
    ids: dict[str, Dim] = field(default_factory=dict)
    made: dict[tuple[str, str, int, int], Dim] = field(default_factory=dict)
    outputs: list[tuple[Dim, ...]] = field(default_factory=list)
    edits: dict[str, Dim] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def multiples(self) -> dict[str, int]:
        """Of atoms whose size a kernel wants to be a multiple of some number: that number."""
        out: dict[str, int] = {}
        for dim, multiple in self.aligned:
            for atom in atoms(self.solver.resolve(dim)):
                out[atom.name] = math.lcm(out.get(atom.name, 1), multiple)
        return out

    def fewest(self) -> dict[str, int]:
        """Of atoms of which some must stay: how many."""
        out: dict[str, int] = {}
        for dim, count in self.least:
            for atom in atoms(self.solver.resolve(dim)):
                out[atom.name] = max(out.get(atom.name, 1), count)
        return out

    def another(self, training: bool) -> Trace:
        """An empty trace of another run, which adds to the same types."""
        return replace(self, training=training, copy=None, ops=[], spans={}, macs=[], doubted=[], outputs=[])

    def numbered(self) -> set[str]:
        """The names of the atoms whose positions are ids among the inputs."""
        return {atom.name for dim in self.ids.values() for atom in atoms(self.solver.resolve(dim))}


@dataclass(frozen=True)
class Call:
    """What a rule sees: the op's arguments by their schema names, their types, and the shared solver."""

    trace: Trace
    name: str
    module: str
    args: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    type_of: Callable[[Tensor], Type]
    doubts: list[tuple[Dim, str]] = field(default_factory=list)
    slots: dict[int, Dim] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """The op and its caller, for reasons."""
        return f"{self.name} in {self.module or 'the model'}"

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor arguments in order, those inside lists included."""
        return tensors_in(self.args.values())

    def types(self) -> list[Type]:
        """The types of `tensors`, as they are known by now."""
        return [self.type_of(t) for t in self.tensors]

    def axis(self, value: int, rank: int) -> int:
        """A possibly negative axis number as a non-negative one."""
        return value + rank if value < 0 else value

    def free(self, n: int) -> Dim:
        """A new axis of `n` positions, a number in Python code: whether it can follow a cut, a rehearsal shows."""
        return self.trace.solver.fresh(n)

    def repeated(self, n: int) -> Dim:
        """A new axis of `n` copies of one position; see `free`."""
        self.trace.repeats.append(self.free(n))
        return self.trace.repeats[-1]

    def choice(self, dim: Dim, count: int) -> Dim | None:
        """What the positions are of that the op chose along `dim`, `count` for each place; None if none can go."""
        if self.all_fixed((dim,)):
            return None
        self.trace.chosen.append(Choice(dim, count, self.trace.training))
        self.doubt(dim, f"chosen from: {self.why}")
        return dim

    def into(self, kind: Type) -> Dim | None:
        """The axis that values of `kind` are positions in; None if they are no positions, or none of them can go."""
        return None if kind.into is None or self.all_fixed((kind.into,)) else kind.into

    def all_fixed(self, dims: tuple[Dim, ...]) -> bool:
        """Whether no position of `dims` can go."""
        return all(isinstance(self.trace.solver.resolve(d), Fixed) for d in dims)

    def doubt(self, dim: Dim, why: str) -> None:
        """Note that removing units of `dim` changes this op's result where zeroing them does not, or the other way."""
        self.doubts.append((dim, why))

    def freeze(self, dims: tuple[Dim, ...] | list[Dim], why: str | None = None) -> None:
        """Fix all atoms of `dims`."""
        for dim in dims:
            self.trace.solver.freeze(dim, why or self.why)

    def freeze_axes(self, dims: tuple[Dim, ...], axes: list[int], why: str) -> list[Dim]:
        """`dims` with the given axes fixed."""
        self.freeze([dims[a] for a in axes], why)
        return [Fixed(size(d)) if a in axes else d for a, d in enumerate(dims)]
