"""Ops by what they make of ids: numbers that may be given anew, in the old order."""

from __future__ import annotations

__all__ = ["COMPARES", "FILLS", "NEUTRAL"]

COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "isin"})
_MAKES = [f"{new}{what}" for what in ("zeros", "ones", "full", "empty") for new in ("", "new_")]
# Ops that compare, that look at order alone, or at no value: to them ids with new numbers are what they were.
NEUTRAL = COMPARES | {"argmax", "argmin", "sort", *_MAKES, *(f"{name}_like" for name in _MAKES)}
# Ops that put ids among others, or others among ids.
FILLS = frozenset({"where", "masked_fill", "copy", "fill", "constant_pad_nd", "cat", "stack"})
