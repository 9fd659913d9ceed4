"""Block influence: a block that hardly turns its input can go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.batch import double, leaves
from ..core.depth import LayerGroup
from ..core.errors import ModelError, OptionError
from ..solvers.layerwise import seen_of
from .evidence import Visitor, observe
from .registry import criterion

__all__ = ["CHANGES", "Change", "block_changes", "block_influence"]

Change = Literal["cosine", "angular", "mse", "mae"]
CHANGES: tuple[Change, ...] = ("cosine", "angular", "mse", "mae")


@criterion(
    "block-influence",
    kind="unit",
    groups=("layer",),
    needs=("data",),
    paper="Men et al. 2024, arXiv 2403.03853, equation 1",
)
def block_influence(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    *,
    data: Sequence[Any],
    seed: int,
    axis: int | None = None,
    change: Change = "cosine",
) -> dict[str, Tensor]:
    """1 - E[cos(x_i, x_i+1)], with x_i and x_i+1 what goes into a block and comes out of it, for each token or pixel.

    A token that a block leaves as it is has a cosine of 1, also where it is zero. Tokens that an "attention_mask"
    leaves out do not count.

    Args:
        model, data, seed: see `activation.input_norms`.
        groups: of layers.
        axis: of the block's input along which the features of a token lie. Default: the last one where the block has a
            matrix of that size, as in a transformer; else the second, as in a convolutional network.
        change: "cosine" (above, the default) or another of `block_changes`.

    Raises:
        ModelError: a block was never called, or does not keep the shape of its input.
    """
    found = block_changes(model, [b for g in groups for b in g.blocks], data, change=change, seed=seed, axis=axis)
    return {g.name: torch.tensor([found[block] for block in g.blocks]) for g in groups}


def block_changes(
    model: nn.Module,
    blocks: Sequence[str],
    data: Sequence[Any],
    *,
    change: Change = "cosine",
    seed: int = 0,
    axis: int | None = None,
) -> dict[str, float]:
    """How much each block changes what goes through it: the mean over tokens, per block.

    Args:
        model, data, seed, axis: see `block_influence`.
        blocks: paths of modules that return something of the shape of their first input.
        change: of a token x to y: "cosine", 1 - cos(x, y); "angular", arccos(cos(x, y))/π, from 0 to 1; "mse" and
            "mae", the mean square and the mean absolute value of y - x over its features.

    Raises:
        ModelError: a block was never called, or does not keep the shape of its input.
        OptionError: an unknown change.
    """
    if change not in CHANGES:
        raise OptionError(f"change must be one of {', '.join(CHANGES)}, got {change!r}.")
    given: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {block: [] for block in blocks}
    masks = seen_of(data)
    now: list[Tensor | None] = [None]

    def batches() -> Iterator[Any]:
        for batch, mask in zip(data, masks, strict=True):
            now[0] = mask
            yield batch

    def remember(block: str) -> Callable[[nn.Module, Any, Any], None]:
        # A copy, since a block may write its output into its input.
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given[block] = next(t for t in leaves((args, kwargs)) if t.is_floating_point()).detach().clone()

        return before

    def visitor(block: str) -> Visitor:
        def visit(module: nn.Module, _given: Tensor, made: Tensor) -> None:
            tokens = _changes(block, module, given.pop(block), made, axis, change)
            seen = now[0]
            padded = seen is not None and seen.shape == tokens.shape
            found[block].append(tokens[seen.to(tokens.device)] if padded and seen is not None else tokens.flatten())

        return visit

    with ExitStack() as hooks:
        for block in blocks:
            handle = model.get_submodule(block).register_forward_pre_hook(remember(block), with_kwargs=True)
            hooks.callback(handle.remove)
        observe(model, batches(), {block: visitor(block) for block in blocks}, padding=True, seed=seed)
    return {block: float(torch.cat(tokens).mean()) for block, tokens in found.items()}


def _changes(block: str, module: nn.Module, before: Tensor, after: Tensor, axis: int | None, change: Change) -> Tensor:
    """How much each token changes: float64, in the shape of the input without its features."""
    if before.shape != after.shape:
        raise ModelError(
            f"{block} makes {list(after.shape)} of its first input {list(before.shape)}, so no cosine of the two is "
            "defined; use another criterion for it, or leave it out."
        )
    dim = _features(module, before) if axis is None else axis
    x, y = double(before), double(after)
    if change in ("mse", "mae"):
        return (y - x).abs().pow(2 if change == "mse" else 1).mean(dim)
    cosines = torch.where((x == y).all(dim), 1.0, F.cosine_similarity(x, y, dim=dim))
    # Rounding gives cosines just outside, of which there is no angle.
    return 1 - cosines if change == "cosine" else cosines.clamp(-1, 1).arccos() / math.pi


def _features(module: nn.Module, given: Tensor) -> int:
    sizes = {n for p in module.parameters() if p.dim() == 2 for n in p.shape}
    return -1 if given.dim() <= 2 or given.shape[-1] in sizes else 1
