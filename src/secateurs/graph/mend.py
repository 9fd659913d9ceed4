"""The integers that modules keep beside their tensors, and how they follow a cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.dims import Dim, Fixed, product, size

__all__ = ["apply_edits", "holder_at", "holds", "leaf_edits", "matching_attributes"]


def leaf_edits(model: nn.Module, tensors: Mapping[str, tuple[Dim, ...]], groups: Mapping[str, Dim]) -> dict[str, Dim]:
    """For every layer of a kind PyTorch defines, which of its integers equal which dimension of its tensors.

    Args:
        tensors: types of parameters and buffers by qualified name.
        groups: the `groups` integers of convolutions found so far, by `path.groups`.
    """
    edits: dict[str, Dim] = {}
    for path, module in model.named_modules():
        own = {n: tensors[f"{path}.{n}" if path else n] for n in _OWN if (f"{path}.{n}" if path else n) in tensors}
        for attribute, dim in _of_layer(module, own, groups.get(f"{path}.groups", Fixed(1))).items():
            edits[f"{path}.{attribute}" if path else attribute] = dim
    return edits


_OWN = ("weight", "running_mean")


def _of_layer(module: nn.Module, own: Mapping[str, tuple[Dim, ...]], groups: Dim) -> dict[str, Dim]:
    weight = own.get("weight")
    if isinstance(module, nn.modules.batchnorm._NormBase) and own:
        return {"num_features": next(iter(own.values()))[0]}
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight[0], "out_channels": product(groups, weight[1])}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"out_channels": weight[0], "in_channels": product(groups, weight[1])}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {f"normalized_shape[{i}]": dim for i, dim in enumerate(weight)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"embedding_dim": weight[1]}
    if hasattr(module, "nf") and hasattr(module, "nx") and len(weight) == 2:  # Hugging Face's Conv1D, [in, out]
        return {"nf": weight[1], "nx": weight[0]}
    return {}


def matching_attributes(module: nn.Module, value: int) -> list[str]:
    """The attributes of `module` that hold the integer `value`: `name`, or `name[i]` inside a tuple or list."""
    found: list[str] = []
    for name, held in vars(module).items():
        if name.startswith("_"):
            continue
        if type(held) is int and held == value:
            found.append(name)
        elif isinstance(held, (tuple, list)):
            found.extend(f"{name}[{i}]" for i, v in enumerate(held) if type(v) is int and v == value)
    return found


def holds(model: nn.Module, key: str, value: int) -> bool:
    """Whether the attribute that `key` (`path.name`) names exists and is the integer `value`."""
    path, _, attribute = key.rpartition(".")
    held = getattr(model.get_submodule(path), attribute, None)
    return type(held) is int and held == value


def apply_edits(model: nn.Module, edits: Mapping[str, Dim], counts: Mapping[str, int]) -> None:
    """Set every integer to the size of its dimension with `counts[group]` units kept, in place."""
    for key, dim in edits.items():
        path, _, attribute = key.rpartition(".")
        _set(holder_at(model, path), attribute, size(dim, counts))


def holder_at(model: nn.Module, path: str) -> Any:
    """What `path` leads to, a module or a config that one holds."""
    holder: Any = model
    for part in path.split(".") if path else ():
        holder = getattr(holder, part)
    return holder


def _set(module: nn.Module, attribute: str, value: int) -> None:
    name, bracket, position = attribute.partition("[")
    if not bracket:
        setattr(module, name, value)
        return
    held: Any = getattr(module, name)
    values = list(held)
    values[int(position.rstrip("]"))] = value
    setattr(module, name, held._make(values) if hasattr(held, "_make") else type(held)(values))
