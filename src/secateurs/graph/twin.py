"""Copies of a model that own other tensors: on the meta device, sliced, or masked. The original is never touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .modules import MultiheadAttention

__all__ = [
    "attention_swaps",
    "meta_twin",
    "named_tensors",
    "set_mode",
    "shared_twin",
    "swap_attention",
    "twin",
    "unchanged",
]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by qualified name; a tied tensor once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def twin(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `model` in which `tensors` (by qualified name) stand in for its own, which are not copied.

    Tensors without a replacement are copied. Ties survive. The copy keeps flags, attributes and hooks.
    """
    memo: dict[int, object] = {}
    for name, own in named_tensors(model):
        if name in tensors:
            new = tensors[name]
            memo[id(own)] = nn.Parameter(new, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else new
    # Empty ones, of which every module has ten for its hooks, would take most of the time.
    empty = (held for module in model.modules() for held in vars(module).values() if type(held) is OrderedDict)
    memo.update((id(held), OrderedDict()) for held in empty if not held)
    return _apart(copy.deepcopy(model, memo))


def _apart(model: nn.Module) -> nn.Module:
    """`model`, a copy, whose parametrized modules no longer share a class with those that they are copies of.

    PyTorch makes such a class for one module, and changes it when its parametrizations are removed.
    """
    for module in model.modules():
        shared = type(module)
        if shared.__module__ == parametrize.__name__ and parametrize.is_parametrized(module):
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    return model


def meta_twin(model: nn.Module, shapes: Mapping[str, torch.Size] | None = None) -> nn.Module:
    """A copy of `model` in evaluation mode with floating-point tensors on the meta device, `shapes` overriding theirs.

    Integer and boolean tensors stay real (and keep their shape), since Python code may ask for their values.
    """
    shapes = shapes or {}

    def stand_in(name: str, tensor: Tensor) -> Tensor:
        shape = shapes.get(name, tensor.shape)
        if tensor.is_floating_point() or tensor.is_complex() or isinstance(tensor, nn.Parameter):
            return torch.empty(shape, dtype=tensor.dtype, device="meta")
        return tensor.detach().clone()

    return _prepared(twin(model, _replace(model, stand_in)))


def shared_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode that shares its parameters and owns its buffers."""

    def stand_in(name: str, tensor: Tensor) -> Tensor:
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    return _prepared(twin(model, _replace(model, stand_in)))


def _replace(model: nn.Module, stand_in: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: stand_in(name, tensor) for name, tensor in named_tensors(model)}


def _prepared(model: nn.Module) -> nn.Module:
    swap_attention(model, attention_swaps(model))
    return set_mode(model, training=False)


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """`model` in evaluation mode or, for `training`, with only those modules in training mode that hold others.

    So code that runs in training only is run, while batch norm and dropout stay as they are.
    """
    model.eval()
    if training:
        for module in model.modules():
            module.training = next(module.children(), None) is not None
    return model


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards, attributes and hooks of every module, and what its lists and dictionaries hold, are as before."""
    before = [(module, {name: _shallow(value) for name, value in vars(module).items()}) for module in model.modules()]
    try:
        yield
    finally:
        for module, held in before:
            vars(module).clear()
            vars(module).update(held)


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def attention_swaps(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose Python code hard-wires head sizes and is replaced by an equal one that does not."""
    return tuple(path for path, module in model.named_modules() if type(module) is nn.MultiheadAttention)


def swap_attention(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace the class of the modules at `paths`, in place."""
    for path in paths:
        model.get_submodule(path).__class__ = MultiheadAttention
    for encoder in [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]:
        if any(isinstance(m, MultiheadAttention) for m in encoder.modules()):
            # Nested tensors are for fused kernels only, and those derive head sizes as PyTorch's attention does.
            encoder.use_nested_tensor = False
