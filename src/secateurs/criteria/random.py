"""Random: the control arm of every claim about a criterion."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.units import Group
from .registry import criterion

__all__ = ["random"]


@criterion("random", kind="unit", paper="Liu et al. 2022, arXiv 2202.02643")
def random(model: nn.Module, groups: Sequence[Group], *, seed: int) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1).

    Each group draws from a stream of its own, made of `seed` and its name: adding, dropping or reordering groups
    changes no other group's scores.
    """
    return {group.name: torch.rand(group.size, generator=_stream(seed, group.name)) for group in groups}


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
