"""Names of classes and functions, and which of them a saved model may use.

A saved model names code, it never carries any: `package.module:Qualname` for a class, `package.module:name` for a
function. Reading a name imports a module, so the name is judged twice: by its text before the import (its root must
be an allowed package), and by what it leads to afterwards (where that object was really defined). `torch:os.system`
fails at both: the walk stops at `os`, which is no class, and the home of `system` is not an allowed package.

Classes come from `ROOTS` and are modules, enums, dataclasses or passive data. Functions come only from modules that
compute (`_FUNCTION_HOMES`), because a function that reads files or downloads could be planted where a model expects
an activation. `trust` lifts both limits for the packages that the caller names.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import fnmatch
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import FileError

__all__ = ["ROOTS", "Kind", "module_of", "name_of", "passive", "resolve", "untrusted"]

Kind = Literal["module", "object", "enum", "record", "value"]

ROOTS = ("builtins", "collections", "secateurs", "timm", "torch", "torchvision", "transformers")

_BUILTIN_NAMES = (
    "abs bool bytes complex dict float frozenset int len list max min object range round set slice str sum tuple"
)
_BUILTINS = frozenset(f"builtins:{name}" for name in _BUILTIN_NAMES.split())
_CONTAINERS = frozenset({collections.OrderedDict, collections.defaultdict, torch.Tensor, torch.Size})
# Where PyTorch shows its compiled functions to users; their private homes change between releases.
_SHOWN_IN = ("torch.nn.functional", "torch", "torch.special", "torch.fft", "torch.linalg")
_FUNCTION_HOMES = (
    "torch.nn.functional",
    "torch.functional",
    "torch.special",
    "torch.fft",
    "torch.linalg",
    "torch.utils.checkpoint",
    "torchvision.ops.*",
    "torchvision.models.*",
    "timm.layers.*",
    "timm.models.*",
    "transformers.activations",
    "transformers.models.*.modeling_*",
    *(f"secateurs.{room}.*" for room in ("core", "graph", "methods", "recover", "solvers", "train")),
)
# The one operator of `torch` that opens a file.
_FILE_OPERATORS = frozenset({"torch:from_file"})


def name_of(target: Any) -> str:
    """The importable name of a class or function, `package.module:Qualname`.

    Raises:
        FileError: nothing can be imported under the names that the object gives itself (it is local, a lambda, or
            was replaced). The message is a fact; the caller adds the place.
    """
    for name in _candidates(target):
        if _found(name) is target:
            return name
    own = f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', type(target).__qualname__)}"
    raise FileError(f"{own} cannot be imported by its name; define it at the top of a module")


def _candidates(target: Any) -> Iterator[str]:
    """Names under which the object may be found, the most lasting first."""
    short = getattr(target, "__name__", "")
    if isinstance(target, types.BuiltinFunctionType):
        for shown in _SHOWN_IN:
            yield f"{shown}:{short.removeprefix(shown.rpartition('.')[2] + '_')}"
    module = getattr(target, "__module__", None)
    if isinstance(module, str):
        yield f"{module}:{getattr(target, '__qualname__', short)}"
        # `torch.nn.functional.max_pool2d` and its kin are closures that were given a module and a name afterwards.
        yield f"{module}:{short}"


def _found(name: str) -> Any:
    """What the name leads to, None if it leads nowhere."""
    try:
        return _walk(name)
    except (ImportError, AttributeError, ValueError):
        return None


def _walk(name: str) -> Any:
    """The object behind the name; only classes are stepped through, never modules or instances."""
    module, _, qualname = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *qualname.split("."))):
        raise ValueError("it is not of the form package.module:name")
    found: Any = importlib.import_module(module)
    for depth, part in enumerate(qualname.split(".")):
        if depth and not isinstance(found, type):
            raise ValueError(f"{part!r} is looked for in something that is not a class")
        found = getattr(found, part)
    return found


def module_of(name: str) -> str:
    """The module part of `package.module:Qualname`."""
    return name.partition(":")[0]


def _trusted(name: str, trust: Sequence[str]) -> bool:
    """Whether the caller vouched for the name's module or for a package around it."""
    return any(f"{module_of(name)}.".startswith(f"{package}.") for package in trust)


