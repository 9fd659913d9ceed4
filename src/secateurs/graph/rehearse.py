"""A cut on shapes only, before any is offered: which integers in Python code must follow, and which cannot.

Every group is given another size (a larger one, so that no axis becomes one and no other code path opens), the model
is rebuilt with those shapes on the meta device and run op by op beside the trace. Where an op does not give the shape
that the types predict, a number in Python stands in the way: an attribute of the calling module that holds it is made
to follow; where there is none, the groups involved are frozen, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import device_of
from ..core.dims import Atom, Concat, Dim, Fixed, Product, atoms, concat, kept, product, size, substitute
from .follower import Misses, follow
from .mend import apply_edits, matching_attributes
from .records import OpRecord
from .run import place
from .trace import Trace
from .twin import named_tensors, set_mode, shared_twin, twin

__all__ = ["rehearse"]

_ROUNDS = 8
_CALL = 6

_Found = list[tuple[Trace, Misses]]


def rehearse(model: nn.Module, example_inputs: Any, traces: Sequence[Trace]) -> frozenset[str]:
    """Completes `edits` of the traces and freezes, in their solver, the groups that no cut can reach through Python.

    Args:
        traces: of runs of the model that share their types.

    Returns:
        the paths of the modules whose code stood in the way.
    """
    blamed: set[str] = set()
    tried: dict[str, list[Dim]] = {}
    edits = traces[0].edits

    stages = [_Stage(model, example_inputs, trace) for trace in traces]

    def run() -> _Found:
        found = [(stage.trace, stage.run()) for stage in stages]
        return [(trace, misses) for trace, misses in found if misses]

    for trace in traces:
        edits.update(_head_counts(model, trace) | _expert_counts(model, trace))
    for _ in range(_ROUNDS):
        if not (found := run()):
            _drop_idle(edits, tried, run)
            return frozenset(blamed)
        if equal := _equal_parts(found):
            for one, other, why in equal:
                traces[0].solver.unify(one, other, why)
            continue
        proposals: dict[str, Dim] = {}
        for trace, misses in found:
            proposals.update(_proposals(model, trace, misses, tried))
        if proposals:
            edits.update(_needed(proposals, edits, run))
        elif ties := _ties(model, found):
            for one, other, why in ties:
                traces[0].solver.unify(one, other, why)
        else:
            blamed |= _blamed(found)
            _give_up_all(found, tried)
    while (found := run()) and _give_up_all(found, {}):
        blamed |= _blamed(found)
    _drop_idle(edits, tried, run)
    return frozenset(blamed)


def _drop_idle(edits: dict[str, Dim], tried: Iterable[str], run: Callable[[], _Found]) -> None:
    """Take back what was proposed and is not needed after all: an attribute that equals a width by chance must stay."""
    proposed = [key for key in tried if key in edits]
    for name in dict.fromkeys(key.rpartition(".")[2] for key in proposed):
        some = {key: edits.pop(key) for key in proposed if key.rpartition(".")[2] == name}
        if run():
            edits.update(some)


def _needed(proposals: dict[str, Dim], edits: dict[str, Dim], run: Callable[[], _Found]) -> dict[str, Dim]:
    """`proposals` without attributes that mend nothing: steps or a shift can equal a width by chance.

    Doubted are those of one module that were proposed for the same dimension. They are tried one after the other, in
    all modules side by side, and taken where the module misses less; where none helps alone, all are.
    """
    rivals = Counter((_holder(key), dim) for key, dim in proposals.items())
    doubted: dict[str, list[str]] = {}
    for key in (key for key, dim in proposals.items() if rivals[_holder(key), dim] > 1):
        doubted.setdefault(_holder(key), []).append(key)
    taken = [key for key in proposals if key not in doubted.get(_holder(key), ())]
    before = dict(edits)

    def left(chosen: Iterable[str]) -> dict[str, int]:
        edits.update({key: proposals[key] for key in chosen})
        missed = _missed_in(run(), doubted)
        edits.clear()
        edits.update(before)
        return missed

    missed = left(taken) if doubted else {}
    for turn in range(max(map(len, doubted.values()), default=0)):
        guess = {holder: keys[turn] for holder, keys in doubted.items() if turn < len(keys) and missed[holder]}
        now = left([*taken, *guess.values()]) if guess else {}
        taken += [key for holder, key in guess.items() if now[holder] < missed[holder]]
        missed |= {holder: min(missed[holder], now[holder]) for holder in guess}
    helpless = [h for h, keys in doubted.items() if missed[h] and not set(keys) & set(taken)]
    return {key: proposals[key] for key in [*taken, *(key for holder in helpless for key in doubted[holder])]}


def _holder(key: str) -> str:
    return key.rpartition(".")[0]


def _missed_in(found: _Found, holders: Iterable[str]) -> dict[str, int]:
    """How often each module, with those inside it, missed."""
    paths = [trace.ops[number].module for trace, misses in found for number in misses.missed]
    paths += [path for _, misses in found for _, path, _ in misses.stops]
    return {h: sum(not h or p == h or p.startswith(f"{h}.") for p in paths) for h in holders}


def _blamed(found: _Found) -> set[str]:
    ops = {trace.ops[number].module for trace, misses in found for number in misses.missed}
    return ops | {path for _, misses in found for _, path, _ in misses.stops}


def _give_up_all(found: _Found, tried: dict[str, list[Dim]]) -> bool:
    given_up = [_give_up(trace, misses, tried) for trace, misses in found]
    return any(given_up)


def _counts(trace: Trace) -> dict[str, int]:
    """A larger size for every live atom, such that one, or a sum of some, seldom passes for another by chance.

    Real tensors grow less, since they are computed with.
    """
    live = {a.name: a.n for k in trace.params.values() for d in k.dims for a in atoms(trace.solver.resolve(d))}
    steps, spread = trace.multiples(), 11 if trace.real else 101
    return {name: n + steps.get(name, 1) * (1 + 37 * number % spread) for number, (name, n) in enumerate(live.items())}


class _Stage:
    """A copy of the model at larger sizes. On shapes it is the one that was traced: copying takes longer than a run."""

    def __init__(self, model: nn.Module, example_inputs: Any, trace: Trace) -> None:
        self.trace = trace
        self._model = model
        self._inputs = example_inputs
        self._counts: dict[str, int] = {}
        self._edited: dict[str, Dim] = {}
        self._copy = model

    def run(self) -> Misses:
        """Where the copy, with the trace's edits as they are now, does not do what the types predict."""
        trace, resolve, counts = self.trace, self.trace.solver.resolve, _counts(self.trace)
        if not counts:
            return Misses()
        if counts != self._counts or trace.real:
            self._copy, self._counts, self._edited = self._larger(counts), counts, {}
        apply_edits(self._copy, self._edited, {})
        self._edited = {key: resolve(dim) for key, dim in trace.edits.items()}
        apply_edits(self._copy, self._edited, counts)
        placed = place(self._inputs, device_of(self._model) if trace.real else "meta")
        return follow(self._copy, placed, trace, cache(lambda dim: size(resolve(dim), counts)))

    def _larger(self, counts: Mapping[str, int]) -> nn.Module:
        trace, resolve = self.trace, self.trace.solver.resolve
        if trace.real or trace.copy is None:
            return set_mode(_grown(self._model, trace, counts), trace.training)
        apply_edits(trace.copy, self._edited, {})
        for name, tensor in named_tensors(trace.copy):
            if name in trace.params and tensor.is_meta:
                shape = [size(resolve(dim), counts) for dim in trace.params[name].dims]
                tensor.data = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return trace.copy


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


