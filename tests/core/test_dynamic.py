"""Levels within a budget: against brute force, and the search against losses whose optimum is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.dynamic import cheapest, search
from secateurs.core.errors import BudgetError, OptionError

ERRORS = [[0.0, 0.2, 0.5, 1.0], [0.0, 0.1, 0.9, 1.0], [0.0, 0.3, 0.4, 1.0]]
PRICES = [[9.0, 6.0, 3.0, 0.0], [7.0, 5.0, 2.0, 0.0], [4.0, 3.0, 2.0, 1.0]]


def total(levels: list[list[float]], choice: tuple[int, ...]) -> float:
    return sum(row[level] for row, level in zip(levels, choice, strict=True))


def by_brute_force(errors: list[list[float]], prices: list[list[float]], budget: float) -> float:
    choices = itertools.product(*(range(len(row)) for row in errors))
    return min(total(errors, choice) for choice in choices if total(prices, choice) <= budget)


@pytest.mark.parametrize("budget", range(1, 21))
def test_three_modules_of_four_levels_as_by_brute_force(budget: int) -> None:
    choice = cheapest(ERRORS, PRICES, budget)
    assert total(PRICES, choice) <= budget
    assert total(ERRORS, choice) == pytest.approx(by_brute_force(ERRORS, PRICES, budget))


levels = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=4)


@given(st.lists(levels, min_size=1, max_size=4), st.integers(0, 40))
def test_any_modules_as_by_brute_force(modules: list[list[tuple[int, int]]], budget: int) -> None:
    errors = [[float(error) for error, _ in rows] for rows in modules]
    prices = [[float(price) for _, price in rows] for rows in modules]
    lowest = sum(map(min, prices))
    if lowest > budget:
        with pytest.raises(BudgetError, match=f"the cheapest levels add up to {lowest:g}"):
            cheapest(errors, prices, budget)
        return
    # One bucket a unit of price: nothing is rounded.
    choice = cheapest(errors, prices, budget, buckets=max(budget, 1))
    assert total(prices, choice) <= budget
    assert total(errors, choice) == by_brute_force(errors, prices, budget)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=4), min_size=2, max_size=4), st.floats(0.1, 1), st.data()
)
def test_a_budget_is_never_exceeded_and_little_is_lost(
    prices: list[list[float]], share: float, data: st.DataObject
) -> None:
    errors = [data.draw(st.lists(st.floats(0, 1), min_size=len(row), max_size=len(row))) for row in prices]
    lowest = sum(map(min, prices))
    budget = lowest + share * sum(map(max, prices))
    choice = cheapest(errors, prices, budget, buckets=1000)
    assert total(prices, choice) <= budget * (1 + 1e-6)
    if (tighter := budget * (1 - len(prices) / 1000)) >= lowest:
        assert total(errors, choice) <= by_brute_force(errors, prices, tighter) + 1e-9


def test_all_that_the_dense_model_takes_leaves_it_dense() -> None:
    assert cheapest(ERRORS, PRICES, 20) == (0, 0, 0)
    thirds = [[1 / 3, 0.0]] * 3
    assert cheapest([[0.0, 1.0]] * 3, thirds, sum(row[0] for row in thirds)) == (0, 0, 0)


def test_too_little_is_unreachable() -> None:
    assert cheapest(ERRORS, PRICES, 1) == (3, 3, 3)
    with pytest.raises(BudgetError, match=r"a budget of 0\.9 is unreachable: the cheapest levels add up to 1"):
        cheapest(ERRORS, PRICES, 0.9)


def test_nothing_to_spend_leaves_what_is_free() -> None:
    assert cheapest([[0.0, 1.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]], 0) == (1, 0)


def test_of_equal_errors_the_earlier_level_wins() -> None:
    assert cheapest([[1.0, 1.0], [0.0, 3.0]], [[2.0, 1.0], [3.0, 1.0]], 5) == (0, 0)
    assert cheapest([[1.0, 1.0, 1.0], [0.0, 3.0]], [[4.0, 1.0, 1.0], [3.0, 1.0]], 4) == (1, 0)


def test_a_price_beyond_the_budget_is_never_paid() -> None:
    assert cheapest([[0.0, 1.0], [0.0, 1.0]], [[1e12, 1.0], [1.0, 0.5]], 2) == (1, 0)


@pytest.mark.parametrize(
    ("errors", "prices", "budget", "buckets", "message"),
    [
        ([[0.0]], [[1.0, 2.0]], 1, 10, "at least one level"),
        ([[]], [[]], 1, 10, "at least one level"),
        ([[math.nan]], [[1.0]], 1, 10, "must be finite"),
        ([[0.0]], [[-1.0]], 1, 10, "prices at least 0"),
        ([[0.0]], [[1.0]], math.inf, 10, "in at least 1 bucket, got inf"),
        ([[0.0]], [[1.0]], 1, 0, "got 1 and 0"),
    ],
)
def test_nonsense_is_refused(errors: object, prices: object, budget: float, buckets: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cheapest(errors, prices, budget, buckets=buckets)


# -- the search --------------------------------------------------------------------------------------------------------


def solve(coefficients: torch.Tensor) -> tuple[int, ...]:
    """Five modules of six levels of falling price, ten to spend."""
    errors = [[float(c) * level for level in range(6)] for c in coefficients]
    return cheapest(errors, [[5.0 - level for level in range(6)]] * 5, 10.0)


def far_from(goal: tuple[int, ...]):
    asked: list[tuple[int, ...]] = []

    def loss_of(choice: tuple[int, ...]) -> float:
        asked.append(choice)
        return float(sum((a - b) ** 2 for a, b in zip(choice, goal, strict=True)))

    return loss_of, asked


def test_a_search_finds_what_errors_alone_do_not_tell() -> None:
    goal = (5, 0, 5, 0, 5)
    loss_of, asked = far_from(goal)
    found = search(solve, loss_of, 5, starts=20, failures=20)
    assert (found.choice, found.loss) == (goal, 0)
    assert loss_of(solve(torch.ones(5))) > 0
    assert found.evaluations == len(asked) - 1


def test_no_choice_is_evaluated_twice() -> None:
    loss_of, asked = far_from((0, 0, 0, 0, 0))
    search(solve, loss_of, 5, starts=30, failures=10)
    assert len(asked) == len(set(asked))


def test_without_draws_all_coefficients_are_one() -> None:
    loss_of, asked = far_from((5, 0, 5, 0, 5))
    found = search(solve, loss_of, 5, starts=0, failures=0)
    assert asked == [solve(torch.ones(5))] == [found.choice]
    assert found.evaluations == 1


def test_the_same_seed_finds_the_same() -> None:
    seen = []
    for seed in (1, 1, 2):
        loss_of, asked = far_from((1, 2, 3, 4, 5))
        search(solve, loss_of, 5, starts=5, failures=5, seed=seed)
        seen.append(asked)
    assert seen[0] == seen[1] != seen[2]


def test_each_stage_draws_as_many_coefficients_as_it_says_and_ends_after_its_failures() -> None:
    drawn: list[torch.Tensor] = []

    def noted(coefficients: torch.Tensor) -> tuple[int, ...]:
        drawn.append(coefficients.clone())
        return tuple(range(len(drawn), len(drawn) + 20))

    search(noted, lambda choice: float(choice[0]), 20, starts=0, share=0.1, failures=3)
    changed = [int((c != drawn[0]).sum()) for c in drawn[1:-1]]
    assert changed == [2, 2, 2, 1, 1, 1]
    assert torch.equal(drawn[-1], drawn[0])


def test_a_loss_of_nan_is_never_taken() -> None:
    found = search(solve, lambda choice: 7.0 if choice == solve(torch.ones(5)) else math.nan, 5, starts=5, failures=5)
    assert (found.choice, found.loss) == (solve(torch.ones(5)), 7.0)


def test_a_search_refuses_nonsense() -> None:
    with pytest.raises(OptionError, match=r"got 0, 100, 100 and 0\.1"):
        search(solve, lambda choice: 0.0, 0)
