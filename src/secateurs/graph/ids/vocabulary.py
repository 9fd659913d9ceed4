"""Which of a model's inputs are ids: integers that are looked up in a table, found by watching where they go.

What else the ids meet decides whether they may get other numbers. Numbers are given anew in the old order, so that
comparing ids, sorting them, or looking for the largest gives what it gave. A number that ids are compared with, or that
is written among them, must get its new number, too: it does if it comes from an attribute such as `pad_token_id`, which
a second run with other attributes shows; one that stands in the code keeps its number only if it and all ids before it
stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.batch import call, device_of
from ...core.ids import column, located
from ..ops import COMPARES, FILLS, NEUTRAL, UNRECORDED, base_name, bound, numbers
from ..rules.registry import MOVES, POINTS
from ..run import execute, place, running, tensors_in
from ..twin import meta_twin, set_mode, shared_twin, unchanged
from .numbers import id_numbers, shuffle, shuffled, special_ids

__all__ = ["Place", "Vocabulary", "aliases", "find_vocabulary", "ids_at"]

# Where an op makes a tensor of ids: the caller, the op, which of its calls, and which of its results.
Place = tuple[str, str, int, int]
# Inputs that count or sort, and whose tables are no vocabularies.
_OTHERS = re.compile(r"position|(^|\.|_)pos(_|$)|token_type|segment")
# Of the orders in which all ids are given other numbers.
_SEEDS = (1, 2)
_MADE = [f"{new}{what}" for what in ("zeros", "ones", "full", "empty") for new in ("", "new_")]
_FILLING = {"fill", "zero", *_MADE, *(f"{what}_like" for what in ("zeros", "ones", "full", "empty"))}


@dataclass(frozen=True)
class Vocabulary:
    """The ids among a model's inputs.

    Args:
        rows: by the place of an input (see `core.ids`), how many rows the tables have in which it is looked up.
        made: ops whose results are single columns of an input, by where they are called, with the place of each.
        tables: the names of the parameters in which they are looked up.
        literals: by place, numbers in the code that the ids meet, and that follow no attribute.
        refused: by place, why its ids cannot get other numbers; also of inputs that hold none.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    made: Mapping[Place, str] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    literals: Mapping[str, frozenset[int]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def ids_at(inputs: Any, where: str) -> Tensor:
    """All ids of example inputs at a place, without the negative ones, which mean none: int64 [different ids]."""
    name, number = column(where)
    tensors = [t if number is None else t[..., number] for found, t in located(inputs) if found == name]
    ids = torch.cat([t.detach().flatten().cpu().long() for t in tensors])
    different: Tensor = ids[ids >= 0].unique()
    return different


def aliases(model: nn.Module, where: str) -> Iterator[str]:
    """The place itself, and the same for callers who give by keyword what was given by position, or the other way."""
    yield where
    head, rest = re.match(r"([^.\[]*)(.*)", where, re.DOTALL).groups()  # type: ignore[union-attr]  # it always matches
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature(model.forward).parameters.values() if p.kind in kinds]
    if head.isdigit() and int(head) < len(names):
        yield names[int(head)] + rest
    elif head in names:
        yield str(names.index(head)) + rest


def find_vocabulary(model: nn.Module, example_inputs: Any) -> Vocabulary:
    """The ids among the inputs of `model`, from runs of copies of it; what cannot be watched has none."""
    found = Vocabulary()
    for training in (False, True):
        watched = _watched(model, example_inputs, training)
        if watched is not None:
            found = _joined(found, _understood(model, example_inputs, training, watched))
    return found


def _joined(one: Vocabulary, other: Vocabulary) -> Vocabulary:
    differ = {p for p in one.rows.keys() & other.rows.keys() if one.rows[p] != other.rows[p]}
    literals = {p: one.literals.get(p, frozenset()) | other.literals.get(p, frozenset()) for p in _keys(one, other)}
    refused = {**dict.fromkeys(differ, "its tables differ in training"), **other.refused, **one.refused}
    return Vocabulary(
        {**other.rows, **one.rows}, {**other.made, **one.made}, one.tables | other.tables, literals, refused
    )


def _keys(one: Vocabulary, other: Vocabulary) -> set[str]:
    return {*one.literals, *other.literals}


