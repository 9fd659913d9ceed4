"""One run of a model as a list of typed ops.

The tracer knows no op: it looks up the rule of each ATen op that the model calls, hands it the types of the arguments,
and attaches the types that the rule returns to the outputs. An op without a rule freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.dims import Dim, Fixed, size
from .solver import Solver

__all__ = [
    "RULES",
    "UNRECORDED",
    "Call",
    "OpRecord",
    "Trace",
    "Tracer",
    "Type",
    "base_name",
    "bound",
    "execute",
    "numbers",
    "rule",
    "running",
    "tensors_in",
]


@dataclass(frozen=True)
class Type:
    """What a tensor's axes are made of.

    Args:
        dims: one type per axis.
        zero: whether entries of removed units are exactly zero once the parameters that carry them are zeroed.
        param: qualified name if the tensor is a parameter or buffer, or a transposed or sliced view of one.
        axes: for such a view, which axis of the parameter each of its axes is.
    """

    dims: tuple[Dim, ...]
    zero: bool = False
    param: str | None = None
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpRecord:
    """One op of the trace: its name, the module that called it, what came out, and the numbers it was given."""

    name: str
    module: str
    dims: tuple[tuple[Dim, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    inputs: tuple[tuple[Dim, ...], ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]


@dataclass
class Trace:
    """What one run of the model taught: types, costs, and which axis of a parameter is contracted."""

    solver: Solver = field(default_factory=Solver)
    params: dict[str, Type] = field(default_factory=dict)
    ops: list[OpRecord] = field(default_factory=list)
    macs: list[tuple[tuple[Dim, ...], str]] = field(default_factory=list)
    contracted: set[tuple[str, int]] = field(default_factory=set)
    heads: list[Dim] = field(default_factory=list)
    head_sizes: list[Dim] = field(default_factory=list)
    edits: dict[str, Dim] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Call:
    """What a rule sees: the op's arguments by their schema names, their types, and the shared solver."""

    trace: Trace
    name: str
    module: str
    args: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    type_of: Callable[[Tensor], Type]

    @property
    def why(self) -> str:
        """The op and its caller, for reasons."""
        return f"{self.name} in {self.module or 'the model'}"

    def tensors(self) -> list[Tensor]:
        """The tensor arguments in order, those inside lists included."""
        out: list[Tensor] = []
        for value in self.args.values():
            out.extend(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor))
        return out

    def types(self) -> list[Type]:
        """The types of `tensors()`."""
        return [self.type_of(t) for t in self.tensors()]

    def axis(self, value: int, rank: int) -> int:
        """A possibly negative axis number as a non-negative one."""
        return value + rank if value < 0 else value

    def freeze(self, dims: tuple[Dim, ...] | list[Dim], why: str | None = None) -> None:
        """Fix all atoms of `dims`."""
        for dim in dims:
            self.trace.solver.freeze(dim, why or self.why)

    def freeze_axes(self, dims: tuple[Dim, ...], axes: list[int], why: str) -> list[Dim]:
        """`dims` with the given axes fixed."""
        self.freeze([dims[a] for a in axes], why)
        return [Fixed(size(d)) if a in axes else d for a, d in enumerate(dims)]


# PyTorch inserts these depending on who holds a reference, so two runs of one model may differ in them.
UNRECORDED = frozenset({"detach", "alias", "lift_fresh"})

Rule = Callable[[Call], "list[Type] | Type"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register one function as the rule of the named ATen ops (`add` also stands for `add_`).

    Raises:
        ValueError: an op already has a rule.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} already has a rule: {RULES[name].__qualname__}")
            RULES[name] = function
        return function

    return register


