"""What of a model can go, found from one run of it and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..core.cost import CostModel, Monomial, gather
from ..core.dims import Atom, Concat, Dim, Fixed, Product, atoms, size, substitute
from ..core.errors import unknown_name
from ..core.units import ChannelGroup, Member
from .ids.rows import settle, sizes_to_follow, with_ids
from .ids.vocabulary import Vocabulary, find_vocabulary
from .lengths import weight_norms
from .mend import holds, leaf_edits
from .ops import DECISIVE
from .recorded.fallback import install, recordings
from .records import Seen
from .rehearse import rehearse
from .structure import Frozen, Structure, fingerprint
from .trace import Trace
from .tracing import trace_model
from .twin import named_tensors, twin

__all__ = ["DEFAULT_KINDS", "KINDS", "infer"]

KINDS = ("channel", "head", "head-size", "expert", "embedding")
DEFAULT_KINDS = ("channel", "head")
# With less than this share of the parameters along neutral widths, the others are offered, too.
_ENOUGH = 0.4
# Where PyTorch keeps what the weight of a layer is made from.
_PARAMETRIZED = ".parametrizations."


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
        kinds: which units to offer: "channel", "head", "head-size", "expert", "embedding".
        entangled: also offer widths whose removal differs from zeroing, such as one a layer norm runs over. Default:
            only where the other widths make up less than two fifths of the parameters.
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
    vocabulary = find_vocabulary(model, example_inputs) if "embedding" in wanted else Vocabulary()
    traces = trace_model(model, example_inputs, vocabulary)
    trace = traces[0]
    _freeze_unseen(model, trace)
    settle(model, example_inputs, trace, vocabulary)
    kind_of = _kinds(trace)
    _freeze_deselected(trace, kind_of, wanted, entangled)
    for key in [key for key, dim in trace.edits.items() if not holds(model, key, size(dim))]:
        del trace.edits[key]
    trace.edits.update(leaf_edits(model, _weights(model, trace), trace.edits))
    trace.edits.update(sizes_to_follow(model, trace) if trace.ids else {})
    blamed = rehearse(model, example_inputs, traces)
    structure, rename = _reify(model, trace, kind_of)
    if trace.ids:
        structure = with_ids(structure, model, example_inputs, trace, vocabulary, rename)
    return structure, blamed, trace.real


def _weights(model: nn.Module, trace: Trace) -> dict[str, tuple[Dim, ...]]:
    """The types of all parameters and buffers, and of what parametrizations make, under the name that it then has."""
    types = {name: kind.dims for name, kind in trace.params.items()}
    for path, spans in trace.spans.items():
        if isinstance(model.get_submodule(path), ParametrizationList) and isinstance(spans[0].output, Seen):
            types[f".{path}".replace(_PARAMETRIZED, ".")[1:]] = spans[0].output.dims
    return types


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
            article = "an" if kind[0] in "aeiou" else "a"
            solver.freeze(atom, f"{article} {kind} unit, and only {', '.join(sorted(kinds))} were asked for")
        elif atom.name in tangled and not entangled:
            solver.freeze(atom, f"removing differs from zeroing: {tangled[atom.name]}")
    _freeze_blocks(trace)
    copies = {a.name for dim in trace.repeats for a in atoms(solver.resolve(dim))}
    for kind_ in trace.params.values():
        for dim in kind_.dims:
            _freeze_repeats(trace, solver.resolve(dim), copies)
            _freeze_squares(trace, solver.resolve(dim))


def _freeze_repeats(trace: Trace, dim: Dim, copies: set[str]) -> None:
    """Of units that each are repeated, as key-value heads for several query heads, the units can go, not the copies."""
    for part in dim.parts if isinstance(dim, Concat) else (dim,):
        live = {a.name: a for a in atoms(part)}
        if live.keys() - copies:
            for name in live.keys() & copies:
                trace.solver.freeze(live[name], "how often each unit of its axis is repeated")


def _freeze_blocks(trace: Trace) -> None:
    """Where experts are chosen by the group, each group loses as many as the others, and no group goes as a whole.

    Before that, notes how many of an axis must stay, so that as many can be chosen as the model does.
    """
    chosen = [replace(choice, dim=trace.solver.resolve(choice.dim)) for choice in trace.chosen]
    picked = {choice.dim.name: choice.count for choice in chosen if isinstance(choice.dim, Atom)}
    # What chooses one after the other chooses as many.
    singles = Counter((choice.dim, choice.training) for choice in chosen if choice.count == 1)
    wanted = [(choice.dim, choice.count) for choice in chosen] + [(dim, n) for (dim, _), n in singles.items()]
    for dim, count in wanted:
        for atom in atoms(dim):
            enough = (n for n in range(1, atom.n) if size(dim, {**picked, atom.name: n}) >= count)
            trace.least.append((atom, next(enough, atom.n)))
    for dim, _ in wanted:
        for group in list(atoms(dim))[:-1] if isinstance(dim, Product) else ():
            trace.solver.freeze(group, "a group of experts, of which all groups have as many")


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
    """Heads are what attention batches over; head sizes are what it contracts or passes within one of several heads.

    Experts are what positions are chosen from, rows of embeddings what ids are positions in.
    """
    heads: dict[str, str] = {}
    sizes: dict[str, str] = {}
    for batch, others in trace.heads:
        found = [a.name for a in atoms(trace.solver.resolve(batch))]
        heads.update(dict.fromkeys(found, "head"))
        for dim in others if found else ():
            sizes.update((a.name, "head-size") for a in atoms(trace.solver.resolve(dim)))
    # Of a maximum often only the value is used, and nothing is looked up.
    experts = {a.name: "expert" for dim in trace.pointed for a in atoms(trace.solver.resolve(dim))}
    return sizes | heads | experts | dict.fromkeys(trace.numbered(), "embedding")


def _reify(model: nn.Module, trace: Trace, kind_of: Mapping[str, str]) -> tuple[Structure, Callable[[Dim], Dim]]:
    """The structure, and the function that gives a dimension of the trace its public names."""
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
    # A direction has no size along the axis of its lengths.
    unsized = {(norm.direction, norm.axis) for norm in weight_norms(model)}
    wanted, least = trace.multiples(), trace.fewest()
    groups = tuple(
        ChannelGroup(names[a], size_, kind_of.get(a, "channel"), members, wanted.get(a, 1), least.get(a, 1))
        for a, size_, members in _members(tensors, trace, {public: a for a, public in names.items()}, unsized)
    )
    live = {g.name for g in groups}
    structure = Structure(
        groups=groups,
        tensors={n: dims for n, dims in tensors.items() if any(True for d in dims for _ in atoms(d))},
        edits={k: rename(d) for k, d in trace.edits.items() if any(a.name in live for a in atoms(rename(d)))},
        costs=_costs(model, trace, tensors, rename),
        frozen=_frozen(trace, tensors),
        unknown=dict(trace.unknown),
        fingerprint=fingerprint(model),
        doubted=tuple(
            op for op in (op.mapped(lambda dim: _only(rename(dim), live)) for op in trace.doubted) if op.live
        ),
    )
    return structure, rename


def _only(dim: Dim, live: set[str]) -> Dim:
    """`dim` with every atom fixed that is no group's, as the tokens of an attention."""
    return substitute(dim, {a.name: Fixed(a.n) for a in atoms(dim) if a.name not in live})


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
                    base = _layer(tensor) or tensor
                    taken[base] = taken.get(base, 0) + 1
                    names[atom.name] = base if taken[base] == 1 else f"{base}#{taken[base]}"
    return names


def _layer(tensor: str) -> str:
    """The path of the layer that a parameter belongs to."""
    layer, parametrized, _ = f".{tensor}".partition(_PARAMETRIZED)
    return layer[1:] if parametrized else tensor.rpartition(".")[0]


def _members(
    tensors: Mapping[str, tuple[Dim, ...]],
    trace: Trace,
    atom_of: Mapping[str, str],
    unsized: Container[tuple[str, int]],
) -> Iterator[tuple[str, int, tuple[Member, ...]]]:
    """Each atom that can go, with its size and every axis that carries it but those in `unsized`."""
    members: dict[str, list[Member]] = {}
    sizes: dict[str, int] = {}
    for tensor, dims in tensors.items():
        for axis, dim in enumerate(dims):
            if (tensor, axis) in unsized:
                continue
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
