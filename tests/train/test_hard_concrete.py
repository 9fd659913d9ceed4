"""Hard-concrete gates against figures from the formula, a slow twin, and many draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.train.hard_concrete import (
    LIMIT,
    clamp_,
    deterministic,
    draw,
    extract,
    open_probability,
    sample,
    soft_value,
)

ALPHAS = torch.tensor([0.0, 4.60517, -4.60517], dtype=torch.float64)


def slow_gate(alpha: float, u: float) -> float:
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha) / (2 / 3)))
    return min(max(s * 1.2 - 0.1, 0.0), 1.0)


@given(alpha=st.floats(-4.6, 4.6), u=st.floats(1e-3, 1 - 1e-3))
def test_a_gate_is_its_formula(alpha: float, u: float) -> None:
    made = sample(torch.tensor(alpha, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
    assert float(made) == pytest.approx(slow_gate(alpha, u), abs=1e-9)


def test_chances_of_being_open() -> None:
    expected = [0.8318222, 0.9979823, 0.0471298]
    torch.testing.assert_close(open_probability(ALPHAS), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)
    assert float(open_probability(torch.tensor(-100.0))) == pytest.approx(1e-6, rel=0.1)
    shift = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(open_probability(shift), torch.sigmoid(shift + 1.598597), atol=1e-6, rtol=0)


def test_many_draws_have_these_chances() -> None:
    drawn = draw(torch.zeros(1_000_000))
    assert float((drawn == 0).float().mean()) == pytest.approx(0.168178, abs=2e-3)
    assert float((drawn == 1).float().mean()) == pytest.approx(0.168178, abs=2e-3)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=2e-3)
    assert not torch.equal(drawn[:100], draw(torch.zeros(100)))


def test_without_noise() -> None:
    assert deterministic(ALPHAS).tolist() == pytest.approx([0.5, 1.0, 0.0])
    assert float(deterministic(torch.tensor(1.0))) == pytest.approx(slow_gate(1.0, 0.5))


def test_gradients_flow_where_a_gate_is_between() -> None:
    alphas = torch.tensor([0.3, 4.6, -4.6], requires_grad=True)
    deterministic(alphas).sum().backward()
    assert alphas.grad is not None
    assert alphas.grad[0] > 0
    assert alphas.grad[1:].tolist() == [0, 0]


def test_as_many_zeros_as_expected_and_soft_values_for_the_rest() -> None:
    alphas = torch.tensor([4.605, -4.605, 0.0, 4.605, -4.605, -4.605])
    expected = float(open_probability(alphas).sum())
    made = extract(alphas)
    assert int((made == 0).sum()) == round(6 - expected) == 3
    assert made.nonzero().flatten().tolist() == [0, 2, 3]
    assert made[[0, 2]].tolist() == pytest.approx([0.9960, 0.5], abs=1e-4)
    torch.testing.assert_close(soft_value(alphas), torch.sigmoid(alphas * 1.2))


def test_equal_gates_go_by_index_and_what_stays_may_be_told() -> None:
    alphas = torch.full((4,), -0.5)
    assert extract(alphas, torch.tensor([False, True, False, False])).nonzero().flatten().tolist() == [1]
    gone = round(4 - 4 * float(open_probability(torch.tensor(-0.5))))
    assert (extract(alphas) == 0).tolist() == [False] * (4 - gone) + [True] * gone


def test_clamped_gates_come_back() -> None:
    alphas = torch.nn.Parameter(torch.tensor([10.0, -10.0, 1.0]))
    clamp_(alphas)
    assert alphas.tolist() == pytest.approx([LIMIT, -LIMIT, 1.0])
    assert pytest.approx(4.60517, abs=1e-5) == LIMIT
