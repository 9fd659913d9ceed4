"""Which weights compete with which: all of the model, those of one layer, or those of one neuron.

A pool is a vector out of which some entries go. A rule says of each pool how many stay; the largest do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .apportion import apportion
from .errors import OptionError
from .select import per_row

__all__ = ["Per", "pools", "prune_pools"]

Per = Literal["model", "layer", "neuron"]
Count = Callable[[Tensor, Tensor], Tensor]
_MODEL = "the model"


def pools(tensors: Mapping[str, Tensor], per: Per) -> dict[str, Tensor]:
    """The pools as rows of matrices: [1, entries of all], [1, entries] of each tensor, or [outputs, entries].

    Args:
        tensors: weights, or masks of them, by name; a neuron's are those of one place along the first axis.
        per: "model", "layer" or "neuron"; for "model" the result has one matrix, in the order of the tensors.

    Raises:
        OptionError: no tensors.

    >>> {name: list(rows.shape) for name, rows in pools({"a": torch.ones(4, 3, 2)}, "neuron").items()}
    {'a': [4, 6]}
    """
    if not tensors:
        raise OptionError("there are no weights to divide into pools: give at least one tensor.")
    if per == "layer":
        return {name: tensor.reshape(1, -1) for name, tensor in tensors.items()}
    if per == "neuron":
        return {name: tensor.reshape(len(tensor), -1) for name, tensor in tensors.items()}
    first = next(iter(tensors.values())).device
    return {_MODEL: torch.cat([tensor.reshape(-1).to(first) for tensor in tensors.values()])[None]}


def prune_pools(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    count: Count,
    *,
    per: Per = "layer",
    total: int | None = None,
) -> dict[str, Tensor]:
    """The masks after a round: of each pool the largest magnitudes stay, and nothing comes back.

    Args:
        weights: by name.
        masks: bool, of the same names and shapes; true is what is left before the round.
        count: from pools and their masks, both [pools, entries], to how many stay of each, int64 [pools].
        per: what is a pool.
        total: if given, exactly so many stay in all, in proportion to what `count` says.

    Raises:
        OptionError: NaN weights, or more asked to stay than are left.
    """
    left = pools(masks, per)
    values = {name: rows.detach().abs() for name, rows in pools(weights, per).items()}
    stay = {name: count(values[name], left[name]) for name in left}
    if total is not None:
        stay = _meeting(stay, {name: mask.sum(1) for name, mask in left.items()}, total)
    # What went before ranks below every magnitude, zero included.
    chosen = {name: per_row(values[name].masked_fill(~left[name], -1), stay[name]) & left[name] for name in left}
    if per != "model":
        return {name: chosen[name].view(mask.shape) for name, mask in masks.items()}
    parts = chosen[_MODEL][0].split([mask.numel() for mask in masks.values()])
    return {n: part.view(mask.shape).to(mask.device) for (n, mask), part in zip(masks.items(), parts, strict=True)}


def _meeting(stay: Mapping[str, Tensor], left: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
    """Counts in proportion to `stay`, none above what is left, that add up to `total`."""
    wanted = {f"{name} {i}": n for name, counts in stay.items() for i, n in enumerate(counts.tolist())}
    caps = {f"{name} {i}": n for name, counts in left.items() for i, n in enumerate(counts.tolist())}
    if not 0 <= total <= sum(caps.values()):
        raise OptionError(f"{total} weights cannot stay of {sum(caps.values())} that are left.")
    met = apportion(wanted, total, dict.fromkeys(caps, 0), caps)
    return {
        name: torch.tensor([met[f"{name} {i}"] for i in range(len(counts))], device=counts.device)
        for name, counts in stay.items()
    }
