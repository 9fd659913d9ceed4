"""Strict reading of JSON objects: every field is expected, every expected field is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..core.errors import FileError

__all__ = ["checked"]


def checked(node: Any, place: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()) -> dict[str, Any]:
    """The node itself, if it is a JSON object with all required and no unknown fields.

    Raises:
        FileError: it is something else, a field is missing, or one is unknown. The message is a fact; the caller adds
            the file.
    """
    if not isinstance(node, dict):
        raise FileError(f"{place} should be a JSON object, not {type(node).__name__}")
    needed = set(required)
    missing = sorted(needed - node.keys())
    unknown = sorted(node.keys() - needed - set(optional))
    if missing:
        raise FileError(f"{place} lacks the field {missing[0]!r}")
    if unknown:
        raise FileError(f"{place} has the unknown field {unknown[0]!r}")
    return node
