"""Which parameters of a model train: small subsets by name, everything else frozen for the time being."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, unknown_name
from ..train.scope import is_norm
from .adapters import Adapter, adaptable

__all__ = ["BIASED", "SELECTORS", "create_biases", "head_of", "is_tied", "only_trained", "trainable_parameters"]

SELECTORS = ("biases", "norms", "head", "adapters", "all")
# Layers that can have a bias.
BIASED = (nn.Linear, nn.modules.conv._ConvNd)


def trainable_parameters(model: nn.Module, what: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that the selectors choose, by qualified name and in the model's order; a tied one occurs once.

    There may be none, as in a language model without biases.

    Args:
        model: not changed.
        what: one or more of "biases" (every bias vector, those of norms included), "norms" (all parameters of
            normalisation layers), "head" (all parameters of the last layer, see `head_of`), "adapters" (A and B of
            every adapter) and "all".

    Raises:
        OptionError: an unknown selector.
        ModelError: the head's weight is that of an embedding too.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    >>> list(trainable_parameters(net, ("biases", "norms")))
    ['0.bias', '1.weight', '1.bias', '2.bias']
    """
    chosen: set[int] = set()
    for selector in (what,) if isinstance(what, str) else what:
        if selector not in SELECTORS:
            raise unknown_name("selector of parameters", selector, SELECTORS)
        chosen |= {id(parameter) for parameter in _selected(model, selector)}
    return {n: p for n, p in model.named_parameters() if id(p) in chosen and p.is_floating_point()}


@contextmanager
def only_trained(model: nn.Module, what: str | Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """A context in which only the `trainable_parameters`, which it gives, require gradients; flags return on exit.

    Raises:
        OptionError: an unknown selector.
        ModelError: nothing is chosen, or the head's weight is that of an embedding too; nothing was changed.
    """
    chosen = trainable_parameters(model, what)
    if not chosen:
        words = what if isinstance(what, str) else " or ".join(what)
        raise ModelError(
            f"{type(model).__name__} has no {words or 'parameter'} to train: choose others of {', '.join(SELECTORS)}"
            ", create_biases(model), or attach adapters."
        )
    wanted = {id(parameter) for parameter in chosen.values()}
    before = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield chosen
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@torch.no_grad()
def create_biases(model: nn.Module, names: str | Sequence[str] = "*") -> tuple[str, ...]:
    """The names of the biases that were created, at zero, where a linear layer or convolution had none.

    The model's output does not change. A bias in front of a batch norm has no effect; Hugging Face's own checkpoints
    have no place for one that their config does not foresee, so save such a model with `Pruned.save`.

    Args:
        model: changed in place.
        names: patterns of names of layers; those that have a bias are left alone.

    Raises:
        OptionError: a pattern that matches no linear layer or convolution.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BIASED)}
    chosen: dict[str, nn.Module] = {}
    for pattern in (names,) if isinstance(names, str) else names:
        hits = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise unknown_name("layer", pattern, layers)
        chosen |= hits
    lacking = {name: layer for name, layer in chosen.items() if layer.bias is None}
    for layer in lacking.values():
        weight = cast(Tensor, layer.weight)
        outputs: int = layer.out_features if isinstance(layer, nn.Linear) else cast(Any, layer).out_channels
        layer.bias = nn.Parameter(torch.zeros(outputs, dtype=weight.dtype, device=weight.device))
    return tuple(f"{name}.bias".lstrip(".") for name in lacking)


def head_of(model: nn.Module) -> str:
    """The qualified name of the layer that gives the output: what Hugging Face calls output embeddings, else the last
    Linear (or Hugging Face `Conv1D`) in the order of definition.

    Raises:
        ModelError: there is none.
    """
    own: Any = getattr(model, "get_output_embeddings", None)
    layer = own() if callable(own) else None
    names = [name for name, module in model.named_modules() if module is layer] if layer is not None else []
    names = names or list(adaptable(model))[-1:]
    if not names:
        raise ModelError(f"{type(model).__name__} has no linear layer that could be its head: leave out 'head'.")
    return names[0]


def is_tied(model: nn.Module, name: str) -> bool:
    """Whether another module holds the weight of the layer `name`, too, as an embedding does."""
    weight = getattr(model.get_submodule(name), "weight", None)
    held = [m for m in model.modules() for p in m._parameters.values() if p is weight]
    return weight is not None and len(held) > 1


def _selected(model: nn.Module, selector: str) -> Iterator[nn.Parameter]:
    if selector == "all":
        yield from model.parameters()
    elif selector == "biases":
        yield from (p for n, p in model.named_parameters() if "bias" in n.rpartition(".")[2] and p.dim() == 1)
    elif selector == "head":
        name = head_of(model)
        if is_tied(model, name):
            raise ModelError(f"the weight of {name} is that of an embedding too and would change it: leave out 'head'.")
        yield from model.get_submodule(name).parameters()
    else:
        wanted = is_norm if selector == "norms" else _is_adapter
        yield from (p for module in model.modules() if wanted(module) for p in module.parameters(recurse=False))


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(module, Adapter)
