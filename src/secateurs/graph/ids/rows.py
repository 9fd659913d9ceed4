"""Rows of embeddings as units: a trace in which the inputs are ids, and what a cut has to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...core.dims import Atom, Dim, Fixed, atoms, size, substitute
from ...core.ids import LABELS
from ..structure import Structure
from ..trace import Trace
from .numbers import CONFIGS, special_ids, tables_of_numbers, vocabulary_sizes
from .vocabulary import Vocabulary, aliases, ids_at

__all__ = ["settle", "sizes_to_follow", "tie_heads", "tracing", "with_ids"]

_ALL_STAY = "every one of its rows must stay: their ids are in the example inputs, special, or in the code"


def tracing(vocabulary: Vocabulary | None, real: bool = False) -> Trace:
    """An empty trace in which the inputs that `vocabulary` names are ids."""
    trace = Trace(real=real)
    if vocabulary is not None:
        trace.ids.update({where: trace.solver.fresh(rows) for where, rows in vocabulary.rows.items()})
        trace.made.update({at: trace.ids[where] for at, where in vocabulary.made.items() if where in trace.ids})
        for where, why in ((p, why) for p, why in vocabulary.refused.items() if p in trace.ids):
            trace.solver.freeze(trace.ids[where], f"input {where} keeps its ids: {why}")
    return trace


def tie_heads(model: nn.Module, trace: Trace, names: Mapping[int, str]) -> None:
    """Makes the rows of an output layer those of the input's table where transformers says that both are one model's.

    Args:
        names: of the parameters of `model`, by identity.
    """
    if not trace.ids:
        return
    for module in model.modules():
        head = _rows_of(trace, names, _weight(module, "output"))
        # What a decoder reads is what it writes, where an encoder has a vocabulary of its own.
        decoder = _told(module, "get_decoder")
        read = [_weight(decoder, "input"), getattr(getattr(decoder, "embed_tokens", None), "weight", None)]
        read.append(_weight(module, "input"))
        tables = (_rows_of(trace, names, weight) for weight in read)
        same = [rows for rows in tables if isinstance(rows, Atom) and rows.name in trace.numbered()]
        if head is not None and same and same[0].n == size(head):
            trace.solver.unify(same[0], head, f"what {type(module).__name__} reads and writes is one vocabulary")


def _rows_of(trace: Trace, names: Mapping[int, str], weight: Tensor | None) -> Dim | None:
    name = names.get(id(weight))
    return trace.solver.resolve(trace.params[name].dims[0]) if name in trace.params else None


def _weight(module: Any, which: str) -> Tensor | None:
    found = getattr(_told(module, f"get_{which}_embeddings"), "weight", None)
    return found if isinstance(found, Tensor) else None


def _told(module: Any, method: str) -> Any:
    """What a method of a module returns; None if it has none such, or that refuses."""
    try:
        return getattr(module, method)()
    except Exception:  # noqa: BLE001  (a library's method may raise anything where it does not apply)
        return None


def _fed_back(model: nn.Module) -> str | None:
    """The input that transformers' `generate` fills with what the model wrote; None for a model that has none."""
    if not _told(model, "can_generate"):
        return None
    return "decoder_input_ids" if getattr(model.config, "is_encoder_decoder", False) else "input_ids"


def _is_numbered(trace: Trace, dim: Dim) -> bool:
    resolved = trace.solver.resolve(dim)
    return isinstance(resolved, Atom) and resolved.name in trace.numbered()


def settle(model: nn.Module, example_inputs: Any, trace: Trace, vocabulary: Vocabulary) -> None:
    """Fixes what ids are positions in that is not one table, and tables all of whose rows must stay.

    And a table that reads what the model writes, if it writes ids of another numbering.
    """
    written = {atom.name for dims in trace.outputs for dim in dims for atom in atoms(trace.solver.resolve(dim))}
    for where, dim in trace.ids.items():
        atom = trace.solver.resolve(dim)
        if not isinstance(atom, Atom):
            trace.solver.freeze(dim, f"ids of input {where} run over several tables")
        elif _fed_back(model) in {*aliases(model, where)} and atom.name not in written:
            trace.solver.freeze(dim, f"generate() feeds back what is written as {where}, and the output has other rows")
    for atom, stay in _staying(model, example_inputs, trace, vocabulary).items():
        if len(stay) >= atom.n:
            trace.solver.freeze(atom, _ALL_STAY)


