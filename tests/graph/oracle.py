"""Coupled units found without types: a NaN in one slice of a parameter shows who reads it (SPA, section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.core.batch import call, leaves

__all__ = ["components"]

Slice = tuple[str, int, int]


def components(model: nn.Module, inputs: Any) -> set[frozenset[Slice]]:
    """Sets of (parameter or buffer, axis, position) that only go together; those that reach an output are left out.

    Contractions (linear layers, convolutions that are not depthwise) end what a NaN can reach: their inputs are noted
    and cleaned. Everything else passes NaNs as it passes values.
    """
    readers = {p: m for p, m in model.named_modules() if _contracts(m)}
    links: list[set[Slice]] = []
    outside: set[Slice] = set()
    for source in _sources(model):
        read, escaped = _read(model, inputs, readers, source)
        links.append({source, *read})
        if escaped:
            outside.add(source)
    whole = _merged(links)
    # A column that no row writes to reads the model's own inputs.
    return {frozenset(unit) for unit in whole if not unit & outside and any(s[1] == 0 for s in unit)}


def _contracts(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _sources(model: nn.Module) -> Iterator[Slice]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            yield from ((name, 0, i) for i in range(tensor.shape[0]))


def _read(model: nn.Module, inputs: Any, readers: dict[str, nn.Module], source: Slice) -> tuple[set[Slice], bool]:
    """The columns that read a NaN at `source`, and whether an output shows it."""
    found: set[Slice] = set()

    def note(path: str, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        axis = 1 if isinstance(module, nn.Conv2d) else given[0].dim() - 1
        others = [i for i in range(given[0].dim()) if i != axis]
        for i in given[0].isnan().sum(others).nonzero().flatten().tolist():
            found.add((f"{path}.weight" if path else "weight", 1, i))
        return (given[0].nan_to_num(),)

    handles = [m.register_forward_pre_hook(lambda m, a, p=p: note(p, m, a)) for p, m in readers.items()]
    name, axis, position = source
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.select(axis, position).fill_(torch.nan)
        output = call(model, inputs)
        tensor.copy_(before)
    for handle in handles:
        handle.remove()
    return found, any(bool(t.isnan().any()) for t in leaves(output))


def _merged(links: list[set[Slice]]) -> list[set[Slice]]:
    merged: list[set[Slice]] = []
    for link in links:
        touching = [m for m in merged if m & link]
        merged = [m for m in merged if not m & link] + [link.union(*touching)]
    return merged
