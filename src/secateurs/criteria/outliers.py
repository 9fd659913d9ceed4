"""Outliers: the share of weights whose product with their inputs stands far out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import OptionError
from .activation import wanda

__all__ = ["outlier_shares"]


def outlier_shares(
    model: nn.Module,
    weights: Mapping[str, Sequence[str]],
    data: Sequence[Any],
    *,
    times: float = 5.0,
    seed: int = 0,
) -> dict[str, float]:
    """Per group of weights the share of entries with |w_ij|·||x_j|| over `times` the mean of them (OWL, equation 1).

    Yin et al. 2024, "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175; the allocation "owl" takes these shares.

    Args:
        model, data, seed: see `activation.input_norms`.
        weights: the names of the weights of each block, or of each layer.
        times: M, 5 by default (the paper finds 3 to 10 good).

    Raises:
        OptionError: a group without a weight of a known layer.
    """
    scores = wanda(model, [name for names in weights.values() for name in names], data=data, seed=seed)
    found: dict[str, float] = {}
    for group, names in weights.items():
        entries = [scores[name].double().flatten().cpu() for name in names if name in scores]
        if not entries:
            raise OptionError(f"none of the weights of {group} ({', '.join(names)}) is of a layer with known inputs.")
        flat = torch.cat(entries)
        found[group] = float((flat > times * flat.mean()).double().mean())
    return found
