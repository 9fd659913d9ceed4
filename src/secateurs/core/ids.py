"""Ids: integers among a model's inputs that are numbers of rows of a table, and their numbers once rows have gone.

Where an input stands is its *place*: "0", "1" … for positional arguments, the name of a keyword, "1.0" for the first
item of a list that is the second argument, and "0[3]" for column 3 of the last axis of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from .batch import split
from .errors import DataError, OptionError

__all__ = ["LABELS", "Recoded", "column", "located", "recoded", "recoded_batch", "renumbered"]

# The place of what a model's output is compared with.
LABELS = "labels"


def renumbered(ids: Tensor, kept: Tensor, unknown: int | None = None) -> Tensor:
    """The new number of each id: its place among those that were kept. Negative ids, such as -100, are none and stay.

    Args:
        ids: integers of any shape.
        kept: int64 [rows left], the ids that were kept, ascending; `kept[renumbered(ids, kept)]` are the ids again.
        unknown: the id, in the old numbering, that stands for ids that were removed. Default: none may occur.

    Raises:
        DataError: an id was removed and there is no `unknown`; the message names the first.
        OptionError: `unknown` itself was removed.

    >>> renumbered(torch.tensor([7, 2, -100]), torch.tensor([0, 2, 7]))
    tensor([   2,    1, -100])
    """
    known = kept.to(ids.device)
    places = torch.searchsorted(known, ids.long().contiguous()).clamp(max=len(known) - 1)
    gone = (known[places] != ids) & (ids >= 0)
    if bool(gone.any()):
        places = torch.where(gone, _stand_in(int(ids[gone][0]), kept, unknown), places)
    return torch.where(ids < 0, ids, places.to(ids.dtype))


def _stand_in(gone: int, kept: Tensor, unknown: int | None) -> int:
    if unknown is None:
        raise DataError(
            f"id {gone} was removed, and {len(kept)} others were kept: give unknown=, an id that stands for those that "
            "were removed, or data without it."
        )
    found = (kept == unknown).nonzero().flatten()
    if not len(found):
        raise OptionError(f"unknown={unknown} was removed itself; it must be an id that was kept.")
    return int(found[0])


def located(inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of example inputs with its place."""
    yield from _walked("", inputs if isinstance(inputs, tuple) or hasattr(inputs, "items") else (inputs,))


def _walked(around: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield around, tree
        return
    items = tree.items() if hasattr(tree, "items") else enumerate(tree) if isinstance(tree, (tuple, list)) else ()
    for name, value in items:
        yield from _walked(f"{around}.{name}" if around else str(name), value)


def column(place: str) -> tuple[str, int | None]:
    """The place of the tensor, and which column of its last axis is meant; None for all.

    >>> column("0[3]"), column("ids")
    (('0', 3), ('ids', None))
    """
    name, bracket, number = place.partition("[")
    return name, int(number[:-1]) if bracket else None


def recoded(inputs: Any, kept: Mapping[str, Tensor], unknown: int | None = None) -> Any:
    """`inputs` (as a model takes them) with the ids at the places that `kept` names renumbered; see `renumbered`.

    >>> recoded({"ids": torch.tensor([4, 2])}, {"ids": torch.tensor([2, 4])})
    {'ids': tensor([1, 0])}
    """
    if isinstance(inputs, tuple) or hasattr(inputs, "items"):
        return _mapped("", inputs, kept, unknown)
    return _mapped("0", inputs, kept, unknown)


def recoded_batch(batch: Any, kept: Mapping[str, Tensor], unknown: int | None = None) -> Any:
    """`batch` (see `core.batch`) with its ids renumbered, those of its target, whose place is "labels", too."""
    inputs, target = split(batch)
    made = recoded(inputs, kept, unknown)
    if not isinstance(batch, (tuple, list)):
        return made
    if len(batch) == 1:
        return [made] if isinstance(batch, list) else (made,)
    whole = (*(made if len(batch) > 2 else (made,)), _mapped(LABELS, target, kept, unknown))
    return list(whole) if isinstance(batch, list) else whole


class Recoded:
    """Batches whose ids are renumbered as they are read; see `recoded_batch`.

    Args:
        data: batches, or a function from the number of a pass to batches; what is made of it can be used as either.
        kept, unknown: as for `recoded`.
    """

    def __init__(self, data: Any, kept: Mapping[str, Tensor], unknown: int | None = None) -> None:
        self._data = data
        self._kept = kept
        self._unknown = unknown

    def __iter__(self) -> Iterator[Any]:
        return (recoded_batch(batch, self._kept, self._unknown) for batch in self._data)

    def __length_hint__(self) -> int:
        return length_hint(self._data)

    def __call__(self, epoch: int) -> Recoded:
        data = self._data(epoch) if callable(self._data) else self._data
        return Recoded(data, self._kept, self._unknown)


def _mapped(place: str, tree: Any, kept: Mapping[str, Tensor], unknown: int | None) -> Any:
    if isinstance(tree, Tensor):
        return _at(place, tree, kept, unknown)
    if hasattr(tree, "items"):
        return {k: _mapped(f"{place}.{k}" if place else str(k), v, kept, unknown) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        made = [_mapped(f"{place}.{i}" if place else str(i), v, kept, unknown) for i, v in enumerate(tree)]
        return tree._make(made) if hasattr(tree, "_make") else type(tree)(made)
    return tree


def _at(place: str, tensor: Tensor, kept: Mapping[str, Tensor], unknown: int | None) -> Tensor:
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    if place in kept:
        return renumbered(tensor, kept[place], unknown)
    columns = {number: kept[key] for key in kept for name, number in [column(key)] if name == place}
    if not columns:
        return tensor
    out = tensor.clone()
    for number, rows in columns.items():
        out[..., number] = renumbered(tensor[..., number], rows, unknown)
    return out
