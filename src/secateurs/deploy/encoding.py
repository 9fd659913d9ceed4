"""Python values as JSON and back: what modules keep in their attributes.

JSON's own types stand for themselves (a list is a list, an object is a dict with string keys). Everything else is an
object with one `$tag`: `{"$tuple": [3, 3]}`, `{"$dtype": "float32"}`, `{"$function": "torch.nn.functional:gelu"}`.
Lists, dicts, sets and objects that are met twice get an `$id` where they are first met and a `{"$ref": id}` later, so
that one config shared by all layers is one config again. Nothing of the file is executed: objects are made by
`object.__new__` and their `__dict__` is filled; no constructor, `__setstate__`, `__reduce__` or property setter runs.
"""

from __future__ import annotations

import collections
import enum
import functools
import math
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..core.errors import FileError
from .plain import TORCH_CONSTANTS, empty, is_number, slots
from .references import name_of

__all__ = ["Writer", "settled"]

_SCALARS = (bool, int, float, str)


class Writer:
    """Encodes values.

    Args:
        module: the path of a module.
        tensor: the name of a tensor's entry.
    """

    def __init__(self, module: Callable[[nn.Module], str], tensor: Callable[[Tensor], str]) -> None:
        self.module = module
        self.tensor = tensor
        self.uses: set[str] = set()
        self._nodes: dict[int, dict[str, Any]] = {}
        self._met: list[Any] = []
        self._shared = 0

    def __call__(self, value: Any) -> Any:
        """The JSON form of the value; call `settled` on it when all values have been encoded.

        Raises:
            FileError: the value cannot be stored. The message is a fact; the caller adds the place.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        node = self._nodes.get(id(value))
        if node is not None:
            if "$id" not in node:
                self._shared += 1
                node["$id"] = self._shared
            return {"$ref": node["$id"]}
        return _rule(value)(self, value)

    def name(self, target: Any) -> str:
        """The importable name of a class or function, noted among the names that the file uses."""
        name = name_of(target)
        self.uses.add(name)
        return name

    def begin(self, value: Any) -> dict[str, Any]:
        """The node of a value that has an identity; known from here on, so that what it contains may refer to it."""
        node: dict[str, Any] = {}
        self._nodes[id(value)] = node
        # A value that dies would leave its id to another.
        self._met.append(value)
        return node

    def pairs(self, mapping: Mapping[Any, Any]) -> list[list[Any]]:
        """Keys and values in order, for keys of any type."""
        return [[self(key), self(value)] for key, value in mapping.items()]

    def named(self, mapping: Mapping[Any, Any]) -> dict[str, Any]:
        """Values by name, for names that are strings and cannot be mistaken for a tag."""
        for key in mapping:
            if type(key) is not str or key[:1] == "$":
                raise FileError(f"the name {key!r} is no string or begins with '$'; rename it")
        return {key: self(value) for key, value in mapping.items()}

    def all(self, values: Sequence[Any]) -> list[Any]:
        """The values in order."""
        return [self(value) for value in values]


def settled(node: Any) -> Any:
    """The node in its final form: lists and dicts that nobody refers to become plain JSON."""
    if isinstance(node, list):
        return [settled(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$list"}:
        return settled(node["$list"])
    if node.keys() == {"$dict"} and all(type(key) is str and key[:1] != "$" for key, _ in node["$dict"]):
        return {key: settled(value) for key, value in node["$dict"]}
    return {key: settled(value) for key, value in node.items()}


def _float(write: Writer, value: float) -> Any:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _list(write: Writer, value: list[Any]) -> Any:
    node = write.begin(value)
    node["$list"] = write.all(value)
    return node


def _set(write: Writer, value: set[Any]) -> Any:
    node = write.begin(value)
    node["$set"] = write.all(_ordered(value))
    return node


def _ordered(values: set[Any] | frozenset[Any]) -> list[Any]:
    """Scalars in a fixed order, because that of strings changes from run to run; others as they come."""
    if all(type(value) in _SCALARS for value in values):
        return sorted(values, key=lambda value: (type(value).__name__, repr(value)))
    return list(values)


def _dict(write: Writer, value: dict[Any, Any]) -> Any:
    node = write.begin(value)
    node["$dict"] = write.pairs(value)
    return node


def _ordered_dict(write: Writer, value: collections.OrderedDict[Any, Any]) -> Any:
    node = write.begin(value)
    node["$ordered_dict"] = write.pairs(value)
    return node


def _default_dict(write: Writer, value: collections.defaultdict[Any, Any]) -> Any:
    node = write.begin(value)
    node["factory"] = write(value.default_factory)
    node["$default_dict"] = write.pairs(value)
    return node


def _partial(write: Writer, value: functools.partial[Any]) -> Any:
    return {"$partial": write(value.func), "args": write.all(value.args), "keywords": write.named(value.keywords)}


def _method(write: Writer, value: types.MethodType) -> Any:
    return {"$method": write.name(value.__func__), "self": write(value.__self__)}


def _function(write: Writer, value: Any) -> Any:
    return {"$function": write.name(value)}


def _class(write: Writer, value: type) -> Any:
    return {"$class": write.name(value)}


def _enum(write: Writer, value: enum.Enum) -> Any:
    if value.name is None or type(value).__members__.get(value.name) is not value:
        raise FileError(f"{value!r} is a combination of flags without a name; store its number instead")
    return {"$enum": write.name(type(value)), "member": value.name}


def _record(write: Writer, value: Any) -> Any:
    return {"$record": write.name(type(value)), "items": write.all(value)}


def _weakref(write: Writer, value: weakref.ref[Any]) -> Any:
    target = value()
    if not isinstance(target, (Tensor, nn.Module)):
        raise FileError("a weak reference leads to something that is no tensor or module of the model; delete it")
    return {"$weakref": write(target)}


def _numpy_scalar(write: Writer, value: numpy.generic) -> Any:
    if not is_number(value.dtype):
        raise FileError(f"it holds a numpy {value.dtype}; convert it to a Python value")
    return {"$numpy": value.dtype.name, "value": write(value.item())}


def _numpy_array(write: Writer, value: numpy.ndarray[Any, Any]) -> Any:
    if not is_number(value.dtype):
        raise FileError(f"it holds a numpy array of {value.dtype}; convert it to a list")
    node = write.begin(value)
    node["$array"] = write.tensor(torch.from_numpy(numpy.array(value, order="C")))
    return node


def _torch_constant(write: Writer, value: Any) -> Any:
    tag = next(tag for tag, kind in TORCH_CONSTANTS.items() if isinstance(value, kind))
    return {tag: str(value).removeprefix("torch.")}


def _object(write: Writer, value: Any) -> Any:
    """A plain object, or a dict of a class of its own, by its class, its state and its items."""
    cls = type(value)
    try:
        empty(cls)
    except TypeError as error:
        raise FileError(f"it holds a {cls.__module__}.{cls.__qualname__}, which is not plain data") from error
    state = {key: getattr(value, key) for key in slots(cls) if hasattr(value, key)} | getattr(value, "__dict__", {})
    node = write.begin(value)
    node["$object"] = write.name(cls)
    node["state"] = write.named(state)
    if isinstance(value, dict):
        node["items"] = [[write(key), write(item)] for key, item in dict.items(value)]
    return node


_WRITE: dict[type, Callable[[Writer, Any], Any]] = {
    float: _float,
    tuple: lambda write, value: {"$tuple": write.all(value)},
    list: _list,
    set: _set,
    frozenset: lambda write, value: {"$frozenset": write.all(_ordered(value))},
    dict: _dict,
    collections.OrderedDict: _ordered_dict,
    collections.defaultdict: _default_dict,
    slice: lambda write, value: {"$slice": write.all((value.start, value.stop, value.step))},
    range: lambda write, value: {"$range": [value.start, value.stop, value.step]},
    torch.Size: lambda write, value: {"$size": list(value)},
    torch.device: lambda write, value: {"$device": str(value)},
    **dict.fromkeys(TORCH_CONSTANTS.values(), _torch_constant),
    functools.partial: _partial,
    types.MethodType: _method,
    types.FunctionType: _function,
    types.BuiltinFunctionType: _function,
    weakref.ref: _weakref,
    numpy.ndarray: _numpy_array,
}

_WRITE_INSTANCES: tuple[tuple[type, Callable[[Writer, Any], Any]], ...] = (
    (nn.Module, lambda write, value: {"$module": write.module(value)}),
    (Tensor, lambda write, value: {"$tensor": write.tensor(value)}),
    (enum.Enum, _enum),
    (type, _class),
    (numpy.generic, _numpy_scalar),
)


def _rule(value: Any) -> Callable[[Writer, Any], Any]:
    """The rule of a value: by its exact type, else by what it is an instance of, else as a plain object."""
    exact = _WRITE.get(type(value))
    if exact is not None:
        return exact
    for kind, rule in _WRITE_INSTANCES:
        if isinstance(value, kind):
            return rule
    return _record if isinstance(value, tuple) and hasattr(value, "_fields") else _object
