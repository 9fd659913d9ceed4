"""A cut on shapes only, before any is offered: which integers in Python code must follow, and which cannot.

Every group is given another size (a larger one, so that no axis becomes one and no other code path opens), the model
is rebuilt with those shapes on the meta device and run op by op beside the trace. Where an op does not give the shape
that the types predict, a number in Python stands in the way: an attribute of the calling module that holds it is made
to follow; where there is none, the groups involved are frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.batch import call
from ..core.dims import Concat, Dim, Fixed, Product, atoms, concat, product, size
from .mend import apply_edits, matching_attributes
from .trace import UNRECORDED, OpRecord, Trace, base_name, bound, execute, numbers, running, tensors_in
from .twin import meta_twin, named_tensors, shared_twin, twin

__all__ = ["rehearse"]

_ROUNDS = 8


class _Stop(Exception):
    """The run left the trace and cannot be followed further."""


@dataclass
class _Misses:
    """Where a rehearsal differed from the prediction: op numbers by cause."""

    shapes: list[int] = field(default_factory=list)
    floats: list[int] = field(default_factory=list)
    stopped: tuple[int, str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.shapes or self.floats or self.stopped)


class _Follower(TorchDispatchMode):
    """Runs beside a trace; where an op fails or gives another shape, notes it and goes on with the predicted one."""

    def __init__(self, ops: list[OpRecord], expected: list[tuple[tuple[int, ...], ...]]) -> None:
        super().__init__()
        self.misses = _Misses()
        self.at = 0
        self._ops, self._expected = ops, expected

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if base_name(func) in UNRECORDED:
            return execute(func, args, kwargs)
        if self.at >= len(self._ops) or self._ops[self.at].name != base_name(func):
            raise _Stop(f"it calls {base_name(func)} where it did not before")
        number, self.at = self.at, self.at + 1
        record, expected = self._ops[number], self._expected[number]
        if numbers(bound(func, args, kwargs))[1] != record.floats:
            self.misses.floats.append(number)
        try:
            result = execute(func, args, kwargs)
        except (RuntimeError, IndexError, ValueError):
            return self._instead(func, number)
        if tuple(tuple(t.shape) for t in tensors_in(result)) != expected:
            return self._instead(func, number)
        return result

    def _instead(self, func: Any, number: int) -> Any:
        self.misses.shapes.append(number)
        made = [
            torch.empty(shape, dtype=dtype, device="meta")
            for shape, dtype in zip(self._expected[number], self._ops[number].dtypes, strict=True)
        ]
        returns = func._schema.returns
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            raise _Stop(f"an in-place op of another shape: {self._ops[number].name}")
        if len(returns) == 1:
            return made[0] if str(returns[0].type) == "Tensor" else made
        return tuple(made)


def rehearse(model: nn.Module, example_inputs: Any, trace: Trace, *, real: bool) -> None:
    """Completes `trace.edits` and freezes, in `trace.solver`, the groups that cannot be cut without breaking Python code.

    Args:
        real: the trace ran on real tensors, so the rehearsal must too.
    """
    tried: dict[str, list[Dim]] = {}
    trace.edits.update(_head_counts(model, trace))
    for _ in range(_ROUNDS):
        misses = _run(model, example_inputs, trace, real)
        if not misses:
            return
        proposals = _proposals(model, trace, misses, tried)
        if proposals:
            trace.edits.update(proposals)
        else:
            _give_up(trace, misses, tried)
    _give_up_everything(model, example_inputs, trace, real)


def _give_up_everything(model: nn.Module, example_inputs: Any, trace: Trace, real: bool) -> None:
    while misses := _run(model, example_inputs, trace, real):
        if not _give_up(trace, misses, {}):
            return


def _counts(trace: Trace) -> dict[str, int]:
    """A larger size for every live atom; sizes of neighbours differ, so that one cannot pass for another."""
    live = {a.name: a.n for k in trace.params.values() for d in k.dims for a in atoms(trace.solver.resolve(d))}
    return {name: n + 1 + number % 11 for number, (name, n) in enumerate(live.items())}


def _run(model: nn.Module, example_inputs: Any, trace: Trace, real: bool) -> _Misses:
    from .structure import place

    counts = _counts(trace)
    if not counts:
        return _Misses()
    resolve = trace.solver.resolve
    shapes = {n: torch.Size(size(resolve(d), counts) for d in k.dims) for n, k in trace.params.items()}
    other = _grown(model, trace, shapes) if real else meta_twin(model, shapes)
    apply_edits(other, {k: resolve(d) for k, d in trace.edits.items()}, counts)
    known: dict[Dim, int] = {}

    def sized(dim: Dim) -> int:
        if dim not in known:
            known[dim] = size(resolve(dim), counts)
        return known[dim]

    expected = [tuple(tuple(sized(d) for d in dims) for dims in op.dims) for op in trace.ops]
    follower = _Follower(trace.ops, expected)
    device = next((t.device for _, t in namedtensors_in(model)), "cpu") if real else "meta"
    with running(other) as module:
        placed = place(example_inputs, device)
        last = _Last(module)
        try:
            with follower, last:
                call(other, placed)
        except Exception as error:  # noqa: BLE001  (any failure of the model's own code is a finding, kept with its text)
            follower.misses.stopped = (max(follower.at - 1, 0), last.path, f"{type(error).__name__}: {error}")
    return follower.misses


class _Last:
    """Remembers the innermost module that was running when the block was left."""

    def __init__(self, module: Callable[[], str]) -> None:
        self._module = module
        self.path = ""

    def __enter__(self) -> _Last:
        return self

    def __exit__(self, *_: object) -> None:
        self.path = self._module()


def _grown(model: nn.Module, trace: Trace, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """A copy of the model on real tensors of the given shapes, filled by repeating the original's positions."""
    other = shared_twin(model)

    def grow(tensor: Tensor, shape: torch.Size) -> Tensor:
        for axis, n in enumerate(shape):
            tensor = tensor.index_select(axis, torch.arange(n, device=tensor.device) % max(tensor.shape[axis], 1))
        return tensor

    with torch.no_grad():
        grown = {n: grow(t.detach(), shapes[n]) for n, t in namedtensors_in(other) if n in shapes}
    return twin(other, grown)


