"""Costs as polynomials, against counting the entries of a network that was really cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.core.cost import CostModel, Monomial, constant, gather
from secateurs.core.dims import Atom, Fixed, product

A, B = Atom("a", 5), Atom("b", 7)
# Conv2d(3, a, 3) – BatchNorm2d(a) – Conv2d(a, b, 1) – flatten 2×2 – Linear(4·b, 10); the input is 4×4.
COSTS = CostModel(
    {
        "params": gather(
            [
                Monomial(27, (A,), "0.weight"),
                Monomial(1, (A,), "0.bias"),
                Monomial(1, (A,), "1.weight"),
                Monomial(1, (A,), "1.bias"),
                Monomial(1, (A, B), "2.weight"),
                Monomial(1, (B,), "2.bias"),
                Monomial(10, (product(B, Fixed(4)),), "4.weight"),
                constant(10, "4.bias"),
            ]
        ),
        "macs": (Monomial(27 * 4, (A,), "0"), Monomial(4, (A, B), "2"), Monomial(10, (B, Fixed(4)), "4")),
    }
)


def network(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, a, 3), nn.BatchNorm2d(a), nn.Conv2d(a, b, 1), nn.Flatten(), nn.Linear(4 * b, 10))


@given(st.integers(1, 5), st.integers(1, 7))
def test_params_are_those_of_the_smaller_network(a: int, b: int) -> None:
    model = network(a, b)
    assert COSTS.total("params", {"a": a, "b": b}) == sum(p.numel() for p in model.parameters())
    by_source = {name: p.numel() for name, p in model.named_parameters()}
    assert COSTS.by_source("params", {"a": a, "b": b}) == by_source


def test_without_counts_the_whole_model_is_meant() -> None:
    assert COSTS.total("params") == sum(p.numel() for p in network(5, 7).parameters())
    assert COSTS.total("params", {"a": 2}) == sum(p.numel() for p in network(2, 7).parameters())
    assert COSTS.by_source("macs") == {"0": 540, "2": 140, "4": 280}


@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.parametrize("group", ["a", "b"])
def test_a_unit_costs_what_its_removal_saves(metric: str, group: str) -> None:
    sizes = {"a": 5, "b": 7}
    saved = COSTS.total(metric) - COSTS.total(metric, {group: sizes[group] - 1})
    assert COSTS.unit(metric, group, sizes) == saved > 0
    assert COSTS.unit(metric, "c", {"c": 3}) == 0


def test_gather_adds_up_what_is_equal_and_keeps_the_order() -> None:
    parts = [Monomial(1, (A,), "x"), Monomial(2, (B,), "x"), Monomial(3, (A,), "x"), Monomial(4, (A,), "y")]
    assert gather(parts) == (Monomial(4, (A,), "x"), Monomial(2, (B,), "x"), Monomial(4, (A,), "y"))
    assert constant(5).value({"a": 0}) == 5


def test_the_model_is_really_run() -> None:
    assert network(2, 3)(torch.ones(1, 3, 4, 4)).shape == (1, 10)