def _proposals(model: nn.Module, trace: Trace, misses: Misses, tried: dict[str, list[Dim]]) -> dict[str, Dim]:
    """New values for attributes of the modules that called the ops that missed."""
    proposals: dict[str, Dim] = {}
    for number in misses.shapes:
        record = trace.ops[number]
        placed = _placed_numbers(model, record, trace.solver.resolve)
        new = {key: dim for key, dim in placed.items() if dim not in tried.setdefault(key, [])}
        for key, dim in new.items():
            tried[key].append(dim)
        wanted = [d for d in _changed(trace, record) if size(d) in record.ints]
        proposals.update(new if placed else _attributes(model, record.module, wanted, tried))
    for number, path, _ in misses.stops:
        if any(trace.ops[missed].module == path for missed in misses.shapes):
            continue
        # One call in Python may be several ops, of which the last has the dimension that was refused.
        nearby = _inside(trace.ops[: number + _CALL], path)
        wanted = list(dict.fromkeys(d for op in nearby for d in _changed(trace, op)))
        proposals.update(_attributes(model, path, wanted, tried))
    return proposals


def _placed_numbers(model: nn.Module, record: OpRecord, resolve: Callable[[Dim], Dim]) -> dict[str, Dim]:
    """For a recorded call, its integers whose place in the call says what they equal."""
    numbers = getattr(model.get_submodule(record.module), "numbers", ())
    if not record.slots or numbers != record.ints[: len(numbers)]:
        return {}
    return {f"{record.module}.numbers[{i}]": resolve(dim) for i, dim in record.slots.items() if i < len(numbers)}


