"""A cut on shapes only, before any is offered: which integers in Python code must follow, and which cannot.

Every group is given another size (a larger one, so that no axis becomes one and no other code path opens), the model
is rebuilt with those shapes on the meta device and run op by op beside the trace. Where an op does not give the shape
that the types predict, a number in Python stands in the way: an attribute of the calling module that holds it is made
to follow; where there is none, the groups involved are frozen, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.batch import call, device_of
from ..core.dims import Atom, Concat, Dim, Fixed, Product, atoms, concat, kept, product, size, substitute
from .mend import apply_edits, matching_attributes
from .run import execute, place, running, tensors_in
from .trace import UNRECORDED, OpRecord, Trace, base_name, bound, numbers
from .twin import meta_twin, named_tensors, shared_twin, twin

__all__ = ["rehearse"]

_ROUNDS = 8
_CALL = 6


class _Stop(Exception):
    """The run left the trace and cannot be followed further."""


@dataclass
class _Misses:
    """Where a rehearsal differed from the prediction: op numbers by cause."""

    shapes: list[int] = field(default_factory=list)
    factors: list[int] = field(default_factory=list)
    stopped: tuple[int, str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.shapes or self.factors or self.stopped)

    @property
    def first(self) -> float:
        """The number of the first op that went wrong; infinite where none did."""
        stopped = [self.stopped[0]] if self.stopped else []
        return min([*self.shapes, *self.factors, *stopped], default=math.inf)


class _Follower(TorchDispatchMode):
    """Runs beside a trace; where an op fails or gives another shape, notes it and goes on with the predicted one."""

    def __init__(self, ops: list[OpRecord], sized: Callable[[Dim], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self.misses = _Misses()
        self.at = 0
        self._ops = ops
        self._expected = [tuple(tuple(map(sized, dims)) for dims in op.dims) for op in ops]
        self._whole = [all(sized(d) == size(d) for dims in (*op.dims, *op.inputs) for d in dims) for op in ops]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if base_name(func) in UNRECORDED:
            return execute(func, args, kwargs)
        if self.at >= len(self._ops) or self._ops[self.at].name != base_name(func):
            raise _Stop(f"it calls {base_name(func)} where it did not before")
        number, self.at = self.at, self.at + 1
        record, expected = self._ops[number], self._expected[number]
        ints, factors = numbers(func, bound(func, args, kwargs))
        # An integer that changes where no size does is no size.
        if factors != record.factors or (self._whole[number] and ints != record.ints):
            self.misses.factors.append(number)
        try:
            result = execute(func, args, kwargs)
        except (RuntimeError, IndexError, ValueError):
            return self._instead(func, number)
        if tuple(tuple(t.shape) for t in tensors_in(result)) != expected:
            return self._instead(func, number)
        return result

    def finish(self) -> None:
        """Refuse a run that ended before the trace did."""
        if self.at < len(self._ops):
            raise _Stop(f"it ends before it calls {self._ops[self.at].name}")

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
    """Completes `trace.edits` and freezes, in `trace.solver`, the groups that no cut can reach through Python code.

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
            trace.edits.update(_needed(proposals, trace, lambda: _run(model, example_inputs, trace, real)))
        else:
            _give_up(trace, misses, tried)
    _give_up_everything(model, example_inputs, trace, real)


def _needed(proposals: dict[str, Dim], trace: Trace, run: Callable[[], _Misses]) -> dict[str, Dim]:
    """`proposals` without attributes that bring a run no further: steps or a shift can equal a width by chance.

    Doubted are only those that were proposed for the same dimension beside another; those of one name stand together.
    """
    dims = list(proposals.values())
    doubted = {key: dim for key, dim in proposals.items() if dims.count(dim) > 1}
    names = list(dict.fromkeys(map(_attribute, doubted)))
    if len(names) < 2:
        return proposals
    before = trace.edits

    def reached(edits: dict[str, Dim]) -> float:
        trace.edits = {**before, **edits}
        first = run().first
        trace.edits = before
        return first

    chosen = {key: dim for key, dim in proposals.items() if key not in doubted}
    furthest = start = reached(chosen)
    while names:
        more = {n: {**chosen, **{k: d for k, d in doubted.items() if _attribute(k) == n}} for n in names}
        far = {n: reached(edits) for n, edits in more.items()}
        best = max(names, key=far.__getitem__)
        if far[best] <= furthest:
            break
        chosen, furthest = more[best], far[best]
        names.remove(best)
    return chosen if furthest > start else proposals


def _attribute(key: str) -> str:
    return key.rpartition(".")[2]


def _give_up_everything(model: nn.Module, example_inputs: Any, trace: Trace, real: bool) -> None:
    while misses := _run(model, example_inputs, trace, real):
        if not _give_up(trace, misses, {}):
            return


def _counts(trace: Trace) -> dict[str, int]:
    """A larger size for every live atom; sizes of neighbours differ, so that one cannot pass for another."""
    live = {a.name: a.n for k in trace.params.values() for d in k.dims for a in atoms(trace.solver.resolve(d))}
    return {name: n + 1 + number % 11 for number, (name, n) in enumerate(live.items())}


