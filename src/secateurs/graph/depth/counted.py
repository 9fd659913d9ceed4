"""What beside a container knows how many blocks it has: attributes, and the config that a model is built from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..twin import meta_twin
from .layers import Edits, drop

__all__ = ["config_edits", "counting_attributes", "numbering", "without_chance"]

_WORDS = ("layer", "block", "depth")
_PLACES = (*_WORDS, "id", "index", "number")
_Shapes = dict[str, tuple[int, ...]]


def numbering(container: nn.Module) -> tuple[str, ...]:
    """The integer attributes, from a block on, that hold its place in `container`, counted from anywhere.

    A single block says nothing about what its integers mean.
    """
    offsets: dict[str, list[int]] = {}
    for place, block in enumerate(container._modules.values()):
        for path, module in block.named_modules() if block is not None else ():
            for name, value in vars(module).items():
                if type(value) is int:
                    offsets.setdefault(f"{path}.{name}" if path else name, []).append(value - place)
    return tuple(name for name, found in offsets.items() if len(found) > 1 and len(set(found)) == 1)


def without_chance(edits: Edits) -> Edits:
    """`edits` without numberings whose name does not say that they are one: a rate may grow with the blocks, too."""
    said = {c: tuple(n for n in names if _says_place(n)) for c, names in edits.numbered.items()}
    return replace(edits, numbered={container: names for container, names in said.items() if names})


def _says_place(attribute: str) -> bool:
    return any(word in attribute.rpartition(".")[2] for word in _PLACES)


def counting_attributes(model: nn.Module, container: str, *, named: bool) -> list[str]:
    """The attributes with the number of blocks of `container`, of the modules around it, nearest first.

    Args:
        named: only those whose name says that they count layers.
    """
    count = len(model.get_submodule(container)._modules)
    found: list[str] = []
    for path in _around(container):
        holder = model.get_submodule(path)
        values = {path: vars(holder), f"{path}.config" if path else "config": _fields(getattr(holder, "config", None))}
        for place, held in values.items():
            names = [n for n, v in held.items() if type(v) is int and v == count and not n.startswith("_")]
            found += [f"{place}.{n}" if place else n for n in names if not named or any(w in n for w in _WORDS)]
    return found


def config_edits(model: nn.Module, container: str, block: str) -> Edits:
    """The fields of configs that count the blocks of `container`, or list something for each.

    A field counts them if the class of a module around the container, built from its config with the field one less,
    has exactly the tensors that it has without `block`. Nothing is guessed from names, but that a list which is about
    layers, and as long as there are blocks, has an item for each.

    Args:
        block: path of one of the blocks.
    """
    edits, seen = Edits(), set[int]()
    for path in _around(container):
        module = model.get_submodule(path)
        config = getattr(module, "config", None)
        if config is None or id(config) in seen or not hasattr(config, "to_dict"):
            continue
        place = f"{path}.config" if path else "config"
        counted, listed = _fields_counting(module, container[len(path) :].lstrip("."), block[len(path) :].lstrip("."))
        if counted:
            seen.add(id(config))
            counts, lists = ({f"{place}.{name}": container for name in names} for names in (counted, listed))
            edits = edits.joined(Edits(counts, lists))
    return edits


def _around(container: str) -> Iterator[str]:
    """The paths of the modules that hold `container`, nearest first."""
    path = container
    while path:
        path = path.rpartition(".")[0]
        yield path


def _fields(config: Any) -> dict[str, Any]:
    return dict(vars(config)) if hasattr(config, "to_dict") else {}


def _fields_counting(module: nn.Module, container: str, block: str) -> tuple[list[str], list[str]]:
    config, kind = module.config, type(module)
    less = _shapes(drop(meta_twin(module), Edits(), (block,)))
    if _built(kind, lambda: config) != _shapes(module):
        return [], []
    count = len(module.get_submodule(container)._modules)
    lists = [
        name
        for name, held in _fields(config).items()
        if isinstance(held, (list, tuple)) and len(held) == count > 1 and any(word in name for word in _WORDS)
    ]
    place = list(module.get_submodule(container)._modules).index(block.rpartition(".")[2])

    def builds(field: str, along: list[str]) -> bool:
        return _built(kind, lambda: _less(config, field, along, place)) == less

    for field in _counting(config, count):
        for along in ([], lists):
            if builds(field, along):
                return [field], [name for name in lists if name in along or builds(field, [name])]
    return [], []


def _counting(config: Any, count: int) -> Iterator[str]:
    """Integers of the config, or items of its lists, that equal `count`."""
    for name, held in _fields(config).items():
        if type(held) is int and held == count:
            yield name
        elif isinstance(held, (list, tuple)):
            yield from (f"{name}[{i}]" for i, v in enumerate(held) if type(v) is int and v == count)


def _less(config: Any, field: str, lists: list[str], place: int) -> Any:
    """A copy of the config with one block less, and without its item in `lists`."""
    tried = copy.deepcopy(config)
    name, _, item = field.partition("[")
    held = getattr(tried, name)
    setattr(tried, name, type(held)(v - (i == int(item[:-1])) for i, v in enumerate(held)) if item else held - 1)
    for each in lists:
        values = getattr(tried, each)
        setattr(tried, each, type(values)(v for i, v in enumerate(values) if i != place))
    return tried


def _built(kind: type[nn.Module], config: Callable[[], Any]) -> _Shapes | None:
    """Shapes of the tensors of a module of that class made from a config; None if that cannot be."""
    try:
        with torch.random.fork_rng([]), torch.device("meta"):
            return _shapes(kind(config()))
    except Exception:  # noqa: BLE001  (constructors raise anything where numbers do not go together)
        return None


def _shapes(module: nn.Module) -> _Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
