"""Where a checkpoint has what transformers renames, or stacks, when it loads a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import conversion_mapping, core_model_loading

from .shards import Rows

__all__ = ["stored_as"]


def stored_as(model: Any, stored: Iterable[str]) -> dict[str, str | Rows]:
    """Of the model's tensors that loading does no more than rename or stack: the stored name, or the rows of names.

    Args:
        model: of transformers.
        stored: names of the checkpoint's tensors.
    """
    changes = conversion_mapping.get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, core_model_loading.WeightConverter)]
    renamings: list[Any] = [change for change in changes if change not in converters]
    own = model.state_dict()
    found: dict[str, dict[str | None, list[str]]] = {}
    # Experts by number: 2 before 10.
    for name in sorted(stored, key=core_model_loading.dot_natural_key):
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )  # fmt: skip
        found.setdefault(renamed, {}).setdefault(pattern, []).append(name)
    known = {name: _place(by_pattern, converters) for name, by_pattern in found.items() if name in own}
    # Of a stack no matrix is missing.
    whole = {name for name, place in known.items() if isinstance(place, str) or len(place or ()) == len(own[name])}
    return {name: place for name, place in known.items() if place is not None and name in whole}


def _place(by_pattern: Mapping[str | None, Sequence[str]], converters: Sequence[Any]) -> str | Rows | None:
    if list(by_pattern) == [None]:
        return by_pattern[None][0] if len(by_pattern[None]) == 1 else None
    for converter in converters:
        if set(converter.source_patterns) == set(by_pattern) and _stacks(converter.operations):
            columns = [by_pattern[pattern] for pattern in converter.source_patterns]
            return tuple(zip(*columns, strict=True)) if len(set(map(len, columns))) == 1 else None
    return None


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether the operations stack matrices that were put one under the other."""
    told = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in operations]
    return told in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
