"""The same samples in batches of another size, whatever the batches are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.derivatives import samples_in
from ..criteria.evidence import mapped

__all__ = ["rebatched"]


def rebatched(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The same samples in batches of `size`; fewer at the end are left out, unless they are all.

    Args:
        batches: as in `core.batch`, all of one structure; every tensor has the samples along its first axis.
        size: 1 or more.
    """
    held, some = None, False
    for batch in batches:
        held = batch if held is None else _joined(held, batch)
        while samples_in(held) >= size:
            yield mapped(held, lambda leaf: leaf[:size])
            held, some = mapped(held, lambda leaf: leaf[size:]), True
    if held is not None and not some:
        yield held


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(a, b) for a, b in zip(first, second, strict=True))
    return {name: _joined(value, second[name]) for name, value in first.items()}
