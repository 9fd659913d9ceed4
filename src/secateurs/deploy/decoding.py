"""Python values from the JSON that `encoding` made of them: one rule a tag.

Nothing of the file is executed. Objects are made empty and their `__dict__` is filled; no constructor, `__setstate__`,
`__reduce__` or property setter runs, and classes and functions are found by `references.resolve`, which refuses what
is not allowed.
"""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..core.errors import FileError
from .plain import TORCH_CONSTANTS, base_of, empty, is_number, slots
from .references import Kind, resolve

__all__ = ["Reader"]


class Reader:
    """Decodes values.

    Args:
        module: the module at a path.
        tensor: the tensor of an entry.
        uses: the names that the file declares.
        trust: packages that the caller vouches for.
    """

    def __init__(
        self,
        module: Callable[[str], nn.Module],
        tensor: Callable[[str], Tensor],
        uses: Sequence[str],
        trust: Sequence[str],
    ) -> None:
        self.module = module
        self.tensor = tensor
        self._uses = frozenset(uses)
        self._trust = trust
        self._shared: dict[int, Any] = {}
        self._resolved: dict[tuple[str, Kind], Any] = {}

    def __call__(self, node: Any) -> Any:
        """The value that the node stands for.

        Raises:
            FileError: the node is malformed or names something that is not allowed.
        """
        if isinstance(node, list):
            return [self(item) for item in node]
        if not isinstance(node, dict):
            return node
        tags = [key for key in node if key[:1] == "$" and key != "$id"]
        if not tags and "$id" not in node:
            return {key: self(value) for key, value in node.items()}
        if len(tags) != 1 or tags[0] not in _READ:
            raise FileError(f"a value has the unknown form {sorted(node)}")
        return _READ[tags[0]](self, node)

    def find(self, name: Any, kind: Kind) -> Any:
        """The class or function of that name, fit for such a place."""
        if name not in self._uses:
            raise FileError(f"{name!r} is used but not declared under 'uses'")
        if (name, kind) not in self._resolved:
            self._resolved[name, kind] = resolve(name, kind, self._trust)
        return self._resolved[name, kind]

    def begin(self, node: Mapping[str, Any], shell: Any) -> Any:
        """The still empty value, known by its id from here on."""
        if "$id" in node:
            self._shared[node["$id"]] = shell
        return shell

    def again(self, node: Mapping[str, Any]) -> Any:
        """The value that was met before under this id."""
        if node["$ref"] not in self._shared:
            raise FileError(f"a value refers to {node['$ref']!r}, which was not met before")
        return self._shared[node["$ref"]]

    def pairs(self, items: Sequence[Any]) -> list[tuple[Any, Any]]:
        """Keys and values in order."""
        return [(self(key), self(value)) for key, value in items]


def _read_list(read: Reader, node: Mapping[str, Any]) -> list[Any]:
    made: list[Any] = read.begin(node, [])
    made.extend(read(item) for item in node["$list"])
    return made


def _read_set(read: Reader, node: Mapping[str, Any]) -> set[Any]:
    made: set[Any] = read.begin(node, set())
    made.update(read(item) for item in node["$set"])
    return made


def _read_mapping(tag: str, empty: Callable[[], Any]) -> Callable[[Reader, Mapping[str, Any]], Any]:
    def rule(read: Reader, node: Mapping[str, Any]) -> Any:
        made = read.begin(node, empty())
        made.update(read.pairs(node[tag]))
        return made

    return rule


def _read_default_dict(read: Reader, node: Mapping[str, Any]) -> Any:
    made: Any = read.begin(node, collections.defaultdict())
    made.default_factory = read(node["factory"])
    made.update(read.pairs(node["$default_dict"]))
    return made


def _read_partial(read: Reader, node: Mapping[str, Any]) -> Any:
    function = read(node["$partial"])
    args, keywords = read(node["args"]), {key: read(item) for key, item in node["keywords"].items()}
    return functools.partial(function, *args, **keywords)