def base_name(func: torch._ops.OpOverload) -> str:
    """The op's name without overload; an in-place op has the name of its functional twin."""
    name = func.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bound(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    out: dict[str, Any] = {}
    for i, spec in enumerate(func._schema.arguments):
        out[spec.name] = args[i] if i < len(args) else kwargs.get(spec.name, spec.default_value)
    return out


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _flat(v)
    else:
        yield value


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """The tensors inside nested tuples and lists."""
    return tuple(v for v in _flat(value) if isinstance(v, Tensor))


def numbers(args: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The integers and the floats among an op's arguments, in order."""
    flat = [v for v in _flat(list(args.values())) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return tuple(v for v in flat if isinstance(v, int)), tuple(v for v in flat if isinstance(v, float))


@contextmanager
def module_paths(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Inside: a function that tells the path of the innermost module of `model` that is running."""
    names = {id(m): path for path, m in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if id(module) in names:
            stack.append(names[id(module)])

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        if id(module) in names and stack:
            stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def running(model: nn.Module) -> Iterator[Callable[[], str]]:
    """The state in which models are traced: no gradients, no fused attention fast path; gives the module path."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield stack.enter_context(module_paths(model))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type != "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_on_meta(v) for v in value)
    return value


def execute(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op itself. A mix of meta and real arguments runs on meta; integers made on meta are made for real."""
    tensors = tensors_in([args, list(kwargs.values())])
    on_meta = any(t.device.type == "meta" for t in tensors)
    if on_meta and any(t.device.type != "meta" for t in tensors):
        args, kwargs = _on_meta(args), {k: _on_meta(v) for k, v in kwargs.items()}
    if not tensors and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        out = func(*args, **{**kwargs, "device": "cpu"})
        return out if not out.is_floating_point() else func(*args, **kwargs)
    return func(*args, **kwargs)


class Tracer(TorchDispatchMode):
    """Runs each op, asks its rule for types, and records both."""

    def __init__(self, names: Mapping[int, str], module: Callable[[], str]) -> None:
        super().__init__()
        self.trace = Trace()
        self._names = names
        self._module = module
        self._types: dict[int, Type] = {}
        self._alive: list[Tensor] = []

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
        if not tensor.is_floating_point():
            kind = Type(tuple(Fixed(n) for n in tensor.shape))
        else:
            dims = tuple(self.trace.solver.fresh(n) for n in tensor.shape)
            kind = Type(dims, isinstance(tensor, nn.Parameter), name, tuple(range(len(dims))))
        self.trace.params[name] = kind
        return kind

    def remember(self, tensor: Tensor, kind: Type) -> None:
        """Attach a type; the tensor is kept alive so that its identity is not reused."""
        self._types[id(tensor)] = kind
        self._alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = execute(func, args, kwargs)
        outputs = tensors_in(result)
        arguments = bound(func, args, kwargs)
        call = Call(self.trace, base_name(func), self._module(), arguments, outputs, self.type_of)
        kinds = self._apply(call, func)
        for tensor, kind in zip(outputs, kinds, strict=True):
            self.remember(tensor, kind)
        if call.name in UNRECORDED:
            return result
        ints, floats = numbers(arguments)
        inputs = tuple(t.dims for t in call.types())
        record = OpRecord(
            call.name, call.module, tuple(k.dims for k in kinds), tuple(t.dtype for t in outputs), inputs, ints, floats
        )
        self.trace.ops.append(record)
        return result

    def _apply(self, call: Call, func: torch._ops.OpOverload) -> list[Type]:
        if not any(not isinstance(d, Fixed) for t in call.types() for d in t.dims):
            return [Type(tuple(Fixed(n) for n in t.shape)) for t in call.outputs]
        function = RULES.get(call.name)
        if function is None and torch.Tag.pointwise in func.tags:
            function = RULES["pointwise"]
        if function is None:
            return self._unknown(call)
        kinds = function(call)
        return [kinds] if isinstance(kinds, Type) else kinds

    def _unknown(self, call: Call) -> list[Type]:
        self.trace.unknown.setdefault(call.name, call.module)
        for kind in call.types():
            call.freeze(kind.dims, f"{call.name} has no rule, in {call.module or 'the model'}")
        return [Type(tuple(Fixed(n) for n in t.shape)) for t in call.outputs]
