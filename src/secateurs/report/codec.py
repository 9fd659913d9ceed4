"""Frozen dataclasses as JSON values and back, strictly: what their type hints do not promise is refused."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..core.errors import FileError, OptionError

__all__ = ["decode", "encode", "plain", "settle"]

T = TypeVar("T")
_PLAIN = frozenset({bool, float, int, str, type(None)})
# JSON has no word for these; as strings they can stand only where a number is promised.
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def settle(data: Any) -> None:
    """None; the fields of a frozen dataclass are `plain` but for dataclasses in them: for its `__post_init__`."""
    for field in dataclasses.fields(data):
        object.__setattr__(data, field.name, _settled(getattr(data, field.name)))


def _settled(node: Any) -> Any:
    if dataclasses.is_dataclass(node):
        return node
    return tuple(map(_settled, node)) if isinstance(node, (list, tuple)) else plain(node)


def plain(node: Any) -> Any:
    """`node` as values that survive JSON: lists as tuples, mappings as dicts, scalars of arrays as numbers.

    Strings, numbers, booleans and None stay; anything else becomes its `str()`.
    """
    if type(node) in _PLAIN:
        return node
    if isinstance(node, (str, bool, int, float)):
        return _without_subclass(node)
    if isinstance(node, Mapping):
        return {str(key): plain(item) for key, item in node.items()}
    if isinstance(node, (list, tuple)):
        return tuple(plain(item) for item in node)
    if getattr(node, "ndim", None) == 0:
        return plain(node.item())
    return str(node)


def _without_subclass(node: Any) -> Any:
    """An enumeration's string or a NumPy float as the bare value, which is what JSON gives back."""
    for base in (bool, int, float, str):
        if isinstance(node, base):
            own = getattr(node, "value", node)
            return base(own if isinstance(own, base) else node)
    return node


def encode(node: Any) -> Any:
    """`node`, a dataclass or what `plain` returns, as JSON values; numbers that are not finite as strings."""
    if dataclasses.is_dataclass(node):
        return {field.name: encode(getattr(node, field.name)) for field in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {key: encode(item) for key, item in node.items()}
    if isinstance(node, tuple):
        return [encode(item) for item in node]
    if isinstance(node, float) and not math.isfinite(node):
        return next(word for word, meant in _NOT_FINITE.items() if repr(meant) == repr(node))
    return node


def decode(kind: type[T], node: Any, place: str) -> T:
    """The dataclass `kind` that `encode` wrote as `node`.

    Args:
        kind: a dataclass; fields with a default may be missing.
        node: JSON values.
        place: what `node` is called in an error.

    Raises:
        FileError: a field is unknown, missing or of another type; the message is a fact, the caller adds the file.
    """
    if not isinstance(node, Mapping):
        raise FileError(f"{place} should be a JSON object, not {type(node).__name__}")
    hints = _hints(kind)  # type: ignore[arg-type]  # mypy does not take type[T] for hashable
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in node:
        if name not in known:
            raise FileError(f"{place} has the unknown field {name!r}")
    for name, field in known.items():
        if name not in node and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FileError(f"{place} lacks the field {name!r}")
    values = {name: _read(hints[name], item, f"{place}.{name}") for name, item in node.items()}
    try:
        return kind(**values)
    except OptionError as error:
        raise FileError(f"{place}: {str(error).rstrip('.')}") from error


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Type hints by field; kept, since reading them means evaluating text and a report has a thousand layers."""
    return get_type_hints(kind)


def _read(hint: Any, node: Any, place: str) -> Any:
    if hint is Any:
        return plain(node)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return decode(hint, node, place)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (wanted,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if node is None else _read(wanted, node, place)
    if origin is Literal:
        return _one_of(arguments, node, place)
    if origin is tuple:
        return _tuple(arguments, node, place)
    if origin is Mapping:
        if not isinstance(node, Mapping):
            raise FileError(f"{place} should be a JSON object, not {type(node).__name__}")
        return {key: _read(arguments[1], item, f"{place}[{key!r}]") for key, item in node.items()}
    return _scalar(hint, node, place)


def _one_of(allowed: Sequence[str], node: Any, place: str) -> Any:
    if node in allowed:
        return node
    raise FileError(f"{place} should be {' or '.join(map(repr, allowed))}, not {node!r}")


def _tuple(arguments: Sequence[Any], node: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(node, (list, tuple)):
        raise FileError(f"{place} should be a JSON array, not {type(node).__name__}")
    if arguments[-1] is Ellipsis:
        return tuple(_read(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(node))
    if len(node) != len(arguments):
        raise FileError(f"{place} should have {len(arguments)} entries, not {len(node)}")
    return tuple(_read(hint, item, f"{place}[{i}]") for i, (hint, item) in enumerate(zip(arguments, node, strict=True)))


def _scalar(hint: type, node: Any, place: str) -> Any:
    if hint is float and isinstance(node, str) and node in _NOT_FINITE:
        return _NOT_FINITE[node]
    allowed = (int, float) if hint is float else hint
    # A boolean is an int to Python; to a reader of the file it is not.
    if isinstance(node, allowed) and isinstance(node, bool) == (hint is bool):
        return node
    raise FileError(f"{place} should be of type {hint.__name__}, not {type(node).__name__}")
