"""What a class makes of a config, found by building it on the meta device, and the fields of the config."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = [
    "Built",
    "Change",
    "Field",
    "Number",
    "build",
    "built",
    "changed",
    "fields",
    "set_attribute",
    "set_field",
    "switches",
    "unset",
]

Number = int | float | tuple[int, ...]
# Where a value stands in a config: names of sub-configs, the name of the value, and its place in a list.
Field = tuple[str | int, ...]
Change = tuple[Field, int | float]


@dataclass(frozen=True)
class Built:
    """What a model has in numbers.

    Args:
        shapes: of its parameters and of the buffers that are saved, by name.
        numbers: integers, fractions and tuples of integers that its modules hold, by `path.attribute`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, Number]

    def unlike(self, other: Built) -> dict[str, tuple[Any, Any]]:
        """What differs, as (here, there), shapes first; None for what is absent."""
        sides = ((self.shapes, other.shapes), (self.numbers, other.numbers))
        return {
            name: (ours.get(name), theirs.get(name))
            for ours, theirs in sides
            for name in dict.fromkeys((*theirs, *ours))
            if ours.get(name) != theirs.get(name)
        }


def built(model: nn.Module) -> Built:
    """What the model has in numbers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    numbers: dict[str, Number] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            number = None if name.startswith("_") else _number(value)
            if number is not None:
                numbers[f"{path}.{name}" if path else name] = number
    return Built(shapes, numbers)


def _number(value: Any) -> Number | None:
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]  # narrowed by the test of its type
    if isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
        return tuple(value)
    return None


def build(kind: type[nn.Module], config: Any) -> Built | None:
    """What the class makes of a config, on the meta device; None if it refuses."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), _uninitialised():
            return built(kind(copy.deepcopy(config)))
    except Exception:  # noqa: BLE001  (a library's constructor may raise anything at a number that does not fit)
        return None


def _uninitialised() -> contextlib.AbstractContextManager[Any]:
    """Spares drawing random weights for a model that has only shapes."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return contextlib.nullcontext()
    return no_init_weights()


def fields(config: Any, around: Field = ()) -> dict[Field, Any]:
    """The numbers in a config, its lists and its sub-configs, by where they are."""
    found: dict[Field, Any] = {}
    for name, value in vars(config).items():
        here = (*around, name)
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            found |= fields(value, here)
        elif isinstance(value, (list, tuple)):
            found |= {(*here, i): v for i, v in enumerate(value) if type(v) in (int, float)}
        elif type(value) in (int, float):
            found[here] = value
    return found


def switches(config: Any, around: Field = ()) -> dict[Field, bool]:
    """The flags in a config and its sub-configs that are about biases, by where they are."""
    found: dict[Field, bool] = {}
    for name, value in vars(config).items():
        here = (*around, name)
        if hasattr(value, "to_dict") and not name.startswith("_"):
            found |= switches(value, here)
        elif type(value) is bool and "bias" in name:
            found[here] = value
    return found


def unset(config: Any, around: Field = ()) -> list[Field]:
    """Where a config and its sub-configs leave a value open, which then follows from others."""
    found: list[Field] = []
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and not name.startswith("_"):
            found += unset(value, (*around, name))
        elif value is None and not name.startswith("_"):
            found.append((*around, name))
    return found


def set_field(config: Any, field: Field, value: Any) -> Callable[[], None]:
    """Changes a number of the config in place; gives the way back."""
    names = [name for name in field if isinstance(name, str)]
    for name in names[:-1]:
        config = getattr(config, name)
    if isinstance(field[-1], str):
        return set_attribute(config, names[-1], value)
    values = list(getattr(config, names[-1]))
    values[field[-1]] = value
    return set_attribute(config, names[-1], type(getattr(config, names[-1]))(values))


def changed(config: Any, changes: Sequence[Change]) -> Any | None:
    """A copy of the config with other numbers; None if it refuses them."""
    other = copy.deepcopy(config)
    try:
        for field, value in changes:
            set_field(other, field, value)
    except Exception:  # noqa: BLE001  (a config may check itself, and raise anything)
        return None
    return other


def set_attribute(holder: Any, name: str, value: Any) -> Callable[[], None]:
    had, old = name in vars(holder), getattr(holder, name, None)
    setattr(holder, name, value)
    return lambda: setattr(holder, name, old) if had else delattr(holder, name)
