"""Bias compensation: the best of all constants, to the last digit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateurs.solvers import compensation

DOUBLE = torch.float64


def error(x: Tensor, w: Tensor, goes: list[int], b: Tensor) -> float:
    """The mean over tokens of ||W·x - (W·(x without those that go) + b)||²."""
    lost = x[:, goes] @ w[:, goes].T
    return float((lost - b).square().sum(1).mean())


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(300, 5, dtype=DOUBLE).exp(), torch.randn(4, 5, dtype=DOUBLE)


def bias(x: Tensor, w: Tensor, goes: list[int]) -> Tensor:
    mask = torch.zeros(w.shape[1], dtype=torch.bool)
    mask[goes] = True
    return compensation(w[None], x.mean(0)[None], mask)


def test_the_error_of_one_input_is_its_variance_times_its_column(layer: tuple[Tensor, Tensor]) -> None:
    x, w = layer
    wifv = float(x[:, 2].var(correction=0) * w[:, 2].square().sum())
    assert error(x, w, [2], bias(x, w, [2])) == pytest.approx(wifv, rel=1e-12)


def test_without_compensation_the_square_of_the_mean_is_lost_besides(layer: tuple[Tensor, Tensor]) -> None:
    x, w = layer
    gained = error(x, w, [2], torch.zeros(4, dtype=DOUBLE)) - error(x, w, [2], bias(x, w, [2]))
    assert gained == pytest.approx(float(x[:, 2].mean() ** 2 * w[:, 2].square().sum()), rel=1e-12)


def test_the_error_of_several_inputs_is_a_trace_of_their_covariance(layer: tuple[Tensor, Tensor]) -> None:
    x, w = layer
    goes = [0, 3, 4]
    exact = float((w[:, goes] @ torch.cov(x[:, goes].T, correction=0) @ w[:, goes].T).trace())
    assert error(x, w, goes, bias(x, w, goes)) == pytest.approx(exact, rel=1e-12)


def test_any_other_constant_adds_its_distance(layer: tuple[Tensor, Tensor]) -> None:
    x, w = layer
    best = bias(x, w, [1, 2])
    delta = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=DOUBLE)
    more = error(x, w, [1, 2], best + delta) - error(x, w, [1, 2], best)
    assert more == pytest.approx(float(delta.square().sum()), rel=1e-9)


def test_each_group_of_a_convolution_has_its_own_inputs() -> None:
    weight = torch.arange(8.0).view(2, 2, 2)
    mean = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=DOUBLE)
    goes = torch.tensor([[[True, False]], [[False, True]]])
    assert compensation(weight, mean, goes).tolist() == [0.0, 2.0, 5000.0, 7000.0]


def test_an_infinite_mean_of_what_stays_does_no_harm() -> None:
    mean = torch.tensor([[1.0, torch.inf]], dtype=DOUBLE)
    assert compensation(torch.ones(1, 1, 2), mean, torch.tensor([True, False])).tolist() == [1.0]
