"""Ids that a model holds as numbers: `padding_idx` of a table, `pad_token_id` and the like of a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...core.dims import ONE, Atom, Dim
from ...core.errors import PlanError
from ..mend import holder_at

__all__ = [
    "CONFIGS",
    "id_numbers",
    "renumber",
    "shuffle",
    "shuffled",
    "special_ids",
    "tables_of_numbers",
    "vocabulary_sizes",
]

_HELD = re.compile(r"token_ids?$|token_index$|(^|_)(pad|padding|eos|bos|sos|unk|mask|sep|cls)_(id|idx|index)$")
_COUNTING = re.compile(r"(^|_)vocab_size$|^num_embeddings$")
# Lists of a generation config of which an id that was removed is left out, since nothing can produce it any more.
_BANNED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# Lists of lists, each of which goes as a whole.
_PHRASES = "bad_words_ids"
CONFIGS = ("config", "generation_config")
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_Key = TypeVar("_Key")


def tables_of_numbers(model: nn.Module, tables: Collection[str]) -> dict[str, str]:
    """For each attribute that holds an id, or a list of ids, the name of the table whose rows it numbers.

    Attributes are given as `path.name`, where a path may lead through a config.

    Args:
        tables: the tables in which inputs are looked up: a module with one of them means that one by its ids.
    """
    found: dict[str, str] = {}
    for path, holder, table in _held_beside(model, tables):
        found |= dict.fromkeys(_held(path, holder, model.get_parameter(table).shape[0]), table)
    return found


def _held_beside(model: nn.Module, looked_up: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    """Each module and config with its path and the name of the table that its ids are rows of, if there is one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables: dict[str, Tensor | None] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        around = tables.get(path.rpartition(".")[0]) if path else None
        own = module.weight if isinstance(module, _TABLES) else _table_of(module, names, looked_up)
        weight = tables[path] = around if own is None else own
        for holder_path, holder in _holders(path, module) if id(weight) in names else ():
            if id(holder) not in seen:
                seen.add(id(holder))
                yield holder_path, holder, names[id(weight)]


def _table_of(module: nn.Module, names: Mapping[int, str], looked_up: Collection[str]) -> Tensor | None:
    """The table in which a module looks up its input: as transformers says it, or the only one that it has."""
    inside: dict[str, Tensor] = {names[id(p)]: p for p in module.parameters() if names[id(p)] in looked_up}
    try:
        weight = getattr(module.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    except Exception:  # noqa: BLE001  (a module without that method, or whose method refuses, says nothing)
        return next(iter(inside.values())) if len(inside) == 1 else None
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _holders(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield path, module
    for name in CONFIGS:
        if hasattr(getattr(module, name, None), "to_dict"):
            yield f"{path}.{name}" if path else name, getattr(module, name)


def _held(path: str, holder: Any, rows: int) -> Iterator[str]:
    for name, value in vars(holder).items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        ids = [v for some in listed for v in (some if isinstance(some, (list, tuple)) else [some])]
        whole = bool(ids) and all(type(v) is int and 0 <= v < rows for v in ids)
        if whole and not name.startswith("__") and (_HELD.search(name) or name in _BANNED):
            yield f"{path}.{name}" if path else name


def id_numbers(model: nn.Module, tables: Collection[str]) -> dict[str, int]:
    """For each attribute that holds ids, how many rows their table has; `tables` as for `tables_of_numbers`."""
    return {key: model.get_parameter(table).shape[0] for key, table in tables_of_numbers(model, tables).items()}


def special_ids(model: nn.Module, keys: Mapping[str, _Key]) -> dict[_Key, set[int]]:
    """The ids that attributes hold and that must therefore stay, by what `keys` says of each attribute."""
    found: dict[_Key, set[int]] = {}
    for key, group in keys.items():
        holder, name = _holder(model, key)
        value = getattr(holder, name)
        if name not in _BANNED:
            found.setdefault(group, set()).update(value if isinstance(value, (list, tuple)) else [value])
    return found


def shuffled(rows: int, seed: int) -> list[int]:
    """Another number for each id, at random: what is computed from an id in another way seldom gets it, too."""
    cycle = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    numbers: list[int] = torch.empty_like(cycle).index_copy_(0, cycle, cycle.roll(1)).tolist()
    return numbers


def shuffle(model: nn.Module, key: str, numbers: Sequence[int]) -> None:
    """Gives the ids that an attribute holds other numbers, in place."""
    _change(model, key, lambda value: numbers[value])


def renumber(model: nn.Module, keys: Mapping[str, str], keep: Mapping[str, Tensor]) -> None:
    """Gives the ids that attributes hold their new numbers, in place.

    Args:
        keys: for each attribute the group of the rows that it numbers.
        keep: bool [rows] for each group; one without it stays whole.

    Raises:
        PlanError: an attribute holds an id that goes.
    """
    for key, group in keys.items():
        if group in keep and not bool(keep[group].all()):
            new = dict(zip(keep[group].nonzero().flatten().tolist(), range(len(keep[group])), strict=False))
            _change(model, key, lambda value, new=new, key=key: _number(new, value, key))  # type: ignore[misc]


def _number(new: Mapping[int, int], value: int, key: str) -> int | None:
    if value not in new and key.rpartition(".")[2] not in _BANNED:
        raise PlanError(f"id {value} is that of {key}, so that it cannot go: keep it.")
    return new.get(value)


def _change(model: nn.Module, key: str, change: Callable[[int], int | None]) -> None:
    holder, name = _holder(model, key)

    def changed(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return change(value)
        made = [changed(v) for v in value]
        if name == _PHRASES and None in made and type(value[0]) is int:
            return None
        return type(value)(v for v in made if v is not None)

    setattr(holder, name, changed(getattr(holder, name)))


def _holder(model: nn.Module, key: str) -> tuple[Any, str]:
    """The object that has the attribute, and the attribute's name."""
    path, _, name = key.rpartition(".")
    return holder_at(model, path), name


def vocabulary_sizes(model: nn.Module, dims: Mapping[str, Dim]) -> dict[str, Dim]:
    """The attributes that say how many rows a table has, by what they equal.

    Args:
        dims: by name of a table what its rows are made of; only tables of which rows can go.
    """
    found: dict[str, Dim] = {}
    for path, holder, table in _held_beside(model, dims):
        for name in (n for n in vars(holder) if _COUNTING.search(n)):
            rows = [dims.get(table, ONE), *dims.values()]
            fitting = dict.fromkeys(d for d in rows if isinstance(d, Atom) and d.n == getattr(holder, name))
            if fitting and (len(fitting) == 1 or rows[0] in fitting):
                found[f"{path}.{name}" if path else name] = next(iter(fitting))
    return found
