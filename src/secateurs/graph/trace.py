"""One run of a model as a list of typed ops.

The tracer knows no op: it looks up the rule of each ATen op that the model calls, hands it the types of the arguments,
and attaches the types that the rule returns to the outputs. An op without a rule freezes what it touches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.dims import Dim, Fixed, atoms, size
from .ordinal import FILLS, NEUTRAL
from .records import Choice, Doubted, OpRecord, Seen, Span, Type
from .run import execute, flat, tensors_in
from .solver import Solver

__all__ = [
    "ALWAYS",
    "DECISIVE",
    "MOVES",
    "POINTS",
    "RULES",
    "UNRECORDED",
    "Call",
    "Choice",
    "Doubted",
    "OpRecord",
    "Seen",
    "Span",
    "Trace",
    "Tracer",
    "Type",
    "base_name",
    "bound",
    "numbers",
    "rule",
]


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


# PyTorch inserts these depending on who holds a reference and on strides, so two runs of one model may differ in them.
UNRECORDED = frozenset({"detach", "alias", "lift_fresh", "clone"})

# What a module may return beside tensors and still be understood.
_PLAIN = (bool, int, float, str, type(None))

# Ops through which Python learns a value, and may go another way on other inputs.
DECISIVE = frozenset({"_local_scalar_dense", "equal", "nonzero"})

Rule = Callable[[Call], "list[Type] | Type"]
_R = TypeVar("_R", bound=Rule)
RULES: dict[str, Rule] = {}
# Ops whose rules run even where no axis can go: they charge MACs, or make new axes.
ALWAYS: set[str] = set()
# Ops that move values about and change none, so that positions stay positions.
MOVES: set[str] = set()
# Ops whose rules know what to do with positions; any other op that is given some fixes the axis they are positions in.
POINTS: set[str] = set()


def rule(*names: str, always: bool = False, moves: bool = False, points: bool = False) -> Callable[[_R], _R]:
    """Register one function as the rule of the named ATen ops (`add` also stands for `add_`).

    Args:
        always: the rule is asked even where no axis of an argument can go.
        moves: the ops move values about and change none.
        points: the rule sees to tensors of positions (see `Type.into`) itself.

    Raises:
        ValueError: an op already has a rule.
    """

    def register(function: _R) -> _R:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} already has a rule: {RULES[name].__qualname__}")
            RULES[name] = function
        ALWAYS.update(names if always else ())
        MOVES.update(names if moves else ())
        POINTS.update(names if points else ())
        return function

    return register


@cache
def base_name(func: torch._ops.OpOverload) -> str:
    """The op's name without overload; an in-place op has the name of its functional twin."""
    name: str = func.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bound(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    specs = _arguments(func)
    out = {name: kwargs.get(name, default) for name, default in specs} if kwargs else dict(specs)
    out.update(zip(out, args, strict=False))
    return out


@cache
def _arguments(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of an op's arguments, which PyTorch makes anew at each look."""
    return tuple((spec.name, spec.default_value) for spec in func._schema.arguments)


@cache
def _is_pointwise(func: torch._ops.OpOverload) -> bool:
    return torch.Tag.pointwise in func.tags


@cache
def _writes(func: torch._ops.OpOverload) -> bool:
    return bool(func._schema.is_mutable)


def numbers(func: torch._ops.OpOverload, args: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The integers among an op's arguments, and the factors: numbers that values are computed with, not sizes.

    Floats are factors, of elementwise ops integers are too, and a real scalar beside tensors on meta is a constant.
    """
    given = flat(args.values())
    ints = [v for v in given if isinstance(v, int) and not isinstance(v, bool)]
    factors = [v for v in given if isinstance(v, float)]
    if _is_pointwise(func):
        factors += ints
    tensors = [v for v in given if isinstance(v, Tensor)]
    real = [t for t in tensors if not t.is_meta]
    if len(real) < len(tensors):
        factors += [float(t) for t in real if t.dim() == 0 and not t.is_complex()]
    return tuple(ints), tuple(factors)


@dataclass(frozen=True)
class _Flow:
    """An op as a step from memory to memory, and what it doubts."""

    sources: frozenset[int]
    targets: frozenset[int]
    doubts: list[tuple[Dim, str]]
    op: Doubted | None


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common; a sparse tensor shares none."""
    return id(tensor) if tensor.layout != torch.strided else int(tensor.untyped_storage()._cdata)


class Tracer(TorchDispatchMode):
    """Runs each op, asks its rule for types, and records both."""

    def __init__(self, names: Mapping[int, str], module: Callable[[], str], trace: Trace | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self.trace = trace or Trace()
        self._names = names
        self._module = module
        self._types: dict[int, Type] = {}
        self._alive: list[Tensor] = []
        self._aliases: dict[int, list[int]] = {}
        self._flows: list[_Flow] = []
        self._calls: Counter[tuple[str, str]] = Counter()

    def type_of(self, tensor: Tensor) -> Type:
        """The type of a tensor of the run; parameters get fresh atoms, tensors from nowhere are fixed."""
        known = self._types.get(id(tensor))
        if known is None:
            known = self._typed_parameter(tensor) or Type(tuple(Fixed(n) for n in tensor.shape))
            self.remember(tensor, known)
        return known

    def _typed_parameter(self, tensor: Tensor) -> Type | None:
        name = self._names.get(id(tensor))
        if name is None:
            return None
        if name in self.trace.params:
            return self.trace.params[name]
        if not tensor.is_floating_point():
            kind = Type(tuple(Fixed(n) for n in tensor.shape))
        else:
            dims = tuple(self.trace.solver.fresh(n) for n in tensor.shape)
            kind = Type(dims, isinstance(tensor, nn.Parameter), name, tuple((i,) for i in range(len(dims))))
        self.trace.params[name] = kind
        return kind

    def remember(self, tensor: Tensor, kind: Type) -> None:
        """Attach a type; the tensor is kept alive so that its identity is not reused."""
        self._types[id(tensor)] = kind
        self._alive.append(tensor)
        self._aliases.setdefault(_memory(tensor), []).append(id(tensor))

    def leave(self, path: str, start: int, output: Any) -> None:
        """Note a call of a module that began at op `start` and returned `output`."""
        self.trace.spans.setdefault(path, []).append(Span(start, len(self.trace.ops), self._seen(output)))

    def _seen(self, output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        if not all((isinstance(v, Tensor) and v.is_floating_point()) or isinstance(v, _PLAIN) for v in leaves):
            return None
        seen = [Seen(self.type_of(v).dims, v.dtype) if isinstance(v, Tensor) else v for v in leaves]
        return tree_unflatten(seen, spec)

    def finish(self, outputs: list[Tensor]) -> Trace:
        """The trace of a run that gave `outputs`: their axes are fixed, and doubts count where they reach an output."""
        numbered = self.trace.numbered()
        for tensor in outputs:
            kind = self.type_of(tensor)
            self.trace.outputs.append(kind.dims)
            for atom in (a for dim in kind.dims for a in atoms(self.trace.solver.resolve(dim))):
                if atom.name not in numbered:
                    self.trace.solver.freeze(atom, "an axis of the model's output")
            if kind.into is not None:
                self.trace.solver.freeze(kind.into, "the model's output has positions along it")
        wanted = {_memory(t) for t in outputs}
        for flow in reversed(self._flows):
            # What has no output is read by Python.
            if not flow.targets or flow.targets & wanted:
                wanted |= flow.sources
                for dim, why in flow.doubts:
                    self.trace.solver.entangle(dim, why)
                self.trace.doubted += [flow.op] if flow.op else []
        return self.trace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = execute(func, args, kwargs)
        outputs = tensors_in(result)
        arguments = bound(func, args, kwargs)
        call = Call(self.trace, base_name(func), self._module(), arguments, outputs, self.type_of)
        kinds = self._apply(call, func)
        for tensor, kind in zip(outputs, kinds, strict=True):
            self.remember(tensor, kind)
            if _writes(func) and (not kind.zero or kind.into is not None):
                self._written(tensor, kind.into)
        inputs = tuple(t.dims for t in call.types())
        nth = self._calls[call.module, call.name]
        self._calls[call.module, call.name] += 1
        if self.trace.made:
            kinds = self._with_ids(call, nth, kinds)
        made = tuple(k.dims for k in kinds)
        into = tuple(k.into for k in kinds) if any(k.into is not None for k in kinds) else ()
        doubted = Doubted(call.module, call.name, nth, inputs, made, into) if call.doubts else None
        self._flows.append(
            _Flow(frozenset(map(_memory, call.tensors)), frozenset(map(_memory, outputs)), call.doubts, doubted)
        )
        if call.name in UNRECORDED:
            return result
        ints, factors = numbers(func, arguments)
        dtypes = tuple(t.dtype for t in outputs)
        record = OpRecord(call.name, call.module, made, dtypes, inputs, ints, factors, call.slots)
        self.trace.ops.append(record)
        return result

    def _written(self, tensor: Tensor, into: Dim | None) -> None:
        """Whatever shares memory with a tensor that was written to is no longer known to be zero.

        Where ids were written, all of it holds ids; whether that is so, `vocabulary` has seen.
        """
        for alias in self._aliases[_memory(tensor)]:
            known = self._types[alias]
            self._types[alias] = replace(known, zero=False, into=known.into if into is None else into)

    def _with_ids(self, call: Call, nth: int, kinds: list[Type]) -> list[Type]:
        """`kinds` of an op's results, some of which are single columns of an input that holds ids."""
        made, at = self.trace.made, (call.module, call.name, nth)
        kinds = [replace(kind, into=made.get((*at, i), kind.into)) for i, kind in enumerate(kinds)]
        for tensor, kind in zip(call.outputs, kinds, strict=True):
            self.remember(tensor, kind)
        return kinds

    def _apply(self, call: Call, func: torch._ops.OpOverload) -> list[Type]:
        given = call.types()
        pointing = [kind.into for kind in given if kind.into is not None and call.into(kind)]
        self.trace.pointed += pointing
        plain = not pointing and all(isinstance(d, Fixed) for t in given for d in t.dims)
        if call.name not in ALWAYS and plain:
            return [Type(tuple(Fixed(n) for n in t.shape)) for t in call.outputs]
        # What is no position zero is no position.
        moved = call.name in MOVES and len(pointing) == len(given) and call.outputs[0].dtype != torch.bool
        if pointing and call.name in NEUTRAL | FILLS and self._are_ids(pointing):
            moved = call.name in FILLS
            call.trace.solver.unify_all(pointing, call.why)
        elif call.name not in POINTS and not moved:
            call.freeze(pointing, f"positions are looked up: {call.why}")
            pointing = []
        function = RULES.get(call.name)
        if function is None and _is_pointwise(func):
            function = RULES["pointwise"]
        if function is None:
            return self._unknown(call)
        made = function(call)
        kinds = [made] if isinstance(made, Type) else made
        if moved and pointing:
            into = call.trace.solver.unify_all(pointing, call.why)
            return [replace(kind, into=into) for kind in kinds]
        return kinds

    def _are_ids(self, pointing: list[Dim]) -> bool:
        """Whether all these positions are ids among the inputs."""
        found = {atom.name for dim in pointing for atom in atoms(self.trace.solver.resolve(dim))}
        return found <= self.trace.numbered()

    def _unknown(self, call: Call) -> list[Type]:
        self.trace.unknown.setdefault(call.name, call.module)
        for kind in call.types():
            call.freeze(kind.dims, f"{call.name} has no rule, in {call.module or 'the model'}")
        return [Type(tuple(Fixed(n) for n in t.shape)) for t in call.outputs]
