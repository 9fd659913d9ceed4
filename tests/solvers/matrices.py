"""Weights and second moments of inputs that the solvers are tried on."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def drawn(seed: int, rows: int = 5, columns: int = 8, samples: int = 60) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the hessian of correlated inputs, both float64."""
    weight, x = weight_and_inputs(seed, rows, columns, samples)
    return weight, 2 / samples * x.T @ x


def weight_and_inputs(seed: int, rows: int = 5, columns: int = 8, samples: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """Like a layer of a language model: W 64×128 normal; inputs correlated by 0.9 with the next, of unequal scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 128, generator=generator, dtype=torch.float64)
    fresh = torch.randn(1024, 128, generator=generator, dtype=torch.float64)
    columns = [fresh[:, 0]]
    for j in range(1, 128):
        columns.append(0.9 * columns[-1] + math.sqrt(1 - 0.9**2) * fresh[:, j])
    x = torch.stack(columns, 1) * (0.7 * torch.randn(128, generator=generator, dtype=torch.float64)).exp()
    return weight, x.T @ x


def relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """||WX - W'X||²/||WX||²."""
    gap = before.double() - after.double()
    return float((gap @ hessian * gap).sum() / (before.double() @ hessian * before.double()).sum())


class Largest(TorchDispatchMode):
    """Inside, how many bytes the ops of PyTorch hold at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.held:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
                self.most = max(self.most, sum(self.held.values()))
        return made