def _equal_parts(found: _Found) -> list[tuple[Dim, Dim, str]]:
    """Parts of equal size into which Python split an axis, so that they can only shrink alike, as those of `chunk`."""
    ties: list[tuple[Dim, Dim, str]] = []
    for trace, misses in found:
        for record in (trace.ops[number] for number in misses.shapes if trace.ops[number].name == "split"):
            for first, *others in zip(*(map(trace.solver.resolve, part) for part in record.dims), strict=True):
                equal = [dim for dim in others if dim != first and size(dim) == size(first)]
                ties += [(first, dim, f"equal parts in {record.module}") for dim in equal]
    return ties


def _ties(model: nn.Module, found: _Found) -> list[tuple[Dim, Dim, str]]:
    """Dimensions that one attribute already follows, and others that it would have to follow as well."""
    ties: list[tuple[Dim, Dim, str]] = []
    for trace, misses in found:
        for record in (trace.ops[number] for number in misses.shapes):
            for dim in (d for d in _changed(trace, record) if size(d) in record.ints):
                for key in _holding(model, record.module, size(dim)):
                    other = trace.solver.resolve(trace.edits.get(key, dim))
                    ties += [(other, dim, f"{key} holds both")] if other != dim else []
    return ties


def _holding(model: nn.Module, path: str, value: int) -> list[str]:
    """The attributes with an integer, of the module or of the nearest around it that has one."""
    for holder in _chain(path):
        if names := matching_attributes(model.get_submodule(holder), value):
            return [f"{holder}.{name}" if holder else name for name in names]
    return []


def _attributes(model: nn.Module, path: str, wanted: list[Dim], tried: dict[str, list[Dim]]) -> dict[str, Dim]:
    found: dict[str, Dim] = {}
    for dim in wanted:
        for key in _holding(model, path, size(dim)):
            if dim not in tried.setdefault(key, []) and key not in found:
                tried[key].append(dim)
                found[key] = dim
    return found


def _chain(path: str) -> list[str]:
    """The module, its parent, and so on to the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _give_up(trace: Trace, misses: Misses, tried: dict[str, list[Dim]]) -> bool:
    """Freeze what the missed ops and the modules that failed touch; whether anything was left to freeze."""
    frozen = [trace.ops[n] for n in misses.missed if _freeze(trace, [trace.ops[n]], _reason(trace, misses, n))]
    for _, path, text in misses.stops:
        # What failed after an op had missed may have failed for that.
        if not _inside(frozen, path) and _freeze(trace, inside := _inside(trace.ops, path), _stopped(path, text)):
            frozen += inside
    if not frozen:
        path, why = _first(trace, misses)
        frozen = next((ops for holder in _chain(path) if _freeze(trace, ops := _inside(trace.ops, holder), why)), [])
    for key in [k for k, d in trace.edits.items() if k in tried and isinstance(trace.solver.resolve(d), Fixed)]:
        del trace.edits[key]
    return bool(frozen)


def _first(trace: Trace, misses: Misses) -> tuple[str, str]:
    """Where a run first went wrong, and why."""
    if not misses.missed:
        _, path, text = misses.stops[0]
        return path, _stopped(path, text)
    number = misses.missed[0]
    return trace.ops[number].module, _reason(trace, misses, number)


def _stopped(path: str, text: str) -> str:
    return f"{path or 'the model'} does not run at another size: {text}"


def _reason(trace: Trace, misses: Misses, number: int) -> str:
    what = "a factor computed from its size" if number in misses.factors else "a number in the code fixes its size"
    return f"{what}: {trace.ops[number].name} in {trace.ops[number].module or 'the model'}"


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


# Of the names of attributes that count experts, but not all of a router's.
_OTHER_EXPERTS = ("tok", "top", "shared", "active", "select")


def _expert_counts(model: nn.Module, trace: Trace) -> dict[str, Dim]:
    """Attributes called like the number of experts, beside tensors of as many, that equal it: they must not lie."""
    resolve = trace.solver.resolve
    chosen = {dim for dim in (resolve(c.dim) for c in trace.chosen) if any(True for _ in atoms(dim))}
    carried = [(tensor, resolve(dim)) for tensor, kind in trace.params.items() for dim in kind.dims]
    edits: dict[str, Dim] = {}
    for tensor, dim in ((tensor, dim) for tensor, dim in carried if dim in chosen):
        for holder in _chain(tensor.rpartition(".")[0])[:2]:
            for name in matching_attributes(model.get_submodule(holder), size(dim)):
                if "experts" in name and not any(word in name for word in _OTHER_EXPERTS):
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
