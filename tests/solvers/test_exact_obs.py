"""ExactOBS against enumeration: at each step every removal is tried and the rest is fitted by least squares."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison, Within
from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import damped, exact_obs, quadratic_error, saliency, sparsegpt
from tests.solvers.matrices import drawn

PAIR = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def fitted(row: Tensor, hessian: Tensor, gone: list[int]) -> Tensor:
    """The row without `gone`, and the others where the error is least."""
    kept = [j for j in range(len(row)) if j not in gone]
    out = torch.zeros_like(row)
    if kept:
        out[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ row)
    return out


def error(row: Tensor, hessian: Tensor, gone: list[int]) -> float:
    return quadratic_error(row[None], fitted(row, hessian, gone)[None], hessian)


def enumerated(row: Tensor, hessian: Tensor, steps: int, size: int, quota: int) -> tuple[list[int], list[float]]:
    """The order in which the weights of a row go, and the error after each: the slow twin."""
    gone: list[int] = []
    errors = []
    for _ in range(steps):
        lost = [j // size for j in gone]
        allowed = [j for j in range(len(row)) if j not in gone and lost.count(j // size) < quota]
        gone.append(min(allowed, key=lambda j: error(row, hessian, [*gone, j])))
        errors.append(error(row, hessian, gone))
    return gone, errors


def cheapest_steps(costs: list[list[float]], total: int) -> list[int]:
    """Steps that each row takes when again and again the cheapest next step of any row is taken."""
    taken = [0] * len(costs)
    for _ in range(total):
        open_rows = [r for r, row in enumerate(costs) if taken[r] < len(row)]
        taken[min(open_rows, key=lambda r: costs[r][taken[r]])] += 1
    return taken


def steps_of(errors: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *errors], errors, strict=False)]


def agrees(weight: Tensor, hessian: Tensor, gone: list[list[int]], comparison: Comparison) -> None:
    made = exact_obs(weight, hessian, comparison)
    matrix = damped(hessian)
    wanted = torch.stack([fitted(row, matrix, some) for row, some in zip(weight, gone, strict=True)])
    assert [sorted(row) for row in gone] == [(~row).nonzero()[:, 0].tolist() for row in made.mask]
    torch.testing.assert_close(made.weight, wanted, rtol=1e-8, atol=1e-8)
    assert (made.weight[~made.mask] == 0).all()
    assert made.loss == pytest.approx(quadratic_error(weight, wanted, matrix), rel=1e-8, abs=1e-12)


# -- against enumeration -----------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 7), st.floats(0, 0.99))
def test_rows_lose_what_enumeration_takes(seed: int, rows: int, columns: int, sparsity: float) -> None:
    weight, hessian = drawn(seed, rows, columns)
    steps = columns - round((1 - sparsity) * columns)
    gone = [enumerated(row, damped(hessian), steps, columns, columns)[0] for row in weight]
    agrees(weight, hessian, gone, Comparison(sparsity, "row"))


@given(st.integers(0, 10**6), st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 4)]), st.integers(1, 2))
def test_groups_that_have_lost_their_share_lose_no_more(seed: int, pattern: tuple[int, int], groups: int) -> None:
    keep, of = pattern
    weight, hessian = drawn(seed, 2, groups * of)
    gone = [enumerated(row, damped(hessian), groups * (of - keep), of, of - keep)[0] for row in weight]
    agrees(weight, hessian, gone, Comparison.of(Pattern(keep, of)))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.floats(0, 0.99))
def test_the_matrix_loses_the_cheapest_next_step_of_any_row(
    seed: int, rows: int, columns: int, sparsity: float
) -> None:
    weight, hessian = drawn(seed, rows, columns)
    matrix = damped(hessian)
    found = [enumerated(row, matrix, columns, columns, columns) for row in weight]
    total = rows * columns - round((1 - sparsity) * rows * columns)
    counts = cheapest_steps([steps_of(errors) for _, errors in found], total)
    gone = [order[:count] for (order, _), count in zip(found, counts, strict=True)]
    agrees(weight, hessian, gone, Comparison(sparsity))


def test_a_cheap_step_behind_a_dear_one_is_not_had_alone() -> None:
    # The first row's first two weights almost cancel on their inputs: once one has gone the other is nearly free.
    hessian = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, -1.01, 9.0], [9.0, 0.3, 0.4]], dtype=torch.float64)
    made = exact_obs(weight, hessian, Comparison(1 / 3), damping=0)
    costs = [steps_of(enumerated(row, hessian, 3, 3, 3)[1]) for row in weight]
    assert costs[0][1] < costs[1][0] < costs[1][1] < costs[0][0]
    assert made.mask.tolist() == [[True, True, True], [True, False, False]]


@given(st.integers(0, 10**6))
def test_the_first_to_go_is_the_least_of_all_saliencies(seed: int) -> None:
    weight, hessian = drawn(seed, 3, 8)
    made = exact_obs(weight, hessian, Comparison(1 / 24))
    cost = saliency(weight, hessian)
    assert (~made.mask).flatten().nonzero().tolist() == [[int(cost.argmin())]]
    assert made.loss == pytest.approx(float(cost.min()), rel=1e-9)


@given(st.integers(0, 10**6))
def test_two_steps_cost_no_less_than_the_best_pair_and_as_much_without_correlation(seed: int) -> None:
    weight, hessian = drawn(seed, 1, 6)
    for moments, equal in ((hessian, False), (hessian.diagonal().diag(), True)):
        made = exact_obs(weight, moments, Comparison(1 / 3, "row"))
        best = min(error(weight[0], damped(moments), list(pair)) for pair in itertools.combinations(range(6), 2))
        assert made.loss is not None
        assert made.loss >= best * (1 - 1e-9)
        assert not equal or made.loss == pytest.approx(best, rel=1e-9)


# -- invariants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comparison", [Comparison(0.4), Comparison(0.4, "row"), Comparison.of(Pattern(2, 4))], ids=str)
def test_equal_inputs_without_correlation_are_magnitude(comparison: Comparison) -> None:
    weight, _ = drawn(1, 3, 8)
    made = exact_obs(weight, 3 * torch.eye(8, dtype=torch.float64), comparison)
    assert torch.equal(made.mask, comparison.keep(weight.abs()))
    assert torch.equal(made.weight, weight * made.mask)


@pytest.mark.parametrize("comparison", [Comparison(0.5), Comparison(0.5, "row"), Comparison.of(Pattern(1, 4))], ids=str)
def test_of_equal_weights_the_earlier_stay(comparison: Comparison) -> None:
    made = exact_obs(torch.ones(4, 8), torch.eye(8), comparison)
    assert torch.equal(made.mask, comparison.keep(torch.ones(4, 8)))


def test_two_weights_by_hand() -> None:
    made = exact_obs(torch.tensor([[1.0, 1.0]], dtype=torch.float64), PAIR, Comparison(0.5), damping=0)
    torch.testing.assert_close(made.weight, torch.tensor([[1.5, 0.0]], dtype=torch.float64), rtol=1e-12, atol=0)
    assert made.loss == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize("within", ["matrix", "row"])
def test_counts_are_exact(within: Within) -> None:
    weight, hessian = drawn(2, 5, 9)
    for sparsity in (0.1, 0.37, 0.5, 0.94):
        mask = exact_obs(weight, hessian, Comparison(sparsity, within)).mask
        assert int(mask.sum()) == int(Comparison(sparsity, within).keep(weight).sum())


def test_a_row_may_be_lost_whole() -> None:
    weight, hessian = drawn(3, 3, 8)
    weight[1] *= 1e-6
    made = exact_obs(weight, hessian, Comparison(1 / 3))
    assert made.mask.tolist() == [[True] * 8, [False] * 8, [True] * 8]
    assert torch.equal(made.weight[[0, 2]], weight[[0, 2]])


def test_rows_in_several_portions_are_rows_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = drawn(4, 7, 8)
    whole = exact_obs(weight, hessian, Comparison(0.5))
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["secateurs.solvers.exact_obs"], "_HELD", 2 * 8 * 8)
    portions = exact_obs(weight, hessian, Comparison(0.5))
    assert torch.equal(whole.mask, portions.mask)
    torch.testing.assert_close(whole.weight, portions.weight, rtol=1e-12, atol=1e-12)


def test_it_is_better_than_a_sweep_in_fixed_order() -> None:
    weight, hessian = drawn(5, 8, 32)
    half = Comparison(0.5, "row")
    swept, exact = sparsegpt(weight, hessian, half), exact_obs(weight, hessian, half)
    assert exact.loss is not None
    assert swept.loss is not None
    assert exact.loss < swept.loss


@pytest.mark.parametrize("within", ["matrix", "row"])
def test_nothing_asked_is_the_weight_bit_for_bit(within: Within) -> None:
    weight, hessian = drawn(6, 3, 8)
    weight[1, 2] = -0.0
    made = exact_obs(weight, hessian, Comparison(0.0, within))
    assert torch.equal(made.weight.view(torch.int64), weight.view(torch.int64))
    assert made.mask.all()
    assert made.loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight, hessian = drawn(7, 3, 8)
    narrow = weight.to(dtype)
    made = exact_obs(narrow, hessian, Comparison(0.5))
    assert made.weight.dtype == dtype
    assert torch.equal(made.weight, exact_obs(narrow.double(), hessian, Comparison(0.5)).weight.to(dtype))


# -- inputs that are poor ----------------------------------------------------------------------------------------------


def test_columns_that_saw_only_zeros_go_first_and_otherwise_keep_their_weights() -> None:
    weight, hessian = drawn(8, 2, 8)
    for j in (2, 5):
        hessian[j] = hessian[:, j] = 0
        weight[:, j] = 100
    made = exact_obs(weight, hessian, Comparison(0.25))
    assert made.mask.tolist() == [[j not in (2, 5) for j in range(8)]] * 2
    assert torch.equal(made.weight, weight * made.mask)
    assert made.loss == 0
    made = exact_obs(weight, hessian, Comparison(0.125, "row"))
    assert torch.equal(made.weight, weight * (torch.arange(8) != 5))


def test_near_singular_hessians_give_what_least_squares_gives() -> None:
    i = torch.arange(1, 13, dtype=torch.float64)
    hilbert = 1 / (i[:, None] + i - 1)
    weight, _ = drawn(9, 4, 12)
    made = exact_obs(weight, hilbert, Comparison(0.75, "row"), damping=1e-9)
    matrix = damped(hilbert, 1e-9)
    for row, mask, found in zip(weight, made.mask, made.weight, strict=True):
        best = error(row, matrix, (~mask).nonzero()[:, 0].tolist())
        assert quadratic_error(row[None], found[None], matrix) == pytest.approx(best, rel=1e-3)


def test_a_singular_hessian_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"hessian of block\.fc2 is not positive definite with damping up to 0 \(cond"):
        exact_obs(torch.ones(1, 2), torch.ones(2, 2), Comparison(0.5), damping=0, where="block.fc2")


def test_what_does_not_fit_is_refused() -> None:
    weight, hessian = drawn(10, 3, 6)
    with pytest.raises(ModelError, match="NaN or infinite values among the inputs of fc1"):
        exact_obs(weight, hessian * float("nan"), Comparison(0.5), where="fc1")
    with pytest.raises(ModelError, match="NaN or infinite values among the weights of fc1"):
        exact_obs(weight * float("nan"), hessian, Comparison(0.5), where="fc1")
    with pytest.raises(OptionError, match=r"got \[3, 6\] and \[5, 5\]"):
        exact_obs(weight, hessian[:5, :5], Comparison(0.5))
    with pytest.raises(OptionError, match="2:4 needs a number of inputs that 4 divides; fc has 6"):
        exact_obs(weight, hessian, Comparison.of(Pattern(2, 4)), where="fc")
