"""Schedules: the curve's numbers, its ends, and the steps at which units go."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.errors import OptionError
from secateurs.core.schedule import Cosine, Cubic, IterativeGeometric, Linear, OneShot, Schedule, get_schedule


def test_the_cubic_curve_of_zhu_and_gupta() -> None:
    schedule = Cubic(final=0.9, begin=100, end=500)
    values = [schedule(step) for step in (100, 200, 300, 400, 500)]
    assert values == pytest.approx([0.0, 0.5203125, 0.7875, 0.8859375, 0.9], abs=1e-15)
    assert Cubic(final=0.9, begin=0, end=2, initial=0.5)(1) == pytest.approx(0.85)


def test_a_cubic_starts_three_times_as_steep_as_a_line() -> None:
    n = 10**7
    assert Cubic(final=0.9, begin=0, end=n)(1) * n == pytest.approx(2.7, rel=1e-5)
    assert Cubic(final=0.9, begin=0, end=n, exponent=5)(1) * n == pytest.approx(4.5, rel=1e-5)
    assert Linear(final=0.9, begin=0, end=n)(1) * n == pytest.approx(0.9, rel=1e-5)


def test_a_line_is_a_cubic_of_exponent_one() -> None:
    for step in range(-3, 15):
        line = Linear(final=0.8, begin=2, end=11, initial=0.2)(step)
        assert line == pytest.approx(Cubic(final=0.8, begin=2, end=11, initial=0.2, exponent=1)(step), abs=1e-15)
    assert Linear(final=0.8, begin=0, end=4)(1) == pytest.approx(0.2)


def test_a_cosine_is_slow_at_both_ends() -> None:
    schedule = Cosine(final=0.8, begin=0, end=4, initial=0.2)
    assert [schedule(step) for step in range(5)] == pytest.approx(
        [0.2, 0.2 + 0.6 * 0.1464466094, 0.5, 0.7121320344, 0.8]
    )


ramps = st.builds(
    lambda cls, a, b, begin, length, every: cls(
        final=max(a, b), initial=min(a, b), begin=begin, end=begin + length, every=every
    ),
    st.sampled_from([Cubic, Linear, Cosine]),
    st.floats(0, 0.999),
    st.floats(0, 0.999),
    st.integers(0, 50),
    st.integers(1, 300),
    st.integers(1, 100),
)
rounds = st.builds(
    lambda final, begin, n, every: IterativeGeometric(final=final, begin=begin, rounds=n, every=every),
    st.floats(0, 0.999),
    st.integers(0, 50),
    st.integers(1, 20),
    st.integers(1, 20),
)
schedules = st.one_of(ramps, rounds, st.builds(OneShot, st.floats(0, 0.999), st.integers(0, 50)))


@given(schedules)
def test_sparsity_never_falls_and_ends_where_asked(schedule: Schedule) -> None:
    values = [schedule(step) for step in range(-5, schedule.end + 5)]
    assert all(earlier <= later for earlier, later in pairwise(values))
    assert schedule(schedule.end) == schedule.final == schedule(10**9)
    assert values[0] == getattr(schedule, "initial", 0.0)


@given(schedules)
def test_the_last_update_meets_the_final_sparsity(schedule: Schedule) -> None:
    due = [step for step in range(-5, schedule.end + 200) if schedule.due(step)]
    assert due[-1] == schedule.end
    assert schedule(due[-1]) == schedule.final


def test_updates_fall_on_every_hundredth_step_and_on_the_end() -> None:
    forced = Cubic(final=0.9, begin=0, end=1050, every=100)
    assert [step for step in range(-100, 1300) if forced.due(step)] == [*range(0, 1001, 100), 1050]
    assert forced(1050) == 0.9
    free = Cubic(final=0.9, begin=0, end=1050, every=100, force_final=False)
    last = max(step for step in range(1300) if free.due(step))
    assert last == 1000
    assert free(last) == pytest.approx(0.8999028, abs=5e-8)


def test_one_shot_is_a_step() -> None:
    schedule = OneShot(0.7, at=3)
    assert [schedule(step) for step in (-1, 2, 3, 4)] == [0.0, 0.0, 0.7, 0.7]
    assert [step for step in range(10) if schedule.due(step)] == [3] == [schedule.end]


def test_each_geometric_round_removes_the_same_share() -> None:
    schedule = IterativeGeometric(final=0.875, begin=10, rounds=3, every=5)
    assert [schedule(step) for step in (9, 10, 14, 15, 20, 99)] == pytest.approx([0, 0.5, 0.5, 0.75, 0.875, 0.875])
    assert [step for step in range(99) if schedule.due(step)] == [10, 15, 20]
    assert IterativeGeometric(final=0.9, begin=0, rounds=7, every=1)(6) == 0.9


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"final": 1.0}, "final must lie in \\[0, 1\\), got 1.0"),
        ({"final": float("nan")}, "final must lie in"),
        ({"initial": -0.1}, "initial must lie in \\[0, 1\\), got -0.1"),
        ({"final": 0.3, "initial": 0.5}, "final 0.3 is below initial 0.5"),
        ({"begin": -1}, "begin must be a step \\(0 or more\\), got -1"),
        ({"begin": 0.1}, "begin must be a step"),
        ({"begin": 100}, "end must come after begin, got begin 100 and end 100"),
        ({"end": -1}, "end must"),
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"exponent": 0}, "the exponent must be positive, got 0"),
        ({"exponent": float("nan")}, "the exponent must be positive"),
    ],
)
def test_a_ramp_refuses(options: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError, match=part):
        Cubic(**{"final": 0.9, "begin": 0, "end": 100, **options})


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        Cubic(final=1.5, begin=-3, end=-9, every=0, exponent=-1)
    for part in ("final must", "begin must", "end must come after", "every must", "exponent must"):
        assert part in str(caught.value)


def test_the_others_refuse_too() -> None:
    with pytest.raises(OptionError, match=r"rounds must be a whole number of at least 1, got 0; every must .* got 0"):
        IterativeGeometric(final=0.5, begin=0, rounds=0, every=0)
    with pytest.raises(OptionError, match="at must be a step"):
        OneShot(0.5, at=-1)
    with pytest.raises(OptionError, match="final must lie"):
        OneShot(1.0)
    with pytest.raises(OptionError, match="end must come after"):
        Linear(final=0.5, begin=5, end=5)


def test_schedules_are_found_by_name() -> None:
    assert get_schedule("cubic") is Cubic
    assert get_schedule("iterative-geometric") is IterativeGeometric
    with pytest.raises(OptionError, match="unknown schedule 'cosin'; the nearest are cosine"):
        get_schedule("cosin")
