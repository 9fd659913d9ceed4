"""Block influence: a block that hardly turns its input can go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.batch import double, leaves
from ..core.depth import LayerGroup
from ..core.errors import ModelError
from .evidence import Visitor, observe
from .registry import criterion

__all__ = ["block_influence"]


@criterion(
    "block-influence",
    kind="unit",
    groups=("layer",),
    needs=("data",),
    paper="Men et al. 2024, arXiv 2403.03853, equation 1",
)
def block_influence(
    model: nn.Module, groups: Sequence[LayerGroup], *, data: Sequence[Any], seed: int, axis: int | None = None
) -> dict[str, Tensor]:
    """1 - E[cos(x_i, x_i+1)], with x_i and x_i+1 what goes into a block and comes out of it, for each token or pixel.

    A token that a block leaves as it is has a cosine of 1, also where it is zero. Padding counts as any token does.

    Args:
        model, data, seed: see `activation.input_norms`.
        groups: of layers.
        axis: of the block's input along which the features of a token lie. Default: the last one where the block has a
            matrix of that size, as in a transformer; else the second, as in a convolutional network.

    Raises:
        ModelError: a block was never called, or does not keep the shape of its input.
    """
    blocks = [block for group in groups for block in group.blocks]
    given: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {block: [] for block in blocks}

    def remember(block: str) -> Callable[[nn.Module, Any, Any], None]:
        # A copy, since a block may write its output into its input.
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given[block] = next(t for t in leaves((args, kwargs)) if t.is_floating_point()).detach().clone()

        return before

    def visitor(block: str) -> Visitor:
        def visit(module: nn.Module, _given: Tensor, made: Tensor) -> None:
            found[block].append(_cosines(block, module, given.pop(block), made, axis))

        return visit

    with ExitStack() as hooks:
        for block in blocks:
            handle = model.get_submodule(block).register_forward_pre_hook(remember(block), with_kwargs=True)
            hooks.callback(handle.remove)
        observe(model, data, {block: visitor(block) for block in blocks}, seed=seed)
    return {g.name: torch.stack([1 - torch.cat(found[block]).mean() for block in g.blocks]) for g in groups}


def _cosines(block: str, module: nn.Module, before: Tensor, after: Tensor, axis: int | None) -> Tensor:
    """The cosine of each token's input and output: float64 [tokens]."""
    if before.shape != after.shape:
        raise ModelError(
            f"{block} makes {list(after.shape)} of its first input {list(before.shape)}, so no cosine of the two is "
            "defined; use another criterion for it, or leave it out."
        )
    dim = _features(module, before) if axis is None else axis
    x, y = double(before), double(after)
    return torch.where((x == y).all(dim), 1.0, F.cosine_similarity(x, y, dim=dim)).flatten()


def _features(module: nn.Module, given: Tensor) -> int:
    sizes = {n for p in module.parameters() if p.dim() == 2 for n in p.shape}
    return -1 if given.dim() <= 2 or given.shape[-1] in sizes else 1
