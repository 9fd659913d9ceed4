"""Densities around a mean: the published numbers, and what holds for any figures."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.allocate import allocate, densities
from secateurs.core.cost import CostModel
from secateurs.core.densities import outlier_densities, sigmoid_densities
from secateurs.core.errors import OptionError
from secateurs.core.fit import fit

# The published code sums angles over this many tokens.
TOKENS = 128 * 1024


def means(*sums: float) -> dict[str, float]:
    return {str(i): value / TOKENS for i, value in enumerate(sums)}


def equal(count: int, size: int = 64) -> dict[str, int]:
    return {str(i): size for i in range(count)}


def test_published_sums_give_the_published_densities() -> None:
    found = sigmoid_densities(means(14000, 13000, 12000, 11000), equal(4), 0.5)
    assert list(found.values()) == pytest.approx([0.53743, 0.51250, 0.48750, 0.46257], abs=5e-6)


def test_where_one_would_reach_all_their_spread_shrinks() -> None:
    found = sigmoid_densities(means(40000, 20000, 15000, 12000, 11000, 10000, 9000, 30000), equal(8), 0.8)
    expected = [0.99048, 0.82626, 0.76906, 0.73652, 0.72626, 0.71635, 0.70683, 0.92824]
    assert list(found.values()) == pytest.approx(expected, abs=5e-6)
    assert sum(found.values()) / 8 == pytest.approx(0.8, rel=1e-12)
    assert max(found.values()) == pytest.approx(1 - 0.2 * (1 - 1 / 1.05), rel=1e-12)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.9, 1.0])
def test_equal_importances_or_no_strength_are_uniform(density: float) -> None:
    assert set(sigmoid_densities(means(5, 5, 5), equal(3), density).values()) == {density}
    assert set(sigmoid_densities(means(5e5, 1, 9), equal(3), density, 0.0).values()) == {density}
    assert set(outlier_densities({"a": 0.2, "b": 0.2}, {"a": 3, "b": 9}, density).values()) == {density}


def test_nothing_overflows() -> None:
    found = sigmoid_densities({"a": 1e6, "b": -1e6}, {"a": 1, "b": 1}, 0.25)
    assert list(found.values()) == pytest.approx([0.5, 0.0])


def test_outliers_span_twice_the_spread_around_the_mean() -> None:
    # 2·0.08·D/(0.05 - 0.01), minus the mean of these, plus 0.3.
    found = outlier_densities({"a": 0.05, "b": 0.01, "c": 0.02}, {"a": 4, "b": 4, "c": 4}, 0.3)
    line = [0.2, 0.04, 0.08]
    assert list(found.values()) == pytest.approx([0.3 + x - sum(line) / 3 for x in line])
    assert max(found.values()) - min(found.values()) == pytest.approx(0.16)
    two = outlier_densities({"a": 0.5, "b": 0.1}, {"a": 4, "b": 4}, 0.3)
    assert list(two.values()) == pytest.approx([0.38, 0.22])


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 500)), min_size=1, max_size=9),
    st.floats(0.0, 1.0),
    st.floats(0, 40),
    st.booleans(),
)
def test_the_mean_holds_and_the_order_is_that_of_the_figures(
    groups: list[tuple[float, int]], density: float, strength: float, sigmoid: bool
) -> None:
    figures = {str(i): value for i, (value, _) in enumerate(groups)}
    sizes = {str(i): size for i, (_, size) in enumerate(groups)}
    if sigmoid:
        found = sigmoid_densities(figures, sizes, density, strength)
    else:
        found = outlier_densities(figures, sizes, density, strength / 100)
    total = sum(sizes.values())
    assert math.fsum(found[n] * sizes[n] for n in sizes) / total == pytest.approx(density, abs=1e-9)
    assert all(0 <= value <= 1 for value in found.values())
    order = sorted(sizes, key=lambda name: figures[name])
    assert all(found[a] <= found[b] + 1e-9 for a, b in pairwise(order))


def test_the_rules_by_name_count_whole_units_and_hold_floors() -> None:
    importance = means(40000, 20000, 15000, 12000, 11000, 10000, 9000, 30000)
    counts = allocate("sigmoid", equal(8, 1000), 6400, importance=importance)
    assert sum(counts.values()) == 6400
    assert list(counts.values()) == [991, 826, 769, 737, 726, 716, 707, 928]
    steep = allocate("sigmoid", {"a": 10, "b": 10}, 4, floors={"a": 1, "b": 1}, importance={"a": 9.0, "b": 0.0})
    assert steep == {"a": 3, "b": 1}
    assert allocate("owl", {"a": 100, "b": 100}, 60, outliers={"a": 0.5, "b": 0.1}) == {"a": 38, "b": 22}
    shares = densities("owl", {"a": (4, 4), "b": (4, 4)}, 0.3, outliers={"a": 0.5, "b": 0.1}, spread=0.0)
    assert shares == {"a": 0.3, "b": 0.3}


@pytest.mark.parametrize(("keep", "width"), [(0.5, 7168), (0.8, 11520)])
def test_widths_are_rounded_to_the_nearest_multiple(keep: float, width: int) -> None:
    asked = int(14336 * keep)
    found = fit(
        "sparsity>=19%", allocate=lambda k: {"ffn": min(k, asked)}, total_units=14336, minimum_units=1,
        costs=CostModel({}), sizes={"ffn": 14336}, round_to=128,
    )  # fmt: skip
    assert found == {"ffn": width}


def test_figures_must_be_there_and_be_numbers() -> None:
    with pytest.raises(OptionError, match="importance must have a finite number for each group; it has none for b"):
        sigmoid_densities({"a": 1.0}, {"a": 1, "b": 1}, 0.5)
    with pytest.raises(OptionError, match="outliers must have a finite number for each group; it has none for a"):
        outlier_densities({"a": math.nan}, {"a": 1}, 0.5)
    with pytest.raises(OptionError, match="spread must be at least 0, got -1"):
        outlier_densities({"a": 1.0}, {"a": 1}, 0.5, -1)
    with pytest.raises(OptionError, match="allocation 'sigmoid' needs the option importance"):
        allocate("sigmoid", {"a": 2}, 1)
