"""Apportionment: whole numbers in proportion, between bounds, exact in total."""

from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.apportion import apportion


def share_out(
    weights: list[float], total: int, floors: list[int] | None = None, caps: list[int] | None = None
) -> list[int]:
    names = [f"g{i}" for i in range(len(weights))]
    low = floors or [0] * len(names)
    high = caps or [10**12] * len(names)
    keyed = (dict(zip(names, values, strict=True)) for values in (weights, low, high))
    proportions, least, most = keyed
    return list(apportion(proportions, total, least, most).values())  # type: ignore[arg-type]


def test_largest_remainders_are_rounded_up() -> None:
    assert share_out([4.7, 4.6, 0.7], 10) == [5, 4, 1]
    assert share_out([1, 1, 1], 10) == [4, 3, 3]
    assert share_out([3, 3, 4], 10) == [3, 3, 4]
    # Products that lie a rounding error beside the integer that is meant are that integer.
    assert share_out([0.1 * 3 * 10, 0.7 * 10], 10) == [3, 7]
    assert share_out([0.29 * 100, 0.71 * 100], 100) == [29, 71]


def test_bounds_hold_and_the_others_share_the_rest() -> None:
    assert share_out([1, 1, 2], 10, caps=[9, 9, 4]) == [3, 3, 4]
    assert share_out([1, 1, 8], 10, floors=[3, 0, 0]) == [3, 1, 6]
    assert share_out([1, 1, 8], 10, floors=[3, 0, 0], caps=[9, 2, 4]) == [4, 2, 4]


def test_only_the_proportions_of_weights_matter_however_small_they_are() -> None:
    assert share_out([5e-324, 5e-324], 4, floors=[1, 1], caps=[4, 4]) == [2, 2]
    assert share_out([0, 5e-324], 4, floors=[1, 1], caps=[4, 4]) == [1, 3]
    assert share_out([1e308, 1.5e308], 5, caps=[9, 9]) == [2, 3]
    assert share_out([1, 5e-324], 5, caps=[4, 9]) == [4, 1]


def test_groups_of_no_weight_come_last() -> None:
    assert share_out([0, 1], 5, floors=[2, 0], caps=[9, 9]) == [2, 3]
    assert share_out([0, 1, 0], 8, caps=[4, 5, 2]) == [2, 5, 1]
    assert share_out([0, 0], 3, floors=[1, 0], caps=[1, 9]) == [1, 2]
    assert share_out([0, 0], 1, floors=[1, 0], caps=[1, 0]) == [1, 0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    n = draw(st.integers(1, 12))
    largest = draw(st.sampled_from([5, 1000, 10**9]))
    caps = draw(st.lists(st.integers(0, largest), min_size=n, max_size=n))
    floors = [draw(st.integers(0, cap)) if draw(st.booleans()) else 0 for cap in caps]
    weights = draw(st.lists(st.just(0.0) | st.floats(1e-3, 1e9), min_size=n, max_size=n))
    return weights, draw(st.integers(sum(floors), sum(caps))), floors, caps


@given(problems())
def test_the_total_is_exact_and_the_bounds_hold(problem: tuple[list[float], int, list[int], list[int]]) -> None:
    weights, total, floors, caps = problem
    counts = share_out(weights, total, floors, caps)
    assert sum(counts) == total
    assert all(floor <= count <= cap for floor, count, cap in zip(floors, counts, caps, strict=True))


@given(problems())
def test_groups_between_their_bounds_are_in_proportion(problem: tuple[list[float], int, list[int], list[int]]) -> None:
    weights, total, floors, caps = problem
    rows = zip(share_out(weights, total, floors, caps), weights, floors, caps, strict=True)
    free = [(count, weight) for count, weight, floor, cap in rows if floor < count < cap and weight > 0]
    # Each count is its exact share rounded up or down, so levels (count / weight) overlap within one unit.
    slack = 1 + 1e-6 * total
    assert max((c - slack) / w for c, w in free) <= min((c + slack) / w for c, w in free) if free else True


@given(problems())
def test_more_in_total_is_not_less_by_more_than_rounding(
    problem: tuple[list[float], int, list[int], list[int]],
) -> None:
    weights, total, floors, caps = problem
    if total == sum(caps):
        return
    fewer, more = (share_out(weights, t, floors, caps) for t in (total, total + 1))
    assert all(b >= a - 1 for a, b in zip(fewer, more, strict=True))
