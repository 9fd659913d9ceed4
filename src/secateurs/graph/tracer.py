"""One run of a model as a list of typed ops.

The tracer knows no op: it looks up the rule of each ATen op that the model calls, hands it the types of the arguments,
and attaches the types that the rule returns to the outputs. An op without a rule freezes what it touches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.dims import Dim, Fixed, atoms
from .ops import FILLS, NEUTRAL, UNRECORDED, base_name, bound, is_pointwise, numbers, writes
from .records import Doubted, OpRecord, Seen, Span, Type
from .rules.registry import ALWAYS, MOVES, POINTS, RULES
from .run import execute, tensors_in
from .trace import Call, Trace

__all__ = ["Tracer"]

# What a module may return beside tensors and still be understood.
_PLAIN = (bool, int, float, str, type(None))


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
            if writes(func) and (not kind.zero or kind.into is not None):
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
        if function is None and is_pointwise(func):
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