def _changed(trace: Trace, record: OpRecord) -> list[Dim]:
    """The dimensions around an op that a cut changes, with the prefixes of concatenations (slices start there)."""
    out: list[Dim] = []
    for dims in (*record.dims, *record.inputs):
        for dim in dims:
            resolved = trace.solver.resolve(dim)
            prefixes = [concat(*resolved.parts[:i]) for i in range(1, len(resolved.parts))] if isinstance(resolved, Concat) else []
            inner = list(resolved.factors) if isinstance(resolved, Product) else []
            out.extend(d for d in (resolved, *prefixes, *inner) if any(True for _ in atoms(d)) and d not in out)
    return out


def _proposals(model: nn.Module, trace: Trace, misses: _Misses, tried: dict[str, list[Dim]]) -> dict[str, Dim]:
    """New values for attributes of the modules that called the ops that missed."""
    proposals: dict[str, Dim] = {}
    for number in misses.shapes:
        record = trace.ops[number]
        changed = _changed(trace, record)
        wanted = [d for d in changed if size(d) in record.ints]
        proposals.update(_attributes(model, record.module, wanted, tried))
    if misses.stopped and not misses.shapes:
        number, path, _ = misses.stopped
        nearby = [op for op in trace.ops[: number + 2] if op.module == path or op.module.startswith(f"{path}.")]
        wanted = list(dict.fromkeys(d for op in nearby for d in _changed(trace, op)))
        proposals.update(_attributes(model, path, wanted, tried))
    return proposals


def _attributes(model: nn.Module, path: str, wanted: list[Dim], tried: dict[str, list[Dim]]) -> dict[str, Dim]:
    found: dict[str, Dim] = {}
    for dim in wanted:
        for holder in _chain(path):
            names = matching_attributes(model.get_submodule(holder), size(dim))
            for name in names:
                key = f"{holder}.{name}" if holder else name
                if dim not in tried.setdefault(key, []) and key not in found:
                    tried[key].append(dim)
                    found[key] = dim
            if names:
                break
    return found


def _chain(path: str) -> list[str]:
    """The module, its parent, and so on to the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _give_up(trace: Trace, misses: _Misses, tried: dict[str, list[Dim]]) -> bool:
    """Freeze what the missed ops touch; whether anything was left to freeze."""
    frozen = False
    for number in (*misses.shapes, *misses.floats):
        record = trace.ops[number]
        what = "a factor computed from its size" if number in misses.floats else "a number in the code fixes its size"
        frozen |= _freeze(trace, [record], f"{what}: {record.name} in {record.module or 'the model'}")
    if misses.stopped and not frozen:
        number, path, text = misses.stopped
        ops = [op for op in trace.ops if op.module == path or op.module.startswith(f"{path}.") or not path]
        frozen |= _freeze(trace, ops, f"{path or 'the model'} does not run at another size: {text}")
    for key in [k for k, d in trace.edits.items() if k in tried and isinstance(trace.solver.resolve(d), Fixed)]:
        del trace.edits[key]
    return frozen


def _freeze(trace: Trace, records: list[OpRecord], why: str) -> bool:
    live = [d for op in records for dims in (*op.dims, *op.inputs) for d in dims if any(True for _ in atoms(trace.solver.resolve(d)))]
    for dim in live:
        trace.solver.freeze(dim, why)
    return bool(live)


def _head_counts(model: nn.Module, trace: Trace) -> dict[str, Dim]:
    """Attributes called like head counts that equal one: nothing may fail without them, but they must not lie."""
    edits: dict[str, Dim] = {}
    for record in trace.ops:
        if record.name not in ("bmm", "baddbmm") and "attention" not in record.name:
            continue
        for dim in _head_dims(trace, record):
            for holder in _chain(record.module)[:2]:
                for name in matching_attributes(model.get_submodule(holder), size(dim)):
                    if "head" in name and "dim" not in name and "size" not in name:
                        edits[f"{holder}.{name}" if holder else name] = dim
    return edits


def _head_dims(trace: Trace, record: OpRecord) -> list[Dim]:
    out: list[Dim] = []
    for dims in record.inputs:
        for dim in dims[:2]:
            resolved = trace.solver.resolve(dim)
            factors = list(resolved.factors) if isinstance(resolved, Product) else [resolved]
            tail = [f for f in factors if not isinstance(f, Fixed)]
            if not tail:
                continue
            first = factors.index(tail[0])
            out.extend(d for d in (product(*factors[first:]), tail[0]) if d not in out)
    return out
