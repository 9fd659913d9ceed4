"""Which layers are solved one by one, and how much of each goes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .core.allocate import densities
from .core.budget import Budget, Pattern
from .core.comparison import Comparison, Within
from .core.errors import BudgetError, ModelError, OptionError
from .criteria.outliers import outlier_shares
from .solvers import block_of, blocks_of, layers_by_block, parts_of, solvable, tensor_of
from .train.scope import divided_weights, input_axes, prunable_weights, stack_names

__all__ = ["layers_to_solve", "outliers_of_blocks"]


def layers_to_solve(
    model: nn.Module,
    budget: Budget,
    within: Within,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
    *,
    stacks: bool = False,
) -> dict[str, Comparison]:
    """Per layer in a block, by module name, what goes of it.

    Args:
        stacks: experts that are stacked in one parameter are layers, too, by its name; the same goes of each of them.
            Otherwise they stay dense, with a warning.
        others: as for `prune_in_layers`.

    Raises:
        BudgetError: the budget is neither one sparsity nor a pattern.
        ModelError: no block has a layer that can be solved.
        OptionError: a pattern matches nothing, or does not divide a layer that `scope` names; or shares of layers
            beside a pattern, which has no choice of them.
    """
    pattern, limit = budget.pattern, budget.limit("sparsity")
    if pattern is None and (limit is None or len(budget.limits) > 1):
        raise BudgetError(f"what is solved layer by layer needs a budget such as sparsity=50% or 2:4, got {budget}.")
    if pattern is not None and allocation != "uniform":
        raise OptionError(f"{pattern} leaves as much of each layer: leave allocation={allocation!r} out.")
    inside = _names_to_solve(model, pattern, scope, ignore, stacks)
    if not stacks:
        _warn_of_stacks(model)
    if pattern is not None:
        return dict.fromkeys(inside, Comparison.of(pattern))
    assert limit is not None
    kept = _densities(model, inside, allocation, 1 - limit.value, allocation_options or {})
    # Through the text, since 1 − 0.6 is not 0.4.
    return {name: Comparison(round(1 - density, 12), within) for name, density in kept.items()}


def _densities(
    model: nn.Module, layers: Iterable[str], rule: str, density: float, options: Mapping[str, Any]
) -> dict[str, float]:
    """The density of each layer; the rule sees each expert of a stack as the matrix that it is."""
    parts = {layer: parts_of(model, layer) for layer in layers}
    shapes = {n: tuple(m.get_parameter("weight").shape) for inside in parts.values() for n, m in inside.items()}

    def spread(value: Any) -> Any:
        """What is told of a stack, told of its experts."""
        if not isinstance(value, Mapping):
            return value
        return {part: told for name, told in value.items() for part in parts.get(name, (name,))}

    kept = densities(rule, shapes, density, **{name: spread(value) for name, value in options.items()})
    return {layer: kept[next(iter(inside))] for layer, inside in parts.items()}


def _warn_of_stacks(model: nn.Module) -> None:
    """None; says so where experts are stacked in parameters, which a method that asks for modules leaves dense."""
    blocks = blocks_of(model)
    inside = [name for name in stack_names(model) if block_of(name, blocks) is not None]
    if inside:
        warnings.warn(
            f"what is stacked in {min(inside)} (and {len(inside) - 1} more) stays dense: this method knows layers that "
            "are modules only. Wanda, SparseGPT and others that solve layer by layer prune each expert; "
            "granularity='expert' removes whole ones.",
            stacklevel=3,
        )


def outliers_of_blocks(
    model: nn.Module,
    pattern: Pattern | None,
    scope: str | Sequence[str] | None,
    ignore: str | Sequence[str],
    data: Sequence[Any],
    seed: int,
) -> dict[str, float]:
    """Per layer the share of outliers in its block."""
    blocks = layers_by_block(model, _names_to_solve(model, pattern, scope, ignore, stacks=True))
    weights = {block: [tensor_of(model, layer) for layer in inside] for block, inside in blocks.items() if inside}
    found = outlier_shares(model, weights, data, seed=seed)
    return {layer: found[block] for block, inside in blocks.items() for layer in inside}


def _names_to_solve(
    model: nn.Module,
    pattern: Pattern | None,
    scope: str | Sequence[str] | None,
    ignore: str | Sequence[str],
    stacks: bool,
) -> list[str]:
    """The modules in blocks that can be solved and have a weight in scope, whose inputs the pattern divides.

    And, with `stacks`, the stacks.
    """
    weights = prunable_weights(model, scope, ignore, stacks=stacks)
    if pattern is not None:
        axes = input_axes(model, weights)
        weights = divided_weights(weights, pattern.of, str(pattern), all_of_them=scope is not None, axes=axes)
    stacked = stack_names(model) if stacks else frozenset()
    found = [layer for layer in (_layer_with(model, name, stacked) for name in weights) if layer is not None]
    blocks = blocks_of(model)
    inside = [layer for layer in found if block_of(layer, blocks) is not None]
    if not inside:
        raise ModelError(f"no block of {type(model).__name__} has a layer to solve: look at scope= and ignore=.")
    return inside


def _layer_with(model: nn.Module, weight: str, stacks: Collection[str]) -> str | None:
    """The layer that has the weight of this name; None if it cannot be solved."""
    if weight in stacks:
        return weight
    path, _, leaf = weight.rpartition(".")
    # Of an attention of PyTorch's own, the weights of its inputs are no module's.
    return path if leaf == "weight" and solvable(model.get_submodule(path)) else None