def _read_enum(read: Reader, node: Mapping[str, Any]) -> Any:
    cls = read.find(node["$enum"], "enum")
    if node["member"] not in cls.__members__:
        raise FileError(f"{node['$enum']!r} has no member {node['member']!r}")
    return cls.__members__[node["member"]]


def _read_weakref(read: Reader, node: Mapping[str, Any]) -> Any:
    target = read(node["$weakref"])
    if not isinstance(target, (Tensor, nn.Module)):
        raise FileError("a weak reference leads to something that is no tensor or module")
    return weakref.ref(target)


def _read_numpy_scalar(read: Reader, node: Mapping[str, Any]) -> Any:
    dtype = numpy.dtype(node["$numpy"])
    if not is_number(dtype):
        raise FileError(f"a numpy scalar has the dtype {node['$numpy']!r}, which is not a number")
    return dtype.type(read(node["value"]))


def _read_array(read: Reader, node: Mapping[str, Any]) -> Any:
    return read.begin(node, read.tensor(node["$array"]).detach().cpu().numpy())


def _read_torch_constant(tag: str) -> Callable[[Reader, Mapping[str, Any]], Any]:
    def rule(read: Reader, node: Mapping[str, Any]) -> Any:
        found = getattr(torch, str(node[tag]), None)
        if not isinstance(found, TORCH_CONSTANTS[tag]):
            raise FileError(f"torch.{node[tag]} is not a {tag[1:]} that this PyTorch knows")
        return found

    return rule


def _read_device(read: Reader, node: Mapping[str, Any]) -> torch.device:
    try:
        return torch.device(node["$device"])
    except RuntimeError as error:
        raise FileError(f"{node['$device']!r} is not a device that this PyTorch knows") from error


def _read_object(read: Reader, node: Mapping[str, Any]) -> Any:
    cls = read.find(node["$object"], "object")
    made = read.begin(node, empty(cls))
    slotted = set(slots(cls))
    for key, item in node["state"].items():
        if key in slotted:
            object.__setattr__(made, key, read(item))
        else:
            vars(made)[key] = read(item)
    for key, item in node.get("items", ()):
        base_of(cls).__setitem__(made, read(key), read(item))
    return made


_READ: dict[str, Callable[[Reader, Mapping[str, Any]], Any]] = {
    "$ref": lambda read, node: read.again(node),
    "$float": lambda read, node: float(node["$float"]),
    "$tuple": lambda read, node: tuple(read(node["$tuple"])),
    "$list": _read_list,
    "$set": _read_set,
    "$frozenset": lambda read, node: frozenset(read(node["$frozenset"])),
    "$dict": _read_mapping("$dict", dict),
    "$ordered_dict": _read_mapping("$ordered_dict", collections.OrderedDict),
    "$default_dict": _read_default_dict,
    "$slice": lambda read, node: slice(*read(node["$slice"])),
    "$range": lambda read, node: range(*node["$range"]),
    "$size": lambda read, node: torch.Size(node["$size"]),
    "$device": _read_device,
    **{tag: _read_torch_constant(tag) for tag in TORCH_CONSTANTS},
    "$partial": _read_partial,
    "$method": lambda read, node: types.MethodType(read.find(node["$method"], "value"), read(node["self"])),
    "$function": lambda read, node: read.find(node["$function"], "value"),
    "$class": lambda read, node: read.find(node["$class"], "value"),
    "$enum": _read_enum,
    "$record": lambda read, node: tuple.__new__(read.find(node["$record"], "record"), read(node["items"])),
    "$weakref": _read_weakref,
    "$numpy": _read_numpy_scalar,
    "$array": _read_array,
    "$module": lambda read, node: read.module(node["$module"]),
    "$tensor": lambda read, node: read.tensor(node["$tensor"]),
    "$object": _read_object,
}
