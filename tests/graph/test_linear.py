"""What inference costs grows in proportion to the graph, and not at all with its widths: counted in calls."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.graph.infer import infer
from tests.graph import nets


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).relu())


class Dense(nn.Module):
    """Concatenations that grow: every layer reads all before it."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + i * width, width, 1) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x.mean((2, 3))


def residual(depth: int, width: int) -> tuple[nn.Module, Tensor]:
    blocks = [Residual(width) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, width, 1), *blocks, nn.Conv2d(width, 2, 1)), torch.ones(1, 3, 4, 4)


def attention(depth: int, width: int) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, depth), nn.Linear(width, 2)), torch.ones(1, 3, width)


def grouped(depth: int, width: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(nets.GroupedQuery() for _ in range(depth))), torch.ones(2, 6, 16)


def calls(made: tuple[nn.Module, Any]) -> int:
    """Python calls of one inference, after one that fills caches."""
    infer(*made)
    profile = cProfile.Profile()
    profile.enable()
    infer(*made)
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


Net = Callable[[int, int], tuple[nn.Module, Any]]


@pytest.mark.parametrize("net", [residual, attention, grouped])
def test_twice_the_depth_costs_twice(net: Net) -> None:
    small, middle, large = (calls(net(depth, 16)) for depth in (4, 8, 16))
    # Exactly linear growth means equal differences per layer.
    assert (large - middle) / 8 <= 1.15 * (middle - small) / 4


@pytest.mark.parametrize("net", [residual, attention])
def test_width_costs_nothing(net: Net) -> None:
    assert abs(calls(net(4, 512)) - calls(net(4, 16))) <= 0.02 * calls(net(4, 16))


def test_dense_concatenations_cost_what_they_name() -> None:
    """A concatenation of n widths is n names long, so n of them are n² in all, and not more."""
    small, large = (calls((Dense(depth, 4), torch.ones(1, 3, 4, 4))) for depth in (8, 32))
    assert large <= 16 * small
