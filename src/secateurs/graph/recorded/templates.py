"""Arguments and results of calls as plain JSON, with names where tensors were: what a traced forward is written in.

None, booleans, numbers, strings and lists stand for themselves. Everything else is an object with one `$tag`:

    {"$value": "3.0"}              a tensor (or any other object) that an earlier step returned or the caller gave
    {"$tensor": "norm.weight"}     a parameter, buffer or tensor attribute of the module
    {"$number": 2}                 an integer of the step that may be edited
    {"$batch": ["times", per]}     times * batch // per
    {"$training": [on, off]}       one of two constants, by whether the module trains
    {"$dtype": "float32"}          "input": that of the first floating-point input; {"$device": …} likewise
    {"$tuple": […]}, {"$slice": [start, stop, step]}, {"$dict": {…}}, {"$record": "package.module:Class", "fields": {…}}

In patterns, which are held against values instead of built, `{"$ignored": "int"}` fits any integer.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...core.errors import FileError, ModelError

__all__ = ["Build", "built", "check", "described", "fitted", "mapped", "tag_of"]

# Singletons that are attributes of `torch`, by their tags.
_CONSTANTS = {"$dtype": torch.dtype, "$memory_format": torch.memory_format, "$layout": torch.layout}

Build = Callable[[Any], Any]


def tag_of(node: Mapping[str, Any]) -> str:
    """The tag of an object."""
    return next(iter(node), "")


def described(value: Any, other: Callable[[Any], Any], integer: Callable[[int], Any] = int) -> Any:
    """The JSON form of a value.

    Args:
        other: the form of what is no plain data, such as a tensor.
        integer: the form of an integer. Default: the integer itself.
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return integer(value)
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is list:
        return [described(v, other, integer) for v in value]
    if isinstance(value, slice):
        return {"$slice": [described(v, other, integer) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"$ellipsis": True}
    for tag, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    fields = _fields(value)
    if fields is not None:
        inner = {name: described(v, other, integer) for name, v in fields.items()}
        return {"$dict": inner} if type(value) is dict else {"$record": _name(type(value)), "fields": inner}
    if isinstance(value, tuple):
        return {"$tuple": [described(v, other, integer) for v in value]}
    return other(value)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _fields(value: Any) -> dict[str, Any] | None:
    """What a dict with string keys, a named tuple or a dataclass holds by name; None for anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if type(value) is dict or isinstance(value, collections.OrderedDict):
        return dict(value) if all(type(key) is str for key in value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _record_class(name: str) -> Any:
    """The class of records of that name. Nothing is imported, so that a file cannot have code imported.

    Raises:
        FileError: its module was not imported, or it is no named tuple, dataclass or ordered dict.
    """
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = vars(found).get(part) if found is not None else None
        if not isinstance(found, type):
            raise FileError(f"the class {name!r} of an output is not known here; import {module!r} first")
    named = issubclass(found, tuple) and hasattr(found, "_fields")
    if named or found is collections.OrderedDict or dataclasses.is_dataclass(found):
        return found
    raise FileError(f"{name!r} is no class of records: a named tuple, a dataclass or an ordered dict is allowed")


def _record(name: str, fields: Mapping[str, Any]) -> Any:
    cls: Any = _record_class(name)
    if issubclass(cls, tuple):
        return tuple.__new__(cls, fields.values())
    if issubclass(cls, collections.OrderedDict):
        # A model output takes keywords, an ordered dict takes pairs.
        return cls(**fields) if hasattr(cls, "__dataclass_fields__") else cls(fields)
    made: Any = object.__new__(cls)
    for key, value in fields.items():
        object.__setattr__(made, key, value)
    return made


def built(node: Any, read: Mapping[str, Build]) -> Any:
    """The value that a node stands for.

    Args:
        read: for tags that need the run (`$value`, `$number` …), what their content stands for.
    """
    if isinstance(node, list):
        return [built(n, read) for n in node]
    if not isinstance(node, dict):
        return node
    tag = tag_of(node)
    if tag in read:
        return read[tag](node[tag])
    if tag == "$tuple":
        return tuple(built(n, read) for n in node["$tuple"])
    if tag == "$slice":
        return slice(*(built(n, read) for n in node["$slice"]))
    if tag == "$dict":
        return {key: built(n, read) for key, n in node["$dict"].items()}
    if tag == "$record":
        return _record(node["$record"], {key: built(n, read) for key, n in node["fields"].items()})
    if tag == "$float":
        return float(node["$float"])
    if tag == "$ellipsis":
        return ...
    if tag in _CONSTANTS:
        return getattr(torch, node[tag])
    raise FileError(f"a value has the unknown form {sorted(node)}")


def check(node: Any, integers: int, place: str) -> None:
    """Refuse a node that no recording wrote.

    Args:
        integers: how many numbers the step has.

    Raises:
        FileError: at `place` stands something that is malformed or not allowed.
    """
    if isinstance(node, list):
        inner = node
    elif not isinstance(node, dict):
        inner = []
    elif tag_of(node) in ("$tuple", "$slice", "$training"):
        inner = node[tag_of(node)]
    elif tag_of(node) == "$dict":
        inner = list(node["$dict"].values())
    elif tag_of(node) == "$record":
        _record_class(node["$record"])
        inner = list(node["fields"].values())
    else:
        inner = []
        content = node.get(tag_of(node))
        if tag_of(node) not in _LEAVES or not _LEAVES[tag_of(node)](content, integers):
            raise FileError(f"{place} has the unknown form {node!r}")
    for each in inner:
        check(each, integers, place)


def _is_number(content: Any, integers: int) -> bool:
    return type(content) is int and 0 <= content < integers


def _is_constant(tag: str) -> Callable[[Any, int], bool]:
    def rule(content: Any, _integers: int) -> bool:
        follows = tag == "$dtype" and content == "input"
        return follows or (isinstance(content, str) and isinstance(getattr(torch, content, None), _CONSTANTS[tag]))

    return rule


def _is_text(content: Any, _integers: int) -> bool:
    return isinstance(content, str)


def _is_share(content: Any, integers: int) -> bool:
    times, per = content
    counted = isinstance(times, dict) and tag_of(times) == "$number" and _is_number(times["$number"], integers)
    return type(per) is int and per > 0 and (counted or type(times) is int)


_LEAVES: dict[str, Callable[[Any, int], bool]] = {
    **dict.fromkeys(("$value", "$tensor", "$ignored", "$device", "$float"), _is_text),
    **{tag: _is_constant(tag) for tag in _CONSTANTS},
    "$number": _is_number,
    "$batch": _is_share,
    "$ellipsis": lambda content, _: content is True,
}


def fitted(pattern: Any, value: Any, values: dict[str, Any], what: str) -> None:
    """Put what `pattern` names in `value` into `values`.

    Raises:
        ModelError: the value is not of the recorded form; `what` says which value.
    """
    if not _fits(pattern, value, values):
        raise ModelError(
            f"{what} is not as it was when this module was traced: its form or a constant in it differs. "
            "Call it as it was called then, or prune the model with the calls that you need as example inputs."
        )


def _fits(pattern: Any, value: Any, values: dict[str, Any]) -> bool:
    if isinstance(pattern, dict):
        tag = tag_of(pattern)
        if tag == "$value":
            return not isinstance(value, _PLAIN) and values.setdefault(pattern["$value"], value) is value
        if tag == "$ignored":
            return True
        if tag == "$tuple":
            plain = isinstance(value, tuple) and not hasattr(value, "_fields")
            return plain and _all_fit(pattern["$tuple"], list(value), values)
        if tag in ("$dict", "$record"):
            return _fields_fit(pattern, value, values)
        return bool(pattern == described(value, lambda _: None))
    if isinstance(pattern, list):
        return isinstance(value, list) and _all_fit(pattern, value, values)
    return type(pattern) is type(value) and bool(pattern == value)


def _fields_fit(pattern: dict[str, Any], value: Any, values: dict[str, Any]) -> bool:
    fields, inner = _fields(value), pattern.get("$dict", pattern.get("fields", {}))
    name = None if type(value) is dict else _name(type(value))
    if fields is None or pattern.get("$record") != name or inner.keys() != fields.keys():
        return False
    return _all_fit(list(inner.values()), [fields[key] for key in inner], values)


# What has no name of its own, and so was a constant or a container if it was there.
_PLAIN = (type(None), bool, int, float, str, list, tuple, dict)


def _all_fit(patterns: list[Any], given: list[Any], values: dict[str, Any]) -> bool:
    return len(patterns) == len(given) and all(_fits(p, v, values) for p, v in zip(patterns, given, strict=True))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with everything in it that is no plain data replaced by what `change` makes of it."""
    kept: dict[str, Any] = {}

    def keep(inner: Any) -> Any:
        kept[str(len(kept))] = change(inner)
        return {"$value": str(len(kept) - 1)}

    return built(described(value, keep), {"$value": kept.__getitem__})