def sizes_to_follow(model: nn.Module, trace: Trace) -> dict[str, Dim]:
    """The attributes that say how many ids there are, by what they equal."""
    rows = {name: trace.solver.resolve(kind.dims[0]) for name, kind in trace.params.items() if kind.dims}
    return vocabulary_sizes(model, {name: dim for name, dim in rows.items() if _is_numbered(trace, dim)})


def with_ids(
    structure: Structure,
    model: nn.Module,
    example_inputs: Any,
    trace: Trace,
    vocabulary: Vocabulary,
    rename: Callable[[Dim], Dim],
) -> Structure:
    """`structure` with what it must know of ids: where they stand, which stay, and the numbers and outputs that follow.

    Args:
        rename: from dimensions of the trace to those of the structure.
    """
    live = {group.name for group in structure.groups}
    staying = {str(rename(atom)): stay for atom, stay in _staying(model, example_inputs, trace, vocabulary).items()}
    tables = {key: str(rename(dim)) for key, dim in _numbered_by(model, trace, vocabulary.tables).items()}
    outputs = {number: tuple(map(rename, dims)) for number, dims in enumerate(trace.outputs)}
    outputs = {n: tuple(_only(dim, live) for dim in dims) for n, dims in outputs.items()}
    told = {atom.name for dims in outputs.values() for dim in dims for atom in atoms(dim)}
    places: dict[str, list[str]] = {name: [LABELS] for name in told}
    for where, dim in trace.ids.items():
        places.setdefault(str(rename(dim)), []).extend(aliases(model, where))
    groups = tuple(
        replace(
            group,
            least=max(group.least, len(staying.get(group.name, ()))),
            stays=tuple(sorted(staying.get(group.name, ()))),
            inputs=tuple(dict.fromkeys(places.get(group.name, ()))),
        )
        for group in structure.groups
    )
    return replace(
        structure,
        groups=groups,
        numbers={key: name for key, name in tables.items() if name in live},
        outputs={n: dims for n, dims in outputs.items() if any(True for dim in dims for _ in atoms(dim))},
    )


def _only(dim: Dim, live: set[str]) -> Dim:
    return substitute(dim, {a.name: Fixed(a.n) for a in atoms(dim) if a.name not in live})


def _staying(model: nn.Module, example_inputs: Any, trace: Trace, vocabulary: Vocabulary) -> dict[Atom, set[int]]:
    """By atom the ids that stay: those in the example inputs, special ones, and all before a number in the code."""
    found: dict[Atom, set[int]] = {}
    for where, dim in trace.ids.items():
        atom = trace.solver.resolve(dim)
        if isinstance(atom, Atom):
            first = max(vocabulary.literals.get(where, ()), default=-1) + 1
            found.setdefault(atom, set()).update(range(first), ids_at(example_inputs, where).tolist())
    keys = _numbered_by(model, trace, vocabulary.tables)
    for atom, special in special_ids(model, keys).items():
        found.setdefault(atom, set()).update(special)
    for module, special in special_ids(model, {key: _reader(key) for key in keys if _reader(key) is not None}).items():
        for atom in several if len(several := _vocabularies(trace, str(module))) > 1 else ():
            found.setdefault(atom, set()).update(range(min(max(special) + 1, atom.n)))
    return found


def _reader(key: str) -> str | None:
    """The module whose config the attribute `key` stands in; None for one of a module itself."""
    path = key.split(".")
    at = next((i for i, name in enumerate(path) if name in CONFIGS), None)
    return None if at is None else ".".join(path[:at])


def _vocabularies(trace: Trace, module: str) -> list[Atom]:
    """The vocabularies of the tables in a module: where there are several, one id in a config is one of each."""
    inside = [kind.dims[0] for name, kind in trace.params.items() if kind.dims and _within(name, module)]
    numbered = (trace.solver.resolve(dim) for dim in inside if _is_numbered(trace, dim))
    return list(dict.fromkeys(dim for dim in numbered if isinstance(dim, Atom)))


def _numbered_by(model: nn.Module, trace: Trace, tables: frozenset[str]) -> dict[str, Atom]:
    """For each attribute that holds ids, the rows that they number, of tables of which some can go."""
    found: dict[str, Atom] = {}
    for key, table in tables_of_numbers(model, tables).items():
        rows = trace.solver.resolve(trace.params[table].dims[0]) if table in trace.params else None
        if isinstance(rows, Atom) and rows.name in trace.numbered():
            found[key] = rows
    return found


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