def _watched(
    model: nn.Module, inputs: Any, training: bool, tables: frozenset[str] = frozenset(), seed: int = 0
) -> _Watch | None:
    """A run on shapes or, if that fails, on values, with other numbers for all ids that attributes hold."""
    for copy_of in (meta_twin, shared_twin):
        try:
            copy = set_mode(copy_of(model), training)
            for key, rows in id_numbers(copy, tables).items() if seed else ():
                shuffle(copy, key, shuffled(rows, seed))
            placed = place(inputs, device_of(model) if copy_of is shared_twin else "meta")
            with unchanged(copy), running(copy) as module:
                watch = _Watch(dict(located(placed)), module, {id(p): name for name, p in copy.named_parameters()})
                with watch:
                    call(copy, placed)
            return watch
        except Exception:  # noqa: BLE001  (the trace that follows tells what is wrong with a model that does not run)
            continue
    return None


def _understood(model: nn.Module, inputs: Any, training: bool, watch: _Watch) -> Vocabulary:
    sizes = _sizes(watch)
    rows = {p: min(found) for p, found in sizes.items()}
    tables = frozenset(watch.tables)
    followed = _followed(model, inputs, training, watch, tables)
    held = _held_ids(model, tables) if followed is None else {}
    literals = {p: frozenset(held.get(n, ())) for p, n in rows.items()}
    for number, places, values in watch.numbers:
        for p in _concerned(rows, places) if number not in (followed or ()) else ():
            literals[p] |= {v for v in values if 0 <= v < rows[p]}
    made = {at: p for at, p in watch.columns.items() if p in rows}
    return Vocabulary(rows, made, tables, literals, _refused(model, watch, sizes))


def _refused(model: nn.Module, watch: _Watch, sizes: Mapping[str, set[int]]) -> dict[str, str]:
    refused = {p: "it is looked up in tables of different sizes" for p, found in sizes.items() if len(found) > 1}
    refused |= {p: "its numbers are positions or types" for p in sizes if any(map(_OTHERS.search, aliases(model, p)))}
    for where, why in (*watch.mixed.items(), *watch.changed.items()):
        refused |= dict.fromkeys((where, *_concerned(sizes, {where})), why)
    for _, places, _ in watch.numbers:
        if not all(_concerned(sizes, {p}) for p in places):
            refused |= dict.fromkeys(_concerned(sizes, places), "its ids meet those of an input that is not looked up")
    return refused


def _concerned(rows: Iterable[str], places: Iterable[str]) -> list[str]:
    """Those of `rows` that are among the places, hold one as a column, or are a column of one."""
    around = {p: column(p)[0] for p in places}
    return [r for r in rows if r in around or r in around.values() or column(r)[0] in around]


def _held_ids(model: nn.Module, tables: frozenset[str]) -> dict[int, set[int]]:
    """By the number of rows of a table the ids that attributes hold."""
    sizes = id_numbers(model, tables)
    return special_ids(model, sizes)


def _sizes(watch: _Watch) -> dict[str, set[int]]:
    """By place the sizes of the tables; single columns are for themselves unless the whole is looked up, too."""
    sizes: dict[str, set[int]] = {}
    for places, size in watch.lookups:
        for where in places:
            sizes.setdefault(where, set()).add(size)
    for where in [p for p in sizes if "[" in p and column(p)[0] in sizes]:
        sizes[column(where)[0]] |= sizes.pop(where)
    return sizes


def _followed(
    model: nn.Module, inputs: Any, training: bool, watch: _Watch, tables: frozenset[str]
) -> frozenset[int] | None:
    """The ops whose numbers change as attributes do; None if anything else does, or the code goes another way."""
    if not (sizes := set(id_numbers(model, tables).values())):
        return frozenset()
    alike = ((seed, _watched(model, inputs, training, tables, seed)) for seed in _SEEDS)
    same = [(seed, o) for seed, o in alike if o is not None and (o.ops, o.others) == (watch.ops, watch.others)]
    if not same:
        return None
    return frozenset.intersection(*(_changed_alike(watch, other, sizes, seed) for seed, other in same))


