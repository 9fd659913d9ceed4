"""Size of a model: parameters, non-zeros, sparsity, bytes, and a table of its layers.

A tensor that is tied (one parameter under two names, or two parameters over the same memory) counts once, under the
name that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import ModelError, OptionError
from .macs import trace

__all__ = [
    "LayerRow",
    "TensorRow",
    "bytes_in_memory",
    "layer_table",
    "nonzeros",
    "parameters",
    "sparsity",
    "tensor_table",
]


@dataclass(frozen=True)
class TensorRow:
    """One parameter.

    Args:
        name: qualified name, the first of a tied tensor.
        shape: its sizes.
        dtype: as PyTorch prints it, without "torch.".
        params: number of entries.
        nonzero: entries that are not zero (NaN is not); None on the meta device, where values are unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    params: int
    nonzero: int | None

    @property
    def sparsity(self) -> float | None:
        """Share of zeros in [0, 1]; None on the meta device."""
        if self.nonzero is None:
            return None
        return 1 - self.nonzero / self.params if self.params else 0.0


@dataclass(frozen=True)
class LayerRow:
    """One layer: a module with parameters of its own, or with matrix products of its own.

    Args:
        name: qualified name; "" is the model itself.
        type: name of the module's class.
        weight_shape: shape of its `weight`, else of its first parameter with two or more axes, else of its first;
            () without parameters.
        params: entries of its own parameters, without children; a tied tensor counts in the first row that has it.
        nonzero: those that are not zero; None on the meta device.
        macs: multiply–accumulates of its own in one forward pass, over all its calls.
        output_shape: of its first call; None if it was not called by itself, as a layer whose weights another one uses.
    """

    name: str
    type: str
    weight_shape: tuple[int, ...]
    params: int
    nonzero: int | None
    macs: float
    output_shape: tuple[int, ...] | None


def parameters(model: nn.Module) -> int:
    """Number of entries of all parameters.

    Raises:
        ModelError: a lazy parameter has no shape yet.
    """
    return sum(p.numel() for _, p in _distinct(model.named_parameters()))


def nonzeros(model: nn.Module) -> int:
    """Number of entries of all parameters that are not zero.

    Raises:
        ModelError: the model is on the meta device, or a lazy parameter has no shape yet.
    """
    return sum(_known(row) for row in tensor_table(model))


def sparsity(model: nn.Module, names: Collection[str] | None = None) -> float:
    """Share of zeros among all parameters, or among those in `names`, in [0, 1].

    Args:
        model: read only.
        names: qualified parameter names; a tied tensor may be called by any of its names.

    Raises:
        OptionError: a name is not a parameter of the model.
        ModelError: the model is on the meta device, or a lazy parameter has no shape yet.
    """
    pairs = list(model.named_parameters(remove_duplicate=False))
    if names is not None:
        missing = sorted(set(names) - {name for name, _ in pairs})
        if missing:
            raise OptionError(f"no parameter is called {missing[0]!r}; named_parameters() lists the names.")
        pairs = [(name, p) for name, p in pairs if name in set(names)]
    rows = [_tensor_row(name, p) for name, p in _distinct(pairs)]
    total = sum(row.params for row in rows)
    return 1 - sum(_known(row) for row in rows) / total if total else 0.0


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, whatever device they are on."""
    pairs = _distinct([*model.named_parameters(), *model.named_buffers()])
    return sum(t.numel() * t.element_size() for _, t in pairs)


def tensor_table(model: nn.Module) -> tuple[TensorRow, ...]:
    """One row for each parameter, in the order of `named_parameters`.

    Raises:
        ModelError: a lazy parameter has no shape yet.
    """
    return tuple(_tensor_row(name, p) for name, p in _distinct(model.named_parameters()))


def layer_table(model: nn.Module, example_inputs: Any) -> tuple[LayerRow, ...]:
    """One row for each layer in forward order; params and MACs sum to those of the model.

    A layer that is not called by itself follows the nearest module around it that is.

    Args:
        model: on any device; run once in evaluation mode and left as it was.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.

    Raises:
        ModelError: the forward pass fails, or a lazy parameter has no shape yet.
    """
    seen = trace(model, example_inputs)
    modules = dict(model.named_modules())
    called = {name: turn for turn, name in enumerate(seen.macs)}

    def place(name: str) -> int:
        while name not in called:
            name = name.rpartition(".")[0]
        return called[name]

    counted: set[Any] = set()
    rows = []
    for name in sorted(modules, key=place):
        own = [p for _, p in _distinct(modules[name].named_parameters(recurse=False), counted)]
        every = list(modules[name].parameters(recurse=False))
        if every or seen.macs.get(name):
            rows.append(_layer_row(name, modules[name], every, own, seen.macs.get(name, 0.0), seen.shapes.get(name)))
    return tuple(rows)


def _layer_row(
    name: str, module: nn.Module, every: list[Any], own: list[Tensor], macs: float, shape: tuple[int, ...] | None
) -> LayerRow:
    nonzero = None if any(p.is_meta for p in own) else sum(int(p.count_nonzero()) for p in own)
    params = sum(p.numel() for p in own)
    return LayerRow(name, type(module).__name__, _weight_shape(module, every), params, nonzero, macs, shape)


def _weight_shape(module: nn.Module, every: list[Tensor]) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return tuple(weight.shape)
    first = next((p for p in every if p.dim() > 1), every[0] if every else None)
    return () if first is None else tuple(first.shape)


def _distinct(pairs: Any, seen: set[Any] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The pairs (name, tensor) whose tensor is not in `seen` yet; fills `seen`."""
    seen = set() if seen is None else seen
    for name, tensor in pairs:
        if is_lazy(tensor):
            raise ModelError(f"{name} has no shape yet: run the model once, so that its lazy layers are initialised.")
        key = _identity(tensor)
        if key not in seen:
            seen.add(key)
            yield name, tensor


def _identity(tensor: Tensor) -> Any:
    # Meta and empty tensors have no memory that could tell them apart, sparse ones no single storage.
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _tensor_row(name: str, tensor: Tensor) -> TensorRow:
    nonzero = None if tensor.is_meta else int(tensor.count_nonzero())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorRow(name, tuple(tensor.shape), dtype, math.prod(tensor.shape), nonzero)


def _known(row: TensorRow) -> int:
    if row.nonzero is None:
        raise ModelError(f"{row.name} is on the meta device, where values are unknown: non-zeros cannot be counted.")
    return row.nonzero
