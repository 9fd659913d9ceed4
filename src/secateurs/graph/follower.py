"""A run of a model at other sizes, op by op beside its trace: where its Python code does not follow, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from traceback import walk_tb
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..core.batch import call, device_of
from ..core.dims import Dim, size
from .ops import UNRECORDED, base_name, bound, numbers
from .records import Seen, Span
from .run import execute, running, tensors_in
from .trace import Trace
from .twin import unchanged

__all__ = ["Misses", "follow"]


class _Stop(Exception):
    """The run left the trace and cannot be followed further."""


@dataclass
class Misses:
    """Where a run differed from its prediction: numbers of ops by cause, and where Python code failed and how."""

    shapes: list[int] = field(default_factory=list)
    factors: list[int] = field(default_factory=list)
    stops: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def missed(self) -> list[int]:
        """The ops that gave another shape or were given another factor."""
        return [*self.shapes, *self.factors]

    def __len__(self) -> int:
        return len(self.shapes) + len(self.factors) + len(self.stops)


def follow(model: nn.Module, inputs: Any, trace: Trace, sized: Callable[[Dim], int]) -> Misses:
    """Where `model`, whose tensors have other sizes than when `trace` was recorded, does not do what types predict.

    Modules of PyTorch that take all sizes from their tensors are not run: what they return is known. A module whose
    code fails is noted, and the run goes on with what it should have returned. On real tensors, of which Python may
    read values, everything is run and the first failure is the last.

    Args:
        inputs: on the device of the run.
        sized: the size that the types predict for a dimension.
    """
    follower = _Follower(trace, sized, device_of(model))
    # What a hook does after the forward is of the span, too: such a module fails as a part of the one around it.
    calm = {p: m for p, m in model.named_modules() if p in trace.spans and not m._forward_hooks}
    guarded = {} if trace.real else calm
    with unchanged(model), running(model):
        for path, module in guarded.items():
            _guard(model, path, module, follower)
        try:
            with follower:
                call(model, inputs)
            follower.arrive(len(trace.ops))
        except Exception as error:  # noqa: BLE001  (any failure of the model's own code is a finding, kept with its text)
            follower.note(model, error)
    return follower.misses


class _Follower(TorchDispatchMode):
    """Compares each op with the recorded one; where it fails or gives another shape, goes on with the predicted one."""

    def __init__(self, trace: Trace, sized: Callable[[Dim], int], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self.misses = Misses()
        self._device = device
        self.at = 0
        self.trace = trace
        self._sized = sized
        self._making = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._making:
            return func(*args, **kwargs)
        name = base_name(func)
        if name in UNRECORDED:
            return execute(func, args, kwargs)
        ops = self.trace.ops
        if self.at >= len(ops) or _plain(ops[self.at].name) != _plain(name):
            raise _Stop(f"it calls {name} where it did not before")
        number, self.at = self.at, self.at + 1
        record = ops[number]
        ints, factors = numbers(func, bound(func, args, kwargs))
        # An integer that changes where no size does is no size.
        if factors != record.factors or (_differ(ints, record.ints) and self._whole(number)):
            self.misses.factors.append(number)
        expected = tuple(self._shape(dims) for dims in record.dims)
        try:
            result = execute(func, args, kwargs)
        except (RuntimeError, IndexError, ValueError):
            return self._instead(func, number, expected)
        if tuple(tuple(t.shape) for t in tensors_in(result)) != expected:
            return self._instead(func, number, expected)
        return result

    def _shape(self, dims: Iterable[Dim]) -> tuple[int, ...]:
        return tuple(map(self._sized, dims))

    def _whole(self, number: int) -> bool:
        record = self.trace.ops[number]
        return all(self._sized(d) == size(d) for dims in (*record.dims, *record.inputs) for d in dims)

    def arrive(self, stop: int) -> None:
        """Refuse a call that ended before its trace did."""
        if self.at < stop:
            raise _Stop(f"it ends before it calls {self.trace.ops[self.at].name}")

    def note(self, model: nn.Module, error: Exception) -> None:
        """Keep where the model's code failed: the op it had reached, the module, and the text."""
        text = str(error) if isinstance(error, _Stop) else f"{type(error).__name__}: {error}"
        self.misses.stops.append((max(self.at - 1, 0), _raised_in(model, error), text))

    def returned(self, span: Span) -> Any:
        """What a call should return, and the run goes on after it."""
        self.at = span.stop

        def made(value: Any) -> Any:
            if not isinstance(value, Seen):
                return value
            return torch.empty(self._shape(value.dims), dtype=value.dtype, device="meta")

        self._making = True
        try:
            return tree_map(made, span.output)
        finally:
            self._making = False

    def _instead(self, func: Any, number: int, expected: tuple[tuple[int, ...], ...]) -> Any:
        self.misses.shapes.append(number)
        dtypes = self.trace.ops[number].dtypes
        # Where everything is run, it goes on with zeros in the place of shapes.
        device = self._device if self.trace.real else "meta"
        made = [torch.zeros(s, dtype=d, device=device) for s, d in zip(expected, dtypes, strict=True)]
        returns = func._schema.returns
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            raise _Stop(f"an in-place op of another shape: {self.trace.ops[number].name}")
        if len(returns) == 1:
            return made[0] if str(returns[0].type) == "Tensor" else made
        return tuple(made)


def _plain(name: str) -> str:
    """The op's name; which of the views a reshape becomes depends on strides."""
    return "view" if name in ("_unsafe_view", "_reshape_alias") else name


def _differ(ints: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two calls say different sizes; -1 says none, and whether it is filled in depends on strides."""
    return len(ints) != len(others) or any(a != b and -1 not in (a, b) for a, b in zip(ints, others, strict=True))


def _guard(model: nn.Module, path: str, module: nn.Module, follower: _Follower) -> None:
    """Give `module` a forward that skips what is known and survives a failure."""
    forward, spans, known = module.forward, iter(follower.trace.spans[path]), _sizeless(module)

    @wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        span = next(spans, None)
        if span is None or span.output is None:
            return forward(*args, **kwargs)
        if known and follower.at == span.start:
            return follower.returned(span)
        try:
            output = forward(*args, **kwargs)
            follower.arrive(span.stop)
        except Exception as error:  # noqa: BLE001  (any failure of the model's own code is a finding, kept with its text)
            follower.note(model, error)
            return follower.returned(span)
        return output

    module.forward = guarded


# Modules of these files take every size that a cut can change from their tensors, or from integers that mend knows.
_SIZELESS = (
    "linear", "conv", "batchnorm", "instancenorm", "pooling", "dropout", "sparse", "container",
)  # fmt: skip


def _sizeless(module: nn.Module) -> bool:
    """Whether a module of PyTorch's needs no rehearsal: no code of a user's, and none that hard-wires sizes."""
    package, _, file = type(module).__module__.rpartition(".")
    plain = file in _SIZELESS or file == ("activation" if next(module.parameters(), None) is None else "normalization")
    hooked = module._forward_hooks or module._forward_pre_hooks
    return package == "torch.nn.modules" and plain and not hooked and all(map(_sizeless, module.children()))


def _raised_in(model: nn.Module, error: Exception) -> str:
    """The path of the innermost module whose code was running when `error` was raised."""
    paths = {id(m): path for path, m in model.named_modules()}
    # The first argument of a method is its owner, whatever it is called.
    firsts = [(frame.f_code.co_varnames[:1], frame.f_locals) for frame, _ in walk_tb(error.__traceback__)]
    owners = [id(held.get(name)) for names, held in firsts for name in names]
    return next((paths[owner] for owner in reversed(owners) if owner in paths), "")