def _changed_alike(watch: _Watch, other: _Watch, sizes: set[int], seed: int) -> frozenset[int]:
    orders = [dict(enumerate(shuffled(size, seed))) for size in sizes]
    told = {number: values for number, _, values in other.numbers}
    return frozenset(
        number
        for number, _, values in watch.numbers
        if any(told.get(number) == tuple(order.get(v, v) for v in values) for order in orders)
    )


class _Watch(TorchDispatchMode):
    """Where the integers of the inputs go.

    `lookups` are pairs of places and the size of a table, `tables` the names of those that are parameters; `numbers`
    triples of the number of an op, places, and what their ids meet there; `mixed` why ids of a place meet what is no
    id, `changed` why they are computed with; `columns` ops that take a column of an input; `others` the numbers that
    values other than ids are computed with.
    """

    def __init__(self, inputs: Mapping[str, Tensor], module: Callable[[], str], names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self.lookups: list[tuple[frozenset[str], int]] = []
        self.numbers: list[tuple[int, frozenset[str], tuple[int, ...]]] = []
        self.tables: set[str] = set()
        self.mixed: dict[str, str] = {}
        self.changed: dict[str, str] = {}
        self.columns: dict[Place, str] = {}
        self.ops: list[tuple[str, str]] = []
        self.others: list[tuple[float, ...]] = []
        self._module = module
        self._names = names
        self._alive: list[Any] = [inputs]
        self._ids: dict[int, frozenset[str]] = {}
        self._whole: dict[int, str] = {}
        self._derived: set[int] = set()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._held: dict[int, frozenset[str]] = {}
        self._homes: set[int] = set()
        self._filled: dict[int, list[int]] = {}
        for where, tensor in inputs.items():
            if _whole_numbers(tensor):
                self._ids[id(tensor)] = self._ids.get(id(tensor), frozenset()) | {where}
                self._whole[id(tensor)] = where
                self._homes.add(_storage(tensor))
            self._derived.add(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = execute(func, args, kwargs)
        name, given, made = base_name(func), bound(func, args, kwargs), tensors_in(result)
        self._alive.append((args, kwargs, result))
        caller = self._module()
        nth = self._calls[caller, name]
        self._calls[caller, name] += 1
        self.ops.append((caller, name))
        if not any(self.places(t) for t in tensors_in(list(given.values()))):
            self.others.append(numbers(func, given)[1])
        self._note(name, given, made)
        if func._schema.is_mutable:
            self._write(name, made)
        else:
            self._homes.update(_storage(t) for t in made if self.places(t))
        for number, where in self._taken(name, given, made):
            self._ids[id(made[number])] = frozenset({where})
            self.columns[caller, name, nth, number] = where
        return result

    def places(self, tensor: Any) -> frozenset[str]:
        """The places whose ids a tensor holds."""
        if not isinstance(tensor, Tensor):
            return frozenset()
        return self._ids.get(id(tensor), frozenset()) | self._held.get(_storage(tensor), frozenset())

    def _note(self, name: str, given: Mapping[str, Any], made: tuple[Tensor, ...]) -> None:
        tensors = tensors_in(list(given.values()))
        for table, axis, index in _look_ups(name, given):
            if self.places(index):
                self.lookups.append((self.places(index), table.shape[axis]))
                self.tables.update({self._names[id(table)]} if id(table) in self._names else ())
        carried = self._carried(name, given)
        for tensor in (t for t in made if _whole_numbers(t)):
            if carried:
                self._ids[id(tensor)] = carried
        if any(id(t) in self._derived or self.places(t) for t in tensors):
            self._derived.update(map(id, made))
        if name in _FILLING:
            value = given.get("fill_value", given.get("value", int("ones" in name)))
            for tensor in (t for t in made if _whole_numbers(t) and isinstance(value, int)):
                self._filled.setdefault(_storage(tensor), []).extend([] if "empty" in name else [value])
        met = frozenset().union(*map(self.places, tensors)) if name in COMPARES | FILLS else frozenset()
        if met:
            told = [] if name in _JOINING else [v for v in given.values() if type(v) is int]
            self._meet(name, met, [*tensors, *told])
        if not any(name in ops for ops in (MOVES, POINTS, FILLS, NEUTRAL, UNRECORDED)):
            for t in tensors:
                self.changed |= dict.fromkeys(self.places(t), f"its ids are computed with: {self._where(name)}")
        if name in _PADDED and type(given.get(_PADDED[name])) is int:
            index = given["target" if "target" in given else "indices"]
            self.numbers.append((len(self.ops) - 1, self.places(index), (given[_PADDED[name]],)))

    def _meet(self, name: str, places: frozenset[str], values: list[Any]) -> None:
        """Ids of `places` and other values are compared, or stand in one tensor."""
        found: list[int] = []
        for value in values:
            if isinstance(value, int):
                found.append(value)
            elif self.places(value) or not _whole_numbers(value):
                continue
            elif _storage(value) in self._filled:
                found += self._filled[_storage(value)]
            elif id(value) in self._derived or value.is_meta:
                self.mixed |= dict.fromkeys(places, f"its ids meet other numbers: {self._where(name)}")
            elif name != "copy" or value is not values[0]:
                found += value.flatten().tolist()
        self.numbers.append((len(self.ops) - 1, places, tuple(found)))

    def _where(self, name: str) -> str:
        return f"{name} in {self._module() or 'the model'}"

    def _carried(self, name: str, given: Mapping[str, Any]) -> frozenset[str]:
        """The places whose ids are in what an op makes."""
        if name in MOVES | FILLS:
            return frozenset().union(*map(self.places, tensors_in(list(given.values()))))
        return self.places(given.get("self")) if name in _CARRYING else frozenset()

    def _write(self, name: str, made: tuple[Tensor, ...]) -> None:
        """Whatever shares memory with ids that were written holds ids, and what was in that memory before."""
        for tensor in filter(_whole_numbers, made):
            places, home = self.places(tensor), _storage(tensor)
            if not places:
                if name not in _FILLING:
                    self._filled.pop(home, None)
                continue
            if home in self._filled:
                self.numbers.append((len(self.ops) - 1, places, tuple(self._filled[home])))
            elif home not in self._homes:
                self.mixed |= dict.fromkeys(places, f"its ids stand among other numbers: {self._where(name)}")
            self._held[home] = places
            self._homes.add(home)

    def _taken(self, name: str, given: Mapping[str, Any], made: tuple[Tensor, ...]) -> Iterator[tuple[int, str]]:
        """For an op that takes single columns of an input, those of its results that are one, with their places."""
        source = given.get("self")
        where = self._whole.get(id(source))
        if where is None or not isinstance(source, Tensor):
            return
        if name in ("_to_copy", "clone", "detach", "alias"):
            self._whole[id(made[0])] = where
            return
        last = source.dim() - 1
        if name not in _TAKING or last < 1 or given["dim"] % source.dim() != last:
            return
        start = {"select": given.get("index"), "slice": given.get("start") or 0}.get(name, 0) or 0
        start += source.shape[last] if start < 0 else 0
        for number, tensor in enumerate(made):
            if tensor.dim() == last or tensor.shape[last] == 1:
                yield number, f"{where}[{start + number}]"


_JOINING = ("cat", "stack")
_CARRYING = ("index", "_unsafe_index", "index_select", "gather", "sort")
_TAKING = ("select", "slice", "unbind", "split")
# Ops that leave out one id, by the name of the argument that says which.
_PADDED = {
    "_embedding_bag": "padding_idx", "_embedding_bag_forward_only": "padding_idx", "nll_loss_forward": "ignore_index",
    "nll_loss2d_forward": "ignore_index",
}  # fmt: skip


def _look_ups(name: str, given: Mapping[str, Any]) -> Iterator[tuple[Tensor, int, Any]]:
    """The look-ups of an op: a table, its axis, and the positions."""
    if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
        yield given["weight"], 0, given["indices"]
    elif name in ("index", "_unsafe_index"):
        yield from ((given["self"], i, t) for i, t in enumerate(given["indices"]) if t is not None)
    elif name in ("index_select", "gather", "scatter", "scatter_add"):
        if given["self"].dim():
            yield given["self"], given["dim"], given["index"]
    elif name in ("nll_loss_forward", "nll_loss2d_forward"):
        yield given["self"], min(given["self"].dim() - 1, 1), given["target"]


def _whole_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
