"""What of a model can go, found from one run of it: coupled groups, costs, and the integers to mend after a cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.batch import call, device_of
from ..core.cost import CostModel, Monomial, gather
from ..core.dims import Atom, Concat, Dim, Fixed, Product, atoms, parse, size, substitute
from ..core.errors import FileError, ModelError, unknown_name
from ..core.units import ChannelGroup, Group, Member
from . import rules as _rules  # noqa: F401  (registers the rules)
from .fallback import install, recordings
from .mend import holds, leaf_edits
from .rehearse import rehearse
from .run import output_tensors, place, running
from .trace import DECISIVE, Doubted, Trace, Tracer
from .twin import meta_twin, named_tensors, set_mode, shared_twin, twin

__all__ = ["DEFAULT_KINDS", "KINDS", "Frozen", "Structure", "fingerprint", "infer"]

KINDS = ("channel", "head", "head-size")
DEFAULT_KINDS = ("channel", "head")
# With less than this share of the parameters along neutral widths, the others are offered, too.
_ENOUGH = 1 / 3


@dataclass(frozen=True)
class Frozen:
    """A width that stays as it is.

    Args:
        tensor, axis: where it was met first.
        size: number of positions.
        reason: why it stays, with the op and the module that decided it.
    """

    tensor: str
    axis: int
    size: int
    reason: str


@dataclass(frozen=True)
class Structure:
    """The shape algebra's result: data, independent of the model object.

    Args:
        groups: what can go, in the order of the forward pass.
        tensors: for each parameter and buffer that a cut can change, what each axis is made of.
        edits: for each module integer (`path.attribute` or `path.attribute[i]`) the dimension it must equal.
        costs: parameters, MACs (for the example inputs) and bytes as functions of the units kept.
        frozen: the widths that stay, and why.
        unknown: ops without a rule and a module that calls each.
        fingerprint: of the model's tensor names and shapes.
        doubted: the ops that a proof runs on what is kept, since zeroing is not removing there.
        recorded: for modules that a cut replaces by a recording of their code, by path: see `traced.TracedForward`.
    """

    groups: tuple[ChannelGroup, ...]
    tensors: Mapping[str, tuple[Dim, ...]]
    edits: Mapping[str, Dim]
    costs: CostModel
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]
    fingerprint: str
    doubted: tuple[Doubted, ...] = ()
    recorded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units of each group."""
        return {g.name: g.size for g in self.groups}

    def restricted(self, names: Iterable[str]) -> Structure:
        """The structure in which only the named groups can go."""
        live = set(names)
        known = self._with({g.name: Fixed(g.size) for g in self.groups if g.name not in live})
        left_out = tuple(
            Frozen(g.members[0].tensor, g.members[0].axis, g.size, "left out by scope or ignore")
            for g in self.groups
            if g.name not in live
        )
        return replace(
            known,
            groups=tuple(g for g in known.groups if g.name in live),
            tensors={n: dims for n, dims in known.tensors.items() if any(True for d in dims for _ in atoms(d))},
            edits={k: d for k, d in known.edits.items() if any(True for _ in atoms(d))},
            frozen=self.frozen + left_out,
            doubted=tuple(op for op in known.doubted if _live(op)),
        )

    def _with(self, known: Mapping[str, Dim]) -> Structure:
        """The structure with dimensions in the place of atoms, by name."""
        return replace(
            self,
            groups=tuple(
                replace(g, members=tuple(replace(m, dim=substitute(m.dim, known)) for m in g.members))
                for g in self.groups
            ),
            tensors={name: tuple(substitute(d, known) for d in dims) for name, dims in self.tensors.items()},
            edits={key: substitute(dim, known) for key, dim in self.edits.items()},
            costs=substituted(self.costs, known),
            doubted=tuple(_mapped(op, lambda dim: substitute(dim, known)) for op in self.doubted),
        )

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON values; dimension types in their notation, the groups in them as `g0`, `g1` …"""
        short = self._with(short_names(self.groups))
        return {
            "fingerprint": self.fingerprint,
            "doubted": [_doubted_to_list(op) for op in short.doubted],
            "recorded": dict(self.recorded),
            "groups": [_group_to_dict(g) for g in short.groups],
            "tensors": {name: [str(d) for d in dims] for name, dims in short.tensors.items()},
            "edits": {key: str(dim) for key, dim in short.edits.items()},
            "costs": short.costs.to_dict(),
            "frozen": [[f.tensor, f.axis, f.size, f.reason] for f in self.frozen],
            "unknown": dict(self.unknown),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """The structure that `to_dict` wrote.

        Raises:
            FileError: a field is missing or of the wrong form.
        """
        try:
            sizes = {f"g{i}": g["size"] for i, g in enumerate(data["groups"])}
            short = cls(
                groups=tuple(_group_from_dict(g, sizes) for g in data["groups"]),
                tensors={n: tuple(parse(d, sizes) for d in dims) for n, dims in data["tensors"].items()},
                edits={k: parse(d, sizes) for k, d in data["edits"].items()},
                costs=CostModel.from_dict(data["costs"], sizes),
                frozen=tuple(Frozen(*f) for f in data["frozen"]),
                unknown=dict(data["unknown"]),
                fingerprint=data["fingerprint"],
                doubted=tuple(_doubted_from_list(op, sizes) for op in data.get("doubted", ())),
                recorded=data.get("recorded", {}),
            )
            return short._with(long_names(short.groups))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"the structure of this plan cannot be read: {error}.") from error


def short_names(groups: Sequence[Group]) -> dict[str, Dim]:
    """For each group's name an atom that can be told from a number and an operator in the notation of dimensions."""
    return {g.name: Atom(f"g{i}", g.size) for i, g in enumerate(groups)}


