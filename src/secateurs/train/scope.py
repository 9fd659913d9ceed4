"""Which parameters a weight pruner may touch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..core.errors import ModelError, OptionError, unknown_name
from ..solvers.stacks import input_axis, is_stack

__all__ = ["canonical_names", "divided_weights", "input_axes", "is_norm", "prunable_weights", "stack_names"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# Hugging Face's GPT-2 layer, a Linear with a transposed weight; known by name so that transformers is not imported.
_LAYER_NAMES = ("Conv1D",)
# LayerNorm, LlamaRMSNorm, BatchNormAct2d …, but not a NormalizedEmbedding.
_NORM_NAME = re.compile(r"Norm(?!al)")
# What peft calls the matrices of its adapters.
_ADAPTERS = frozenset({"lora_A", "lora_B"})
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def input_axes(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The axis of the inputs of each weight called `names`: 1, but 0 in Hugging Face's `Conv1D`.

    Of stacked experts see `solvers.stacks.input_axis`.
    """
    stacks = stack_names(model)

    def axis(name: str) -> int:
        if name in stacks:
            return input_axis(model, name)
        return int(type(model.get_submodule(name.rpartition(".")[0])).__name__ not in _LAYER_NAMES)

    return {name: axis(name) for name in names}


def stack_names(model: nn.Module) -> frozenset[str]:
    """The first names of the parameters that hold stacked experts; see `solvers.stacks`."""
    return frozenset(n for n, layer in _candidates(model) if not layer and is_stack(model.get_parameter(n)))


def divided_weights(
    weights: Mapping[str, nn.Parameter], of: int, asked: str, *, all_of_them: bool, axes: Mapping[str, int]
) -> dict[str, nn.Parameter]:
    """Those weights whose inputs are runs of `of`, as a pattern N:M needs them.

    Args:
        asked: the pattern in words, for the error.
        axes: of the inputs of each; see `input_axes`.
        all_of_them: whether each must be, since somebody named them.

    Raises:
        OptionError: none is, or not all are; it names the first that is not.
    """
    inputs = {name: w.shape[axes[name]] for name, w in weights.items()}
    fitting = {name: w for name, w in weights.items() if inputs[name] % of == 0}
    if not fitting or (all_of_them and len(fitting) < len(weights)):
        wrong = next(name for name in weights if name not in fitting)
        raise OptionError(f"{asked} needs a number of inputs that {of} divides; {wrong} has {inputs[wrong]}.")
    return fitting


def prunable_weights(
    model: nn.Module,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    *,
    stacks: bool = False,
) -> dict[str, nn.Parameter]:
    """The weights to prune by qualified name, in the model's order; a tied parameter occurs once, by its first name.

    Weights of layers are those with two or more axes that belong to a convolution, a linear or bilinear layer, an
    attention or a recurrent layer. Biases and the parameters of norms are never among them.

    Args:
        model: any module.
        scope: patterns (`*`, `?`, `[…]`, matched against the whole qualified name of a parameter or of the module that
            owns it); None for all weights of layers. A pattern that matches weights of layers chooses those; one that
            matches none of them chooses any other parameter with two or more axes: an embedding, an expert, a
            position table.
        ignore: patterns of the same kind for weights to leave out.
        stacks: whether stacked experts count as weights of layers.

    Raises:
        OptionError: a pattern that matches nothing; the nearest names are listed.
        ModelError: nothing is left to prune, or a chosen parameter has no shape yet.
    """
    found = dict(_candidates(model))
    found |= dict.fromkeys(stack_names(model) if stacks else (), True)
    layers = [name for name, is_layer in found.items() if is_layer]
    others = [name for name, is_layer in found.items() if not is_layer]
    aliases = _aliases(model)
    chosen = set(layers)
    if scope is not None:
        chosen = {name for pattern in _patterns(scope) for name in _matching(pattern, layers, others, aliases)}
    chosen -= {name for pattern in _patterns(ignore) for name in _matching(pattern, layers, others, aliases)}
    weights = {name: parameter for name, parameter in model.named_parameters() if name in chosen}
    integers = _integer_layers(model)
    if not weights:
        held = f" ({integers[0]} holds integers: prune before quantising)" if integers else ""
        raise ModelError(
            f"nothing to prune in {type(model).__name__}: no convolution, linear, attention or recurrent weight "
            f"is in the scope; widen scope= or shorten ignore={held}."
        )
    if integers and scope is None:
        warnings.warn(
            f"{_some(integers)} held as integers, as quantised layers are, and cannot be pruned, so nothing goes of "
            "them: prune before quantising.",
            stacklevel=3,
        )
    adapters = [name for name in weights if not _ADAPTERS.isdisjoint(name.split("."))]
    if adapters:
        warnings.warn(
            f"{_some(adapters)} of an adapter, which is pruned like any layer; merging it later fills the zeros of the "
            "layer it belongs to: merge first, with merge_and_unload().",
            stacklevel=3,
        )
    for name, parameter in weights.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} has no shape yet: run one forward before pruning a model with lazy layers.")
    return weights


def _integer_layers(model: nn.Module) -> list[str]:
    """The names of layers whose weights are integers."""
    layers = ((name, module) for name, module in model.named_modules() if _is_layer(module))
    return [name for name, layer in layers if not all(p.is_floating_point() for p in layer.parameters(recurse=False))]


def _some(names: Sequence[str]) -> str:
    """The first of `names`, how many more there are, and the verb that follows."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def canonical_names(model: nn.Module) -> dict[str, str]:
    """For every qualified parameter name the first name of the same parameter; they differ where weights are tied."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _candidates(model: nn.Module) -> Iterable[tuple[str, bool]]:
    """First names of the floating-point parameters of two or more axes outside norms; True for weights of layers."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    for name, parameter in model.named_parameters():
        modules = owners[id(parameter)]
        lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
        if any(is_norm(m) for m in modules) or not parameter.is_floating_point():
            continue
        if lazy and name.rpartition(".")[2] != "weight":
            continue
        if lazy or parameter.dim() >= 2:
            yield name, any(_is_layer(m) for m in modules) and not any(isinstance(m, _EMBEDDINGS) for m in modules)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) or type(module).__name__ in _LAYER_NAMES


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises, by the name of its class: any library's LayerNorm, RMSNorm, BatchNormAct2d …"""
    return _NORM_NAME.search(type(module).__name__) is not None and not _is_layer(module)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names under which each first name's parameter can be matched: its own, its ties', and their modules'."""
    known: dict[str, list[str]] = {}
    for name, first in canonical_names(model).items():
        known.setdefault(first, []).extend((name, name.rpartition(".")[0]))
    return known


def _matching(pattern: str, layers: list[str], others: list[str], aliases: dict[str, list[str]]) -> list[str]:
    for names in (layers, others):
        hits = [name for name in names if any(fnmatchcase(alias, pattern) for alias in aliases[name])]
        if hits:
            return hits
    raise unknown_name("weight pattern", pattern, [*layers, *others])
