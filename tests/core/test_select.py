"""Selections: exactly k, earlier first among equals, against sorting by hand and against enumeration."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import OptionError
from secateurs.core.select import knapsack, n_of_m, n_of_m_inputs, per_row, top, top_across
from secateurs.core.units import WeightGroup

# Few distinct values, so that ties are the rule.
tied = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, float("inf"), float("-inf")])


def by_sorting(scores: list[float], k: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in order[:k] for i in range(len(scores))]


@given(st.lists(tied, min_size=1, max_size=20).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, len(s)))))
def test_top_is_a_stable_sort(case: tuple[list[float], int]) -> None:
    scores, k = case
    assert top(torch.tensor(scores), k).tolist() == by_sorting(scores, k)


@pytest.mark.parametrize(
    ("scores", "k", "mask"),
    [
        ([1.0, 1.0, 1.0], 2, [1, 1, 0]),
        ([0.0, 3.0, 3.0, 3.0], 2, [0, 1, 1, 0]),
        ([3.0, 2.0, 1.0], 0, [0, 0, 0]),
        ([3.0, 2.0, 1.0], 3, [1, 1, 1]),
        ([float("-inf"), 1.0, float("inf")], 2, [0, 1, 1]),
    ],
)
def test_top_on_small_cases(scores: list[float], k: int, mask: list[int]) -> None:
    assert top(torch.tensor(scores), k).int().tolist() == mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_top_takes_any_real_dtype_and_shape(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert top(scores, 3).tolist() == [[False, True, True], [True, False, False]]


def test_top_keeps_integers_apart_that_floats_would_merge() -> None:
    scores = torch.tensor([2**53, 2**53 + 1])
    assert top(scores, 1).tolist() == [False, True]


@pytest.mark.parametrize("k", [1, 4_999, 999_999])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "falling"])
def test_top_of_a_million_is_exact(k: int, kind: str) -> None:
    n = 1_000_000
    scores = {
        "random": torch.rand(n, generator=torch.Generator().manual_seed(0)),
        "tied": torch.arange(n) % 7,
        "constant": torch.ones(n),
        "falling": torch.arange(n, 0, -1).float(),
    }[kind]
    mask = top(scores, k)
    expected = torch.zeros(n, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:k]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("k", [1, 60_000, 99_000, 99_999])
def test_a_sample_that_misleads_costs_time_only(k: int) -> None:
    """Every 257th entry, which are looked at first, is far above or below the rest."""
    scores = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    for level in (-5.0, 5.0):
        scores[::257] = level
        wanted = torch.zeros(100_000, dtype=torch.bool)
        wanted[scores.argsort(descending=True, stable=True)[:k]] = True
        assert torch.equal(top(scores, k), wanted)


def test_top_minimises_what_is_lost() -> None:
    weight = torch.tensor([0.3, -2.0, 0.9, 1.1, -0.2, 0.5, -0.7, 1.6])
    for k in range(9):
        lost = (weight * ~top(weight.abs(), k)).square().sum()
        kept = [torch.tensor([i in chosen for i in range(8)]) for chosen in combinations(range(8), k)]
        assert lost == min((weight * ~mask).square().sum() for mask in kept)


@pytest.mark.parametrize(("reduce", "scores"), [("mean", [1.0, 1.0]), ("max", [4.0, 1.0])])
def test_blocks_are_ranked_by_their_pool(reduce: str, scores: list[float]) -> None:
    weight = torch.tensor([[4.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    group = WeightGroup("w", (2, 4), block=(2, 2))
    pooled = group.lift({"w": weight.abs()}, reduce)["w"]  # type: ignore[arg-type]
    assert pooled.tolist() == scores
    # Equal means: the earlier block stays; by maximum it wins outright.
    assert group.spread(top(pooled, 1))["w"].tolist() == [[True, True, False, False]] * 2


def test_top_refuses_nan_and_impossible_counts() -> None:
    with pytest.raises(OptionError, match="2 of 3 values in the scores are NaN"):
        top(torch.tensor([1.0, float("nan"), float("nan")]), 1)
    with pytest.raises(OptionError, match="cannot keep 4 of 3 units; allowed are 0 to 3"):
        top(torch.ones(3), 4)
    with pytest.raises(OptionError, match="cannot keep -1 of 3"):
        top(torch.ones(3), -1)
    with pytest.raises(TypeError):
        top(torch.ones(3), 1.5)  # type: ignore[arg-type]


@given(st.lists(st.lists(tied, min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_top_across_ranks_the_concatenation(groups: list[list[float]], data: st.DataObject) -> None:
    flat = [score for group in groups for score in group]
    k = data.draw(st.integers(0, len(flat)))
    masks = top_across({str(i): torch.tensor(group) for i, group in enumerate(groups)}, k)
    assert [keep for mask in masks.values() for keep in mask.tolist()] == by_sorting(flat, k)
    assert list(masks) == [str(i) for i in range(len(groups))]


def test_top_across_keeps_shapes_and_names_the_group_at_fault() -> None:
    masks = top_across({"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor(3.0)}, 2)
    assert masks["a"].tolist() == [[False, True]]
    assert masks["b"].tolist() is True
    with pytest.raises(OptionError, match="scores of b are NaN"):
        top_across({"a": torch.ones(2), "b": torch.tensor([float("nan")])}, 1)
    with pytest.raises(OptionError, match="give at least one group"):
        top_across({}, 0)


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_per_row_is_top_of_each_row(rows: int, columns: int, data: st.DataObject) -> None:
    scores = [data.draw(st.lists(tied, min_size=columns, max_size=columns)) for _ in range(rows)]
    k = data.draw(st.integers(0, columns))
    assert per_row(torch.tensor(scores), k).tolist() == [by_sorting(row, k) for row in scores]


@given(st.integers(0, 4), st.integers(1, 6), st.data())
def test_every_row_may_have_a_count_of_its_own(rows: int, columns: int, data: st.DataObject) -> None:
    scores = [data.draw(st.lists(tied, min_size=columns, max_size=columns)) for _ in range(rows)]
    counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    found = per_row(torch.tensor(scores).view(rows, columns), torch.tensor(counts, dtype=torch.int64))
    assert found.tolist() == [by_sorting(row, k) for row, k in zip(scores, counts, strict=True)]


def test_counts_of_rows_are_checked() -> None:
    with pytest.raises(OptionError, match=r"\[2, 3\] scores need one count a row, got counts \[3\]"):
        per_row(torch.ones(2, 3), torch.tensor([1, 1, 1]))
    with pytest.raises(OptionError, match="cannot keep 4 of 3 units"):
        per_row(torch.ones(2, 3), torch.tensor([1, 4]))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.data())
def test_n_of_m_is_top_of_each_run(rows: int, runs: int, of: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, of))
    scores = [data.draw(st.lists(tied, min_size=of * runs, max_size=of * runs)) for _ in range(rows)]
    expected = [[b for i in range(0, len(row), of) for b in by_sorting(row[i : i + of], keep)] for row in scores]
    assert n_of_m(torch.tensor(scores), keep, of).tolist() == expected


@pytest.mark.parametrize("of", [4, 8, 16])
def test_equal_and_infinite_scores_of_many_runs(of: int) -> None:
    scores = torch.randint(-2, 3, (64, 10 * of), generator=torch.Generator().manual_seed(of)).float()
    scores[scores == 2], scores[scores == -2] = float("inf"), float("-inf")
    order = scores.view(-1, of).argsort(dim=1, descending=True, stable=True)
    wanted = torch.zeros(640, of, dtype=torch.bool).scatter(1, order[:, : of // 2], True)
    assert torch.equal(n_of_m(scores, of // 2, of), wanted.view(64, -1))


def test_n_of_m_counts_what_stays() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 4.0, 3.0, 0.0]])
    assert n_of_m(scores, 1, 4).int().tolist() == [[1, 0, 0, 0, 0, 1, 0, 0]]
    assert n_of_m(scores, 3, 4).int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 0]]


def test_n_of_m_takes_a_transposed_matrix() -> None:
    scores = torch.arange(8.0).view(4, 2).t()
    assert n_of_m(scores, 2, 4).int().tolist() == [[0, 0, 1, 1]] * 2


def test_patterns_of_a_weight_run_along_its_inputs() -> None:
    """Each position of a 1×2 kernel has runs of its own."""
    scores = torch.tensor([[[[1.0, 9]], [[2, 0]], [[3, 9]], [[0, 9]]]])
    assert n_of_m_inputs(scores, 2, 4)[0, :, 0, :].T.int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    assert torch.equal(n_of_m_inputs(torch.eye(8), 1, 4), n_of_m(torch.eye(8), 1, 4))
    with pytest.raises(OptionError, match="that 4 divides"):
        n_of_m_inputs(torch.ones(4, 6), 2, 4)


def test_n_of_m_refuses_what_does_not_divide() -> None:
    with pytest.raises(OptionError, match=r"2:4 needs a number of columns that 4 divides, got scores \[3, 6\]"):
        n_of_m(torch.ones(3, 6), 2, 4)
    with pytest.raises(OptionError, match="cannot keep 5 of 4"):
        n_of_m(torch.ones(3, 8), 5, 4)
    with pytest.raises(OptionError, match=r"scores must be \[rows, columns\], got shape \(8,\)"):
        n_of_m(torch.ones(8), 2, 4)
    with pytest.raises(OptionError, match="NaN"):
        n_of_m(torch.full((1, 4), float("nan")), 2, 4)


def best_by_enumeration(values: Tensor, costs: Tensor, capacity: int) -> float:
    masks = (torch.tensor(bits) for bits in product([False, True], repeat=len(values)))
    return max(float(values[m].double().sum()) for m in masks if int(costs[m].sum()) <= capacity)


@given(
    st.lists(st.tuples(st.integers(-4, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from([1, 1, 7]),
)
def test_the_knapsack_is_exact(units: list[tuple[int, int]], capacity: int, scale: int) -> None:
    values = torch.tensor([float(value) for value, _ in units])
    costs = torch.tensor([cost * scale for _, cost in units])
    stays = knapsack(values, costs, capacity)
    assert int(costs[stays].sum()) <= capacity
    assert float(values[stays].double().sum()) == best_by_enumeration(values, costs, capacity)
    assert bool((values[stays] > 0).all())


def test_the_knapsack_prefers_earlier_units() -> None:
    assert knapsack(torch.ones(4), torch.tensor([2, 2, 2, 2]), 5).tolist() == [True, True, False, False]
    assert knapsack(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), 1).tolist() == [False, True]


def test_the_knapsack_takes_large_costs_with_a_common_divisor() -> None:
    costs = torch.tensor([3, 5, 7]) * 10**12
    assert knapsack(torch.tensor([3.0, 4.0, 5.0]), costs, 10 * 10**12).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("values", "costs", "capacity", "part"),
    [
        ([1.0], [1.5], 3, "must be integers of at least 0"),
        ([1.0], [-1.0], 3, "must be integers of at least 0"),
        ([1.0], [float("inf")], 3, "must be integers of at least 0"),
        ([1.0, 2.0], [1.0], 3, "needs \\[units\\] values and costs"),
        ([float("nan")], [1.0], 3, "NaN"),
        ([1.0], [1.0], -1, "at least 0, got -1"),
        ([1.0, 1.0], [2.0**31, 2.0**31 + 1], 2**33, "too large; give coarser costs"),
    ],
)
def test_the_knapsack_refuses(values: list[float], costs: list[float], capacity: int, part: str) -> None:
    with pytest.raises(OptionError, match=part):
        knapsack(torch.tensor(values), torch.tensor(costs, dtype=torch.float64), capacity)