def long_names(groups: Sequence[Group]) -> dict[str, Dim]:
    """The inverse of `short_names`."""
    return {f"g{i}": Atom(g.name, g.size) for i, g in enumerate(groups)}


def substituted(costs: CostModel, known: Mapping[str, Dim]) -> CostModel:
    """`costs` with dimensions in the place of atoms, by name."""
    return CostModel(
        {
            metric: tuple(replace(m, dims=tuple(substitute(d, known) for d in m.dims)) for m in monomials)
            for metric, monomials in costs.metrics.items()
        }
    )


def _mapped(op: Doubted, change: Callable[[Dim], Dim]) -> Doubted:
    inputs, outputs = (tuple(tuple(map(change, dims)) for dims in side) for side in (op.inputs, op.outputs))
    return replace(op, inputs=inputs, outputs=outputs)


def _live(op: Doubted) -> bool:
    return any(True for dims in (*op.inputs, *op.outputs) for dim in dims for _ in atoms(dim))


def _doubted_to_list(op: Doubted) -> list[Any]:
    sides = [[[str(dim) for dim in dims] for dims in side] for side in (op.inputs, op.outputs)]
    return [op.module, op.name, op.nth, *sides]


def _doubted_from_list(data: Sequence[Any], sizes: Mapping[str, int]) -> Doubted:
    module, name, nth, *sides = data
    return Doubted(module, name, nth, *(tuple(tuple(parse(d, sizes) for d in dims) for dims in s) for s in sides))


def _group_to_dict(group: ChannelGroup) -> dict[str, Any]:
    members = [[m.tensor, m.axis, str(m.dim), m.rank, m.role] for m in group.members]
    data = {"name": group.name, "size": group.size, "kind": group.kind, "members": members}
    return data if group.multiple == 1 else {**data, "multiple": group.multiple}


def _group_from_dict(data: Mapping[str, Any], sizes: Mapping[str, int]) -> ChannelGroup:
    members = tuple(Member(t, a, parse(d, sizes), rank, role) for t, a, d, rank, role in data["members"])
    return ChannelGroup(data["name"], data["size"], data["kind"], members, data.get("multiple", 1))


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and shapes of a model's parameters and buffers: equal for models a plan fits."""
    text = ";".join(sorted(f"{name}{tuple(t.shape)}" for name, t in named_tensors(model)))
    return hashlib.sha256(text.encode()).hexdigest()


