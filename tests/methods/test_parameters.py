"""The rules that hyperparameters follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.allocate import get_allocation
from secateurs.core.errors import OptionError
from secateurs.methods.parameters import Between, OneOf, Registered, Rule, Several, Switch, check, rules_of

RULES: list[tuple[Rule, list[object]]] = [
    (Between(0, 1), [0, 0.5, numpy.float32(0.25)]),
    (Between(0, 1, closed="high"), [1, 1e-9]),
    (Between(0, 1, closed="both"), [0, 1]),
    (Between(0, closed="neither"), [1e-9, 1e9]),
    (Between(1, whole=True), [1, 7, numpy.int64(3)]),
    (OneOf(("a", "b")), ["a", "b"]),
    (Registered(get_allocation), ["erk", "global"]),
    (Switch(), [True, False]),
    (Several(Between(0, whole=True)), [(0,), (1, 2)]),
]


@pytest.mark.parametrize(("rule", "allowed"), RULES, ids=lambda value: str(value))
def test_a_rule_knows_right_from_wrong(rule: Rule, allowed: list[object]) -> None:
    assert [rule.fault(value) for value in allowed] == [None] * len(allowed)
    assert all(rule.fault(value) for value in rule.wrong())


@given(st.floats(-2, 3) | st.just(float("nan")))
def test_intervals(value: float) -> None:
    assert (Between(0, 1).fault(value) is None) == (0 <= value < 1)
    assert (Between(0, 1, closed="high").fault(value) is None) == (0 < value <= 1)
    assert (Between(0, 1, closed="neither").fault(value) is None) == (0 < value < 1)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Between(0, 100), "must be a number in [0, 100), got -1"),
        (Between(0, 1, closed="high"), "must be a number in (0, 1], got -1"),
        (Between(0, closed="neither"), "must be a number above 0, got -1"),
        (Between(1, whole=True), "must be a whole number of at least 1, got -1"),
        (OneOf(("never", "value")), "must be one of never, value, got -1"),
        (Registered(get_allocation), "must be a registered name, got -1"),
        (Several(Between(0)), "must be a tuple of one or more, each a number of at least 0, got -1"),
    ],
    ids=lambda value: str(value),
)
def test_a_fault_says_what_is_allowed(rule: Rule, text: str) -> None:
    assert rule.fault(-1) == text


def test_an_unknown_name_has_its_nearest() -> None:
    fault = Registered(get_allocation).fault("uniforn")
    assert fault is not None
    assert fault.startswith("is an unknown allocation 'uniforn'; the nearest are uniform")


@dataclass(frozen=True)
class Example:
    rate: Annotated[float, Between(0, 1)] = 0.5
    rounds: Annotated[int, Between(1, whole=True)] = 1
    free: str = ""

    def __post_init__(self) -> None:
        check(self)


def test_all_faults_of_a_dataclass_come_together() -> None:
    assert set(rules_of(Example)) == {"rate", "rounds"}
    Example(0.25, 3)
    with pytest.raises(OptionError) as caught:
        Example(1, 0)
    assert str(caught.value) == (
        "Example: rate must be a number in [0, 1), got 1; rounds must be a whole number of at least 1, got 0."
    )
