"""The table of tensors of a saved model: what safetensors cannot say about them, and how to get the same ones back.

A tensor is listed once under the name at which it was first met, however many modules hold it; two tensors on the same
memory share one entry of the file. Bits come back exactly, in fresh aligned memory: the strides of a dense tensor are
kept, because another memory format selects another kernel, whose sums differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import FileError
from .fields import checked

__all__ = ["TensorTable", "rebuild"]

# safetensors of all supported releases agree on every dtype but these, which are stored as bytes.
_AS_BYTES = frozenset({torch.complex32, torch.complex64, torch.complex128})


class TensorTable:
    """Tensors by the name of their entry; `entries` describes them, `data` holds what goes into the file."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}
        self._memory: dict[tuple[Any, ...], str] = {}
        self._storages: set[tuple[torch.device, int]] = set()
        self._claims: dict[torch.device, list[tuple[int, int, str]]] = {}

    def add(self, tensor: Tensor, name: str) -> str:
        """The name of the tensor's entry: `name`, or the one that it got when it was first met.

        Raises:
            FileError: the tensor has no data, or is of a kind that a plain file of numbers cannot hold.
        """
        known = self._keys.get(id(tensor))
        if known is not None:
            return known
        fault = _fault(tensor)
        if fault is not None:
            raise FileError(fault)
        self._keys[id(tensor)] = name
        self._tensors[name] = tensor
        self.entries[name] = self._entry(tensor, name)
        return name

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, also of those that are added meanwhile."""
        names = list(self._tensors)
        done = 0
        while done < len(names):
            yield names[done], self._tensors[names[done]]
            done += 1
            names = list(self._tensors)

    def _entry(self, tensor: Tensor, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if tensor.stride() != _contiguous(tensor.shape) and _dense(tensor.shape, tensor.stride()):
            entry["strides"] = list(tensor.stride())
        if isinstance(tensor, nn.Parameter):
            entry["parameter"] = True
        if tensor.requires_grad:
            entry["requires_grad"] = True
        source = self._source(tensor, name)
        if source == name:
            self.data[name] = self._storable(tensor)
        else:
            entry["data"] = source
        return entry

    def _storable(self, tensor: Tensor) -> Tensor:
        """The tensor as the file holds it: contiguous, on a storage of its own, complex numbers as bytes."""
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        storage = (plain.device, plain.untyped_storage().data_ptr())
        if storage in self._storages:
            plain = plain.clone()
        self._storages.add(storage)
        return plain.reshape(-1).view(torch.uint8) if plain.dtype in _AS_BYTES else plain

    def _source(self, tensor: Tensor, name: str) -> str:
        """The entry that already holds this very memory, else `name`."""
        if tensor.numel() == 0:
            return name
        layout = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if layout not in self._memory:
            self._memory[layout] = name
            self._claim(tensor, name)
        return self._memory[layout]

    def _claim(self, tensor: Tensor, name: str) -> None:
        """Refuses trainable views that overlap: they would come back independent and train apart.

        Views with gaps are left alone; two halves of one tensor's columns interleave without sharing an element.
        """
        if not tensor.requires_grad or not _dense(tensor.shape, tensor.stride()):
            return
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        claims = self._claims.setdefault(tensor.device, [])
        for low, high, other in claims:
            if low < stop and start < high:
                raise FileError(f"it overlaps {other!r} in memory without being equal to it; clone() one of them")
        claims.append((start, stop, name))


def _fault(tensor: Tensor) -> str | None:
    """Why the tensor cannot be stored, None if it can."""
    if is_lazy(tensor):
        return "it is a lazy parameter without a shape; run the model once"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__qualname__}, not a plain tensor; convert it to a dense floating-point one"
    if tensor.is_meta:
        return "it is on the meta device and has no data; load the weights first"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "it is sparse, quantized or nested; convert it with to_dense() or dequantize()"
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        return "it has gradient hooks; remove them: handle.remove(), of train.Masks remove(), of a pruner finalize()"
    if not tensor.is_leaf:
        return "it is part of an autograd graph; detach() it"
    return None


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements so laid out fill their memory without gaps or repetition, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return expected > 0


def rebuild(
    entries: Mapping[str, Any], read: Callable[[str], Tensor], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The tensors of a table by name, on `device`, in memory of their own.

    Args:
        entries: the table as it was saved.
        read: the stored tensor of an entry; it may lie in a mapped file, it is copied.
        device: where the tensors go.

    Raises:
        FileError: an entry is malformed or disagrees with what is stored.
    """
    made: dict[str, Tensor] = {}
    for name, entry in entries.items():
        place = f"tensor {name!r}"
        optional = ("strides", "parameter", "requires_grad", "data", "attributes")
        checked(entry, place, required=("dtype", "shape"), optional=optional)
        source = entry.get("data")
        if source is None:
            made[name] = _wrapped(_fresh(entry, read(name), place, device), entry)
        elif source in made:
            made[name] = _wrapped(made[source].detach(), entry)
        else:
            raise FileError(f"{place} shares the data of {source!r}, which is not listed before it")
    return made


def _fresh(entry: Mapping[str, Any], stored: Tensor, place: str, device: torch.device | str) -> Tensor:
    """A copy of the stored tensor with the dtype, shape and strides of the entry."""
    dtype, shape = getattr(torch, str(entry["dtype"]), None), tuple(entry["shape"])
    if not isinstance(dtype, torch.dtype):
        raise FileError(f"{place} has the dtype {entry['dtype']!r}, which this PyTorch does not know")
    as_bytes = dtype in _AS_BYTES
    expected = (torch.uint8, (math.prod(shape) * dtype.itemsize,)) if as_bytes else (dtype, shape)
    if (stored.dtype, tuple(stored.shape)) != expected:
        raise FileError(
            f"{place} should be {entry['dtype']} {list(shape)}, but {stored.dtype} {list(stored.shape)} is stored"
        )
    strides = tuple(entry.get("strides") or _contiguous(shape))
    if strides != _contiguous(shape) and not _dense(shape, strides):
        raise FileError(f"{place} has the strides {list(strides)}, which do not fit its shape {list(shape)}")
    # A clone is aligned for any dtype, which bytes in the middle of a file need not be.
    plain = stored.clone().view(dtype).reshape(shape) if as_bytes else stored
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(plain)


def _wrapped(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    trainable = bool(entry.get("requires_grad", False))
    if trainable and not (data.is_floating_point() or data.is_complex()):
        raise FileError(f"a tensor of {data.dtype} cannot require gradients")
    if entry.get("parameter", False):
        return nn.Parameter(data, requires_grad=trainable)
    return data.requires_grad_(trainable)