def infer(
    model: nn.Module,
    example_inputs: Any,
    *,
    kinds: Iterable[str] = DEFAULT_KINDS,
    entangled: bool | None = None,
    record: bool = True,
) -> Structure:
    """What of `model` can go, from one run on `example_inputs`; the model is not changed.

    Args:
        model: any module whose forward runs on the example inputs.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        kinds: which units to offer: "channel", "head", "head-size".
        entangled: also offer widths whose removal differs from zeroing, such as one a layer norm runs over. Default:
            only where the other widths make up less than a third of the parameters.
        record: where Python code stands in the way, find out whether more can go with a recording of it, which the cut
            then puts in the place of the module's own code; see `traced.TracedForward`.

    Raises:
        ModelError: the model does not run on these inputs, or is TorchScript.
        OptionError: an unknown kind.
    """
    wanted = frozenset(kinds)
    for kind in sorted(wanted - set(KINDS)):
        raise unknown_name("kind of unit", kind, KINDS)
    structure = _inferred(model, example_inputs, wanted, bool(entangled), record)
    if entangled is None and _reach(structure) < _ENOUGH:
        return _inferred(model, example_inputs, wanted, True, record)
    return structure


def _inferred(
    model: nn.Module, example_inputs: Any, wanted: frozenset[str], entangled: bool, record: bool
) -> Structure:
    """What can go as the model's code is or, if more can, with the modules that stood in the way recorded."""
    as_is, blamed, real = _inferred_once(model, example_inputs, wanted, entangled)
    documents = recordings(model, example_inputs, blamed, real=real) if blamed and record else {}
    if not documents:
        return as_is
    copy = install(twin(model, {name: tensor.detach() for name, tensor in named_tensors(model)}), documents)
    recorded, _, _ = _inferred_once(copy, example_inputs, wanted, entangled)
    if (_reach(recorded), sum(recorded.sizes.values())) <= (_reach(as_is), sum(as_is.sizes.values())):
        return as_is
    return replace(recorded, recorded=documents)


def _reach(structure: Structure) -> float:
    """Of all parameters those in a tensor along which something can go."""
    tensors = structure.costs.metrics["params"]
    entries = [math.prod(map(size, tensor.dims)) for tensor in tensors]
    reached = [n for n, t in zip(entries, tensors, strict=True) if any(True for d in t.dims for _ in atoms(d))]
    return sum(reached) / max(sum(entries), 1)


def _inferred_once(
    model: nn.Module, example_inputs: Any, wanted: frozenset[str], entangled: bool
) -> tuple[Structure, frozenset[str], bool]:
    """What can go, the modules whose code stands in the way, and whether the trace was on real tensors."""
    traces = trace_model(model, example_inputs)
    trace = traces[0]
    _freeze_unseen(model, trace)
    kind_of = _kinds(trace)
    _freeze_deselected(trace, kind_of, wanted, entangled)
    for key in [key for key, dim in trace.edits.items() if not holds(model, key, size(dim))]:
        del trace.edits[key]
    trace.edits.update(leaf_edits(model, {n: k.dims for n, k in trace.params.items()}, trace.edits))
    blamed = rehearse(model, example_inputs, traces)
    return _reify(model, trace, kind_of), blamed, trace.real


