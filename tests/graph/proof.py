"""The proof of a rule: the op on sliced inputs gives the slice, by the types, of the op on whole inputs.

Units are removed at random. Inputs that are parameters are zero where a unit went, as in a masked model; other inputs
keep arbitrary values there. For the atoms that a rule has no doubts about, slicing first and slicing last must agree,
and where a type claims zeros there must be zeros; for the others the shapes must be as the types say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import secateurs.graph.tracing  # noqa: F401  (registers the rules)
from secateurs.core.dims import Dim, Fixed, atoms, kept, size
from secateurs.graph.ops import base_name, bound
from secateurs.graph.records import Type
from secateurs.graph.trace import Call
from secateurs.graph.tracer import Tracer

__all__ = ["Recorder", "Run", "prove_op"]


@dataclass(frozen=True)
class Step:
    """One op of a run, with the types of its outputs at that time."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Type, ...]
    outputs: tuple[Tensor, ...]
    types: tuple[Type, ...]


class Recorder(Tracer):
    """A tracer that can run its ops again."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__(names, lambda: "")
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors(list(bound(func, args, kwargs or {}).values())))
        before = tuple(self.type_of(t) for t in given)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        out = tuple(_tensors(result))
        self.steps.append(Step(func, args, kwargs or {}, before, out, tuple(self.type_of(t) for t in out)))
        return result


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda v: found.append(v) if isinstance(v, Tensor) else None, value)
    return found


@dataclass
class Run:
    """What tracing a function of some tensors found."""

    recorder: Recorder
    inputs: list[Tensor]
    rules: set[str] = field(default_factory=set)

    def live(self) -> dict[str, int]:
        """Atoms of the inputs that can go, and their sizes."""
        solver = self.recorder.trace.solver
        kinds = self.recorder.trace.params.values()
        return {a.name: a.n for k in kinds for d in k.dims for a in atoms(solver.resolve(d))}

    def doubtful(self) -> set[str]:
        """Atoms whose removal differs from zeroing."""
        solver = self.recorder.trace.solver
        for flow in self.recorder._flows:
            for dim, why in flow.doubts:
                solver.entangle(dim, why)
        return {name for name in self.live() if solver.is_entangled(name)}


def trace(function: Callable[..., Any], inputs: Sequence[Tensor], zeroed: Sequence[bool]) -> Run:
    """`function` traced on copies of `inputs`, of which those in `zeroed` are parameters.

    Numbers in its code stay as they are: nobody here mends them.
    """
    own = [
        nn.Parameter(t.clone(), requires_grad=False) if z else t.clone() for t, z in zip(inputs, zeroed, strict=True)
    ]
    recorder = Recorder({id(t): f"p{i}" for i, t in enumerate(own)})
    with torch.no_grad(), _literal("free"), _literal("repeated"), recorder:
        function(*own)
    return Run(recorder, own, {base_name(s.func) for s in recorder.steps})


def _literal(name: str) -> Any:
    return mock.patch.object(Call, name, lambda _call, n: Fixed(n))


def prove_op(
    function: Callable[..., Any], inputs: Sequence[Tensor], zeroed: Sequence[bool], *, seed: int = 0, least: int = 1
) -> Run:
    """Assert that every op that `function` calls has a correct rule; what the trace found.

    Args:
        zeroed: for each input whether its entries are zero where a unit went.
        least: fewest units that stay of each atom.
    """
    run = trace(function, inputs, zeroed)
    doubtful = run.doubtful()
    sure = _keep(run, seed, least, whole=doubtful)
    _compare(run, inputs, zeroed, sure, values=not any(map(_random, run.recorder.steps)))
    if doubtful:
        _compare(run, inputs, zeroed, _keep(run, seed + 1, least, whole=set()), values=False)
    return run


def _keep(run: Run, seed: int, least: int, whole: set[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep: dict[str, Tensor] = {}
    resolve = run.recorder.trace.solver.resolve
    fewest = {a.name: c.count for c in run.recorder.trace.chosen for a in atoms(resolve(c.dim))}
    for name, n in run.live().items():
        floor = max(least, fewest.get(name, 1))
        count = n if name in whole or floor >= n else int(torch.randint(floor, n, (1,), generator=generator))
        keep[name] = torch.zeros(n, dtype=torch.bool)
        keep[name][torch.randperm(n, generator=generator)[:count]] = True
    return keep


def _compare(
    run: Run, inputs: Sequence[Tensor], zeroed: Sequence[bool], keep: dict[str, Tensor], *, values: bool
) -> None:
    resolve = run.recorder.trace.solver.resolve
    counts = {name: int(m.sum()) for name, m in keep.items()}

    def stays(dims: Sequence[Dim]) -> list[Tensor]:
        return [kept(resolve(d), keep) for d in dims]

    whole, sliced = {}, {}
    for original, tensor, zero in zip(run.inputs, inputs, zeroed, strict=True):
        masks = stays(run.recorder.type_of(original).dims)
        whole[id(original)] = torch.where(_outer(masks), tensor, 0) if zero else tensor.clone()
        sliced[id(original)] = _slice(tensor, masks)
    for step in run.recorder.steps:
        expected = [tuple(size(resolve(d), counts) for d in kind.dims) for kind in step.types]
        wanted = _again(step, step.func, whole, {})
        func, changes = _adjusted(step, sliced, expected, run, counts, stays)
        got = _again(step, func, sliced, changes)
        for a, b, kind, shape in zip(wanted, got, step.types, expected, strict=True):
            name = f"{step.func} {[tuple(map(str, map(resolve, k.dims))) for k in step.inputs]}"
            assert tuple(b.shape) == shape, f"{name}: the op gives {tuple(b.shape)}, the types say {shape}"
            if values:
                masks = stays(kind.dims)
                torch.testing.assert_close(b, _slice(a, masks), equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
                if kind.zero and a.dim():
                    gone = a[~_outer(masks).expand(a.shape)]
                    assert not gone.any(), f"{name}: claims zeros, there is {gone.abs().max()}"


def _random(step: Step) -> bool:
    """Whether two runs of an op may differ."""
    return torch.Tag.nondeterministic_seeded in step.func.tags or "empty" in base_name(step.func)


def _outer(masks: list[Tensor]) -> Tensor:
    out = torch.ones((), dtype=torch.bool)
    for mask in masks:
        out = out[..., None] & mask
    return out


def _slice(tensor: Tensor, masks: list[Tensor]) -> Tensor:
    for axis, mask in enumerate(masks):
        tensor = tensor.index_select(axis, mask.nonzero().flatten())
    return tensor.clone(memory_format=torch.contiguous_format)


def _again(step: Step, func: Any, env: dict[int, Tensor], changes: dict[str, Any]) -> list[Tensor]:
    """The op once more, with the tensors of `env` for those of the trace; copies of what came out."""
    arguments = bound(step.func, step.args, step.kwargs)
    placed = tree_map(lambda v: env.get(id(v), v) if isinstance(v, Tensor) else v, arguments)
    known = {a.name for a in func._schema.arguments}
    with torch.no_grad():
        result = func(**{k: v for k, v in {**placed, **changes}.items() if k in known})
    out = _tensors(result)
    env.update({id(t): r for t, r in zip(step.outputs, out, strict=True)})
    return [t.clone() for t in out]


def _adjusted(
    step: Step,
    env: dict[int, Tensor],
    shapes: list[tuple[int, ...]],
    run: Run,
    counts: dict[str, int],
    stays: Callable[[Sequence[Dim]], list[Tensor]],
) -> tuple[Any, dict[str, Any]]:
    """The op, and those of its literal arguments that follow a cut."""
    name, args = base_name(step.func), bound(step.func, step.args, step.kwargs)
    edits = {k.rpartition(".")[2]: run.recorder.trace.solver.resolve(d) for k, d in run.recorder.trace.edits.items()}
    match name:
        case "view" | "_unsafe_view" | "_reshape_alias" | "_reshape_copy" | "view_copy" | "expand":
            changes: dict[str, Any] = {"size": list(shapes[0])}
            if name == "_reshape_alias":
                changes["stride"] = torch.empty(shapes[0]).stride()
            return step.func, changes
        case "convolution":
            return step.func, {"groups": size(edits.get("groups", Fixed(1)), counts)}
        case "histc":
            return step.func, {"bins": shapes[0][0], "max": shapes[0][0] - 1}
        case "native_group_norm":
            x = env[id(args["input"])]
            n, c, *pixels = x.shape
            return step.func, {"N": n, "C": c, "HxW": math.prod(pixels), "group": size(edits["num_groups"], counts)}
        case "native_layer_norm":
            x = env[id(args["input"])]
            return step.func, {"normalized_shape": list(x.shape[x.dim() - len(args["normalized_shape"]) :])}
        case "split" | "unsafe_split" | "split_with_sizes" | "unsafe_split_with_sizes":
            func = torch.ops.aten.split_with_sizes.default if name.startswith("split") else None
            return func or torch.ops.aten.unsafe_split_with_sizes.default, {
                "split_sizes": [s[args["dim"]] for s in shapes],
                "dim": args["dim"],
            }
        case "slice":
            kind = step.inputs[0]
            axis = args["dim"] % len(kind.dims)
            n = size(kind.dims[axis])
            start = min(max((args["start"] or 0) + (n if (args["start"] or 0) < 0 else 0), 0), n)
            begin = int(stays(kind.dims)[axis][:start].sum())
            return step.func, {"start": begin, "end": begin + shapes[0][axis] * args["step"]}
        case "channel_shuffle" | "native_channel_shuffle":
            solver, dim = run.recorder.trace.solver, step.inputs[0].dims[1]
            slow, _ = solver.reshape([dim], (args["groups"], size(dim) // args["groups"]), "again")
            return step.func, {"groups": size(solver.resolve(slow), counts)}
    return step.func, {}