def _run(model: nn.Module, example_inputs: Any, trace: Trace, real: bool) -> _Misses:
    counts = _counts(trace)
    if not counts:
        return _Misses()
    resolve = trace.solver.resolve
    shapes = {n: torch.Size(size(resolve(d), counts) for d in k.dims) for n, k in trace.params.items()}
    other = _grown(model, trace, counts) if real else meta_twin(model, shapes)
    apply_edits(other, {k: resolve(d) for k, d in trace.edits.items()}, counts)
    sized = cache(lambda dim: size(resolve(dim), counts))
    follower = _Follower(trace.ops, sized)
    with running(other):
        placed = place(example_inputs, device_of(model) if real else "meta")
        try:
            with follower:
                call(other, placed)
            follower.finish()
        except Exception as error:  # noqa: BLE001  (any failure of the model's own code is a finding, kept with its text)
            text = str(error) if isinstance(error, _Stop) else f"{type(error).__name__}: {error}"
            follower.misses.stopped = (max(follower.at - 1, 0), _raised_in(other, error), text)
    return follower.misses


def _raised_in(model: nn.Module, error: Exception) -> str:
    """The path of the innermost module whose code was running when `error` was raised."""
    paths = {id(m): path for path, m in model.named_modules()}
    owners = [id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)]
    return next((paths[owner] for owner in reversed(owners) if owner in paths), "")


def _grown(model: nn.Module, trace: Trace, counts: Mapping[str, int]) -> nn.Module:
    """A copy of the model on real tensors with `counts` units, of which the added ones are zero.

    It computes what the model computes, so that Python code that looks at values decides as it did in the trace.
    """
    other = shared_twin(model)
    larger = {name: Atom(name, n) for name, n in counts.items()}
    with torch.no_grad():
        grown: dict[str, Tensor] = {}
        for name, tensor in named_tensors(other):
            if name in trace.params:
                dims = [trace.solver.resolve(d) for d in trace.params[name].dims]
                own = {a.name: torch.arange(counts[a.name]) < a.n for d in dims for a in atoms(d)}
                # Statistics are divided by, so theirs are ones: what a zero weight follows is zero all the same.
                fill = 0.0 if isinstance(tensor, nn.Parameter) else 1.0
                grown[name] = _placed(tensor.detach(), [kept(substitute(d, larger), own) for d in dims], fill)
    return twin(other, grown)


def _placed(tensor: Tensor, own: list[Tensor], fill: float) -> Tensor:
    """`tensor` at the positions that `own` marks on each axis of a larger one, which is `fill` elsewhere."""
    if not own:
        return tensor.clone()
    larger = tensor.new_full([len(o) for o in own], fill)
    larger[torch.meshgrid(*(o.nonzero().flatten() for o in own), indexing="ij")] = tensor
    return larger


def _changed(trace: Trace, record: OpRecord) -> list[Dim]:
    """The dimensions around an op that a cut changes, with the prefixes of concatenations (slices start there)."""
    out: list[Dim] = []
    for dims in (*record.dims, *record.inputs):
        for dim in dims:
            resolved = trace.solver.resolve(dim)
            prefixes = (
                [concat(*resolved.parts[:i]) for i in range(1, len(resolved.parts))]
                if isinstance(resolved, Concat)
                else []
            )
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
        # One call in Python may be several ops, of which the last has the dimension that was refused.
        nearby = _inside(trace.ops[: number + _CALL], path)
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
    for number in (*misses.shapes, *misses.factors):
        frozen |= _freeze(trace, [trace.ops[number]], _reason(trace, misses, number))
    if not frozen:
        path, why = _origin(trace, misses)
        frozen = any(_freeze(trace, _inside(trace.ops, holder), why) for holder in _chain(path))
    for key in [k for k, d in trace.edits.items() if k in tried and isinstance(trace.solver.resolve(d), Fixed)]:
        del trace.edits[key]
    return frozen


def _reason(trace: Trace, misses: _Misses, number: int) -> str:
    what = "a factor computed from its size" if number in misses.factors else "a number in the code fixes its size"
    return f"{what}: {trace.ops[number].name} in {trace.ops[number].module or 'the model'}"


def _origin(trace: Trace, misses: _Misses) -> tuple[str, str]:
    """The module where a rehearsal went wrong, and what went wrong."""
    if misses.stopped:
        _, path, text = misses.stopped
        return path, f"{path or 'the model'} does not run at another size: {text}"
    number = (misses.shapes + misses.factors)[0]
    return trace.ops[number].module, _reason(trace, misses, number)


def _inside(ops: list[OpRecord], path: str) -> list[OpRecord]:
    """Those of `ops` that a module and those inside it called."""
    return [op for op in ops if not path or op.module == path or op.module.startswith(f"{path}.")]


def _freeze(trace: Trace, records: list[OpRecord], why: str) -> bool:
    live = [
        d
        for op in records
        for dims in (*op.dims, *op.inputs)
        for d in dims
        if any(True for _ in atoms(trace.solver.resolve(d)))
    ]
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
            factors: list[Dim] = list(resolved.factors) if isinstance(resolved, Product) else [resolved]
            tail = [f for f in factors if not isinstance(f, Fixed)]
            if not tail:
                continue
            first = factors.index(tail[0])
            out.extend(d for d in (product(*factors[first:]), tail[0]) if d not in out)
    return out