def trace_model(model: nn.Module, example_inputs: Any) -> list[Trace]:
    """The trace of one run in evaluation mode and, if some parameters took no part in it, of one in training mode.

    A run is on shapes only; where Python asks for values, on real tensors.

    Raises:
        ModelError: the model does not run on these inputs, or is TorchScript.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{path or 'the model'} is TorchScript, whose code cannot follow a cut; prune the model before it is "
                "scripted or traced."
            )
    try:
        trace = _traced(meta_twin(model), example_inputs, Trace())
    except Exception as error:  # noqa: BLE001  (Python may ask shapes for values they do not have; the real run decides)
        trace = _traced_on_values(model, example_inputs, error)
    if all(name in trace.params for name, _ in model.named_parameters()):
        return [trace]
    other = trace.another(training=True)
    try:
        return [trace, _traced(shared_twin(model) if trace.real else meta_twin(model), example_inputs, other)]
    except Exception:  # noqa: BLE001  (a model that cannot train as it is given is pruned for evaluation)
        return [trace]


def _traced_on_values(model: nn.Module, example_inputs: Any, on_shapes: Exception) -> Trace:
    try:
        return _traced(shared_twin(model), example_inputs, Trace(real=True))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, the user is told)
        raise ModelError(
            f"the model does not run on the example inputs ({_shapes(example_inputs)}): {type(error).__name__}: {error}"
        ) from on_shapes


def _traced(model: nn.Module, inputs: Any, trace: Trace) -> Trace:
    set_mode(model, trace.training)
    names = {id(t): name for name, t in named_tensors(model)}
    placed = place(inputs, device_of(model) if trace.real else "meta")
    with running(model) as module:
        tracer = Tracer(names, module, trace)
        for path, part in model.named_modules():
            _observe(tracer, path, part)
        with tracer:
            output = call(model, placed)
    outputs = output_tensors(output)
    if not outputs:
        raise ModelError(f"no tensor is found in the model's output, a {type(output).__name__}; return tensors.")
    return tracer.finish(outputs)


def _observe(tracer: Tracer, path: str, module: nn.Module) -> None:
    starts: list[int] = []
    module.register_forward_pre_hook(lambda _m, _i: starts.append(len(tracer.trace.ops)))
    module.register_forward_hook(lambda _m, _i, output: tracer.leave(path, starts.pop(), output))


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"tensor {list(inputs.shape)}"
    if hasattr(inputs, "items"):
        return ", ".join(f"{k}: {_shapes(v)}" for k, v in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(_shapes(v) for v in inputs)
    return type(inputs).__name__


def _freeze_unseen(model: nn.Module, trace: Trace) -> None:
    """Where Python decides by values, a parameter that did not run may meet any width of its size on other inputs."""
    if not any(op.name in DECISIVE for op in trace.ops):
        return
    unseen = {n: name for name, p in model.named_parameters() if name not in trace.params for n in p.shape if n > 1}
    for kind in trace.params.values():
        for dim in kind.dims:
            if size(dim) in unseen:
                name = unseen[size(dim)]
                trace.solver.freeze(dim, f"{name} did not run on these inputs, and Python decides by values what runs")


def _freeze_deselected(trace: Trace, kind_of: Mapping[str, str], kinds: frozenset[str], entangled: bool) -> None:
    solver = trace.solver
    tangled: dict[str, str] = {}
    for name, why in solver.entangled.items():
        for atom in atoms(solver.resolve(Atom(name, 2))):
            tangled.setdefault(atom.name, why)
    live = {a.name: a for k in trace.params.values() for d in k.dims for a in atoms(solver.resolve(d))}
    for atom in live.values():
        kind = kind_of.get(atom.name, "channel")
        if kind not in kinds:
            solver.freeze(atom, f"a {kind} unit, and only {', '.join(sorted(kinds))} were asked for")
        elif atom.name in tangled and not entangled:
            solver.freeze(atom, f"removing differs from zeroing: {tangled[atom.name]}")
    for kind_ in trace.params.values():
        for dim in kind_.dims:
            _freeze_repeats(trace, solver.resolve(dim))
            _freeze_squares(trace, solver.resolve(dim))


def _freeze_repeats(trace: Trace, dim: Dim) -> None:
    """Of units that each are repeated, as key-value heads for several query heads, the units can go, not the copies."""
    copies = {a.name for d in trace.repeats for a in atoms(trace.solver.resolve(d))}
    for part in dim.parts if isinstance(dim, Concat) else (dim,):
        live = {a.name: a for a in atoms(part)}
        if live.keys() - copies:
            for name in live.keys() & copies:
                trace.solver.freeze(live[name], "how often each unit of its axis is repeated")


def _freeze_squares(trace: Trace, dim: Dim) -> None:
    """An atom that occurs in two factors of one product would be cut along a diagonal cross: not supported."""
    match dim:
        case Concat(parts):
            for part in parts:
                _freeze_squares(trace, part)
        case Product(factors):
            seen: set[str] = set()
            for factor in factors:
                names = {a.name for a in atoms(factor)}
                for atom in atoms(factor):
                    if atom.name in seen:
                        trace.solver.freeze(atom, "it is flattened with itself")
                seen |= names


def _kinds(trace: Trace) -> dict[str, str]:
    """Heads are what attention batches over; head sizes are what it contracts or passes within one of several heads."""
    heads: dict[str, str] = {}
    sizes: dict[str, str] = {}
    for batch, others in trace.heads:
        found = [a.name for a in atoms(trace.solver.resolve(batch))]
        heads.update(dict.fromkeys(found, "head"))
        for dim in others if found else ():
            sizes.update((a.name, "head-size") for a in atoms(trace.solver.resolve(dim)))
    return sizes | heads


def _reify(model: nn.Module, trace: Trace, kind_of: Mapping[str, str]) -> Structure:
    solver = trace.solver
    resolved = {name: tuple(solver.resolve(d) for d in kind.dims) for name, kind in trace.params.items()}
    parameters = {name for name, _ in model.named_parameters()}
    names = _names(resolved, trace, parameters)
    for name, dims in resolved.items():
        for axis, dim in enumerate(dims):
            for atom in atoms(dim):
                if atom.name not in names:
                    solver.freeze(atom, f"no layer produces it, only {name} consumes it on axis {axis}")
    public = {
        a.name: Atom(names[a.name], a.n)
        for dims in resolved.values()
        for d in dims
        for a in atoms(d)
        if a.name in names
    }

    def rename(dim: Dim) -> Dim:
        return substitute(solver.resolve(dim), public)

    tensors = {name: tuple(rename(d) for d in kind.dims) for name, kind in trace.params.items()}
    wanted = trace.multiples()
    groups = tuple(
        ChannelGroup(names[a], size_, kind_of.get(a, "channel"), members, wanted.get(a, 1))
        for a, size_, members in _members(tensors, trace, {public: a for a, public in names.items()})
    )
    live = {g.name for g in groups}
    return Structure(
        groups=groups,
        tensors={n: dims for n, dims in tensors.items() if any(True for d in dims for _ in atoms(d))},
        edits={k: rename(d) for k, d in trace.edits.items() if any(a.name in live for a in atoms(rename(d)))},
        costs=_costs(model, trace, tensors, rename),
        frozen=_frozen(trace, tensors),
        unknown=dict(trace.unknown),
        fingerprint=fingerprint(model),
        doubted=tuple(op for op in (_mapped(op, rename) for op in trace.doubted) if _live(op)),
    )


def _names(resolved: Mapping[str, tuple[Dim, ...]], trace: Trace, parameters: set[str]) -> dict[str, str]:
    """A public name for each atom: the module that first produces it, numbered where one module produces several."""
    names: dict[str, str] = {}
    taken: dict[str, int] = {}
    for tensor, dims in resolved.items():
        for axis, dim in enumerate(dims):
            if (tensor, axis) in trace.contracted or tensor not in parameters:
                continue
            for atom in atoms(dim):
                if atom.name not in names:
                    base = tensor.rpartition(".")[0] or tensor
                    taken[base] = taken.get(base, 0) + 1
                    names[atom.name] = base if taken[base] == 1 else f"{base}#{taken[base]}"
    return names


def _members(
    tensors: Mapping[str, tuple[Dim, ...]], trace: Trace, atom_of: Mapping[str, str]
) -> Iterator[tuple[str, int, tuple[Member, ...]]]:
    """Each atom that can go, with its size and every axis that carries it."""
    members: dict[str, list[Member]] = {}
    sizes: dict[str, int] = {}
    for tensor, dims in tensors.items():
        for axis, dim in enumerate(dims):
            role: Literal["in", "out"] = "in" if (tensor, axis) in trace.contracted else "out"
            for atom in {a.name: a for a in atoms(dim)}.values():
                sizes[atom.name] = atom.n
                members.setdefault(atom.name, []).append(Member(tensor, axis, dim, len(dims), role))
    yield from ((atom_of[name], sizes[name], tuple(found)) for name, found in members.items())


def _costs(
    model: nn.Module, trace: Trace, tensors: Mapping[str, tuple[Dim, ...]], rename: Callable[[Dim], Dim]
) -> CostModel:
    params, total_bytes = [], []
    for name, tensor in named_tensors(model):
        dims = tensors.get(name, tuple(Fixed(n) for n in tensor.shape))
        if isinstance(tensor, nn.Parameter):
            params.append(Monomial(1, dims, name))
        total_bytes.append(Monomial(tensor.element_size(), dims, name))
    macs = gather(Monomial(1, tuple(rename(d) for d in dims), source) for dims, source in trace.macs)
    return CostModel({"params": tuple(params), "macs": macs, "bytes": tuple(total_bytes)})


def _frozen(trace: Trace, tensors: Mapping[str, tuple[Dim, ...]]) -> tuple[Frozen, ...]:
    """One entry a frozen width, at the first parameter that produces it."""
    out: dict[str, Frozen] = {}
    for name, kind in trace.params.items():
        for axis, dim in enumerate(kind.dims):
            if not isinstance(dim, Atom) or any(True for _ in atoms(tensors[name][axis])):
                continue
            why = trace.solver.reason(dim.name)
            if why and not why.startswith("spatial") and (name, axis) not in trace.contracted:
                out.setdefault(f"{size(dim)} {why}", Frozen(name, axis, size(dim), why))
    return tuple(out.values())