def _allowed_root(name: str) -> bool:
    parts = module_of(name).split(".")
    return parts[0] in ROOTS and not any(part.startswith("__") for part in parts)


def untrusted(names: Sequence[str], trust: Sequence[str]) -> list[str]:
    """The names, in order, whose package is neither allowed by default nor vouched for; nothing is imported."""
    return [name for name in names if not (_allowed_root(name) or _trusted(name, trust))]


def resolve(name: str, kind: Kind, trust: Sequence[str] = ()) -> Any:
    """The class or function behind a name of a saved model.

    Args:
        name: `package.module:Qualname`.
        kind: what the place needs: the class of a "module", of a plain "object", of an "enum", of a "record" (a
            named tuple), or a "value" (a function or class that the model merely holds).
        trust: packages or modules that the caller vouches for.

    Raises:
        FileError: the name is malformed, cannot be imported here, or leads to something that is not allowed in this
            place. The message is a fact; the caller adds the file.
    """
    if untrusted([name], trust):
        raise FileError(f"{name!r} is outside the packages that a saved model may use")
    try:
        target = _walk(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise FileError(f"{name!r} cannot be imported here ({error})") from error
    except (AttributeError, ValueError) as error:
        raise FileError(f"{name!r} does not lead to a class or function: {error}") from error
    if not _SHAPES[kind](target):
        raise FileError(f"{name!r} is used as {'an' if kind[0] in 'aeo' else 'a'} {kind}, which it is not")
    home = name_of(target)
    if not _trusted(home, trust) and not (_allowed_root(home) and _LIMITS[kind](target, home)):
        raise FileError(
            f"{name!r} is not among the classes and functions that a saved model may use without your word; if you "
            f"trust it, pass trust=({module_of(home)!r},)"
        )
    return target


def passive(cls: type) -> bool:
    """Whether instances are mere data: no code of the class runs when one is called or dies."""
    return not any("__call__" in vars(base) or "__del__" in vars(base) for base in cls.__mro__[:-1])


def _is_function(target: Any) -> bool:
    return isinstance(target, (types.FunctionType, types.BuiltinFunctionType))


def _passive_object(target: Any, _home: str) -> bool:
    return passive(target)


def _harmless_value(target: Any, home: str) -> bool:
    """Modules, enums, dataclasses, containers and a few builtins; functions that compute."""
    if home.startswith("builtins:"):
        return home in _BUILTINS
    if isinstance(target, type):
        return target in _CONTAINERS or issubclass(target, (nn.Module, enum.Enum)) or dataclasses.is_dataclass(target)
    return _computes(home, target)


def _computes(home: str, target: Any) -> bool:
    module = module_of(home)
    if module == "torch":
        return isinstance(target, types.BuiltinFunctionType) and home not in _FILE_OPERATORS
    private = any(part.startswith("_") for part in module.split("."))
    return not private and any(fnmatch.fnmatchcase(module, pattern) for pattern in _FUNCTION_HOMES)


def _anything(_target: Any, _home: str) -> bool:
    return True


# What a place needs whoever vouches for it ...
_SHAPES: dict[Kind, Callable[[Any], bool]] = {
    "module": lambda target: isinstance(target, type) and issubclass(target, nn.Module),
    "object": lambda target: isinstance(target, type) and not issubclass(target, (nn.Module, enum.Enum)),
    "enum": lambda target: isinstance(target, type) and issubclass(target, enum.Enum),
    "record": lambda target: isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields"),
    "value": lambda target: isinstance(target, type) or _is_function(target),
}
# ... and what else it asks of code for which nobody vouched.
_LIMITS: dict[Kind, Callable[[Any, str], bool]] = {
    "module": _anything,
    "object": _passive_object,
    "enum": _anything,
    "record": _anything,
    "value": _harmless_value,
}
