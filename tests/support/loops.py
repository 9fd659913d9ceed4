"""A small network, its batches, and pruners of every kind, for tests of loops that other libraries run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateurs as sec

__all__ = ["BUILDS", "STEPS", "adam", "batches", "net", "plain_run", "zeros"]

# Every schedule below ends within so many optimizer steps, and is under way after half of them.
STEPS = 12

BUILDS: dict[str, Callable[[nn.Module, Optimizer], Any]] = {
    "gradual": lambda m, o: sec.GradualMagnitude(m, o, sparsity=0.75, initial=0.2, end=8, every=2),
    "value": lambda m, o: sec.GradualMagnitude(m, o, sparsity=0.75, initial=0.2, end=8, every=2, revive="value"),
    "granet": lambda m, o: sec.GraNet(m, o, sparsity=0.75, initial=0.5, end=6, until=10, every=2),
    "pdp": lambda m, o: sec.PDP(m, o, sparsity=0.75, begin=0, every=2, rise=0.25),
    "sr-ste": lambda m, o: sec.SRSTE(m, o, pattern="1:4"),
}


def net(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), 0.02)


def batches(count: int = STEPS, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    draw = (torch.randn(count, size, 8, generator=random), torch.randint(0, 4, (count, size), generator=random))
    return list(zip(*draw, strict=True))


def plain_run(name: str, accumulate: int = 1) -> nn.Sequential:
    """The network after a loop of our own, finalized."""
    model = net()
    optimizer = adam(model)
    pruner = BUILDS[name](model, optimizer)
    for number, (x, y) in enumerate(batches(STEPS * accumulate), 1):
        (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
    pruner.finalize()
    return model


def zeros(model: nn.Module) -> int:
    """Zero entries of the two weights, which have 240 in all."""
    return sum(int((weight == 0).sum()) for name, weight in model.named_parameters() if name.endswith("weight"))
