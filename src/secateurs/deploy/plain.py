"""What writing and reading of plain values agree on."""

from __future__ import annotations

import collections
from typing import Any

import numpy
import torch

__all__ = ["TORCH_CONSTANTS", "base_of", "empty", "is_number", "slots"]

# Singletons that are attributes of `torch`, by the tag that they are written under.
TORCH_CONSTANTS = {"$dtype": torch.dtype, "$memory_format": torch.memory_format, "$layout": torch.layout}


def base_of(cls: type) -> Any:
    """The built-in class that makes and fills instances, so that nothing that `cls` overrides runs."""
    return next((base for base in (collections.OrderedDict, dict) if issubclass(cls, base)), object)


def empty(cls: type) -> Any:
    """An instance without content; no constructor runs.

    Raises:
        TypeError: Python keeps the content of such instances out of sight (a lock, a file, a generator).
    """
    return base_of(cls).__new__(cls)


def slots(cls: type) -> list[str]:
    """Names of the slots of a class and its bases, without those of the interpreter."""
    found = []
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def is_number(dtype: numpy.dtype[Any]) -> bool:
    """Whether both JSON and torch have such numbers."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8
