"""Classes and functions for the tests of saving: they stand for a user's own package."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.batch import call, leaves
from secateurs.deploy.store import load_model, save_model

HERE = (__name__.partition(".")[0],)


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 0


class Flags(enum.Flag):
    ONE = 1
    TWO = 2


class Point(NamedTuple):
    x: int
    y: Any


@dataclass(frozen=True)
class Frozen:
    width: int
    names: list[str] = field(default_factory=list)


class Settings:
    """A plain object; its constructor must not run, and its setter must not be called."""

    def __init__(self, **values: Any) -> None:
        raise AssertionError("the constructor was called")

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("__setstate__ was called")

    def __reduce__(self) -> Any:
        raise AssertionError("__reduce__ was called")

    @property
    def guarded(self) -> int:
        return 1

    @guarded.setter
    def guarded(self, value: int) -> None:
        raise AssertionError("a property setter was called")

    def describe(self) -> str:
        return "settings"


class Slotted:
    __slots__ = ("left", "right", "unset")

    def __init__(self, left: Any, right: Any) -> None:
        self.left = left
        self.right = right


class AttributeDict(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("an overridden method was called")


class FrozenMapping(OrderedDict[str, Any]):
    def __init__(self, *args: Any) -> None:
        raise AssertionError("the constructor was called")


class Callable:
    def __call__(self, x: Tensor) -> Tensor:
        return x


def double(x: Tensor) -> Tensor:
    return 2 * x


def add_one(module: nn.Module, x: Tensor) -> Tensor:
    return module.inner(x) + 1


def settings(**values: Any) -> Settings:
    made = object.__new__(Settings)
    vars(made).update(values)
    return made


class Net(nn.Module):
    """Two layers whose widths the constructor does not know after the cut."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.outer = nn.Linear(width, 3)
        self.register_buffer("scale", torch.full((3,), 0.5))
        self.register_buffer("cache", torch.arange(3.0), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.inner(x))) * self.scale + self.cache


class Holder(nn.Module):
    """Calls what it holds."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x))

    def shifted(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def again(model: nn.Module, folder: Path) -> Any:
    """The model after a save and a load."""
    return load_model(save_model(model, folder / "saved"), trust=HERE)


def same(model: nn.Module, other: nn.Module, inputs: Any) -> bool:
    """Whether both give the same bits."""
    with torch.no_grad():
        left, right = list(leaves(call(model, inputs))), list(leaves(call(other, inputs)))
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def narrow(module: nn.Module, tensors: str, axis: int, keep: Tensor) -> None:
    """Keeps some slices of the named tensors ("weight bias") of a layer and mends the integers that it states."""
    for name in tensors.split():
        tensor = getattr(module, name)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(tensor.detach().index_select(axis, keep)))
        elif tensor is not None:
            setattr(module, name, tensor.index_select(axis, keep))
    stated = {0: ("out_features", "out_channels", "num_features"), 1: ("in_features", "in_channels")}
    for name in stated[axis]:
        if hasattr(module, name):
            setattr(module, name, len(keep))


def some(size: int, seed: int) -> Tensor:
    """A choice of positions, of another number for every seed."""
    return (
        torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: size - 1 - seed % (size // 2)]
        .sort()
        .values
    )


def narrow_linear(outer: nn.Linear, inner: nn.Linear, seed: int) -> None:
    """Cuts the width between two linear layers."""
    keep = some(outer.weight.shape[0], seed)
    narrow(outer, "weight bias" if outer.bias is not None else "weight", 0, keep)
    narrow(inner, "weight", 1, keep)


def narrow_conv(outer: nn.Conv2d, norm: nn.BatchNorm2d, inner: nn.Conv2d, seed: int) -> None:
    """Cuts the channels between two convolutions with a batch norm between them."""
    keep = some(outer.weight.shape[0], seed)
    narrow(outer, "weight bias", 0, keep)
    narrow(norm, "weight bias running_mean running_var", 0, keep)
    narrow(inner, "weight", 1, keep)


class Own(nn.Module):
    """Something of a user's that has the name of what PyTorch keeps parametrizations in."""

    def __init__(self) -> None:
        super().__init__()
        self.parametrizations = nn.ModuleDict({"linear": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parametrizations["linear"](x)


class Halved(nn.Module):
    """A user's own parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2
