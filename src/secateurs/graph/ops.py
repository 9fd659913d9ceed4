"""What can be told of an ATen op without running it, and a few sets of ops."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .run import flat

__all__ = [
    "COMPARES",
    "DECISIVE",
    "FILLS",
    "NEUTRAL",
    "UNRECORDED",
    "base_name",
    "bound",
    "is_pointwise",
    "numbers",
    "writes",
]

# PyTorch inserts these depending on who holds a reference and on strides, so two runs of one model may differ in them.
UNRECORDED = frozenset({"detach", "alias", "lift_fresh", "clone"})

# Ops through which Python learns a value, and may go another way on other inputs.
DECISIVE = frozenset({"_local_scalar_dense", "equal", "nonzero"})

COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "isin"})
_MAKES = [f"{new}{what}" for what in ("zeros", "ones", "full", "empty") for new in ("", "new_")]
# Ops that compare, that look at order alone, or at no value: to them ids with new numbers are what they were.
NEUTRAL = COMPARES | {"argmax", "argmin", "sort", *_MAKES, *(f"{name}_like" for name in _MAKES)}
# Ops that put ids among others, or others among ids.
FILLS = frozenset({"where", "masked_fill", "copy", "fill", "constant_pad_nd", "cat", "stack"})


@cache
def base_name(func: torch._ops.OpOverload) -> str:
    """The op's name without overload; an in-place op has the name of its functional twin."""
    name: str = func.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bound(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    specs = _arguments(func)
    out = {name: kwargs.get(name, default) for name, default in specs} if kwargs else dict(specs)
    out.update(zip(out, args, strict=False))
    return out


@cache
def _arguments(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of an op's arguments, which PyTorch makes anew at each look."""
    return tuple((spec.name, spec.default_value) for spec in func._schema.arguments)


@cache
def is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Whether the op makes each value of its result from the values at the same place."""
    return torch.Tag.pointwise in func.tags


@cache
def writes(func: torch._ops.OpOverload) -> bool:
    """Whether the op writes into one of its arguments."""
    return bool(func._schema.is_mutable)


def numbers(func: torch._ops.OpOverload, args: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The integers among an op's arguments, and the factors: numbers that values are computed with, not sizes.

    Floats are factors, of elementwise ops integers are too, and a real scalar beside tensors on meta is a constant.
    """
    given = flat(args.values())
    ints = [v for v in given if isinstance(v, int) and not isinstance(v, bool)]
    factors = [v for v in given if isinstance(v, float)]
    if is_pointwise(func):
        factors += ints
    tensors = [v for v in given if isinstance(v, Tensor)]
    real = [t for t in tensors if not t.is_meta]
    if len(real) < len(tensors):
        factors += [float(t) for t in real if t.dim() == 0 and not t.is_complex()]
    return tuple(ints), tuple(factors)
