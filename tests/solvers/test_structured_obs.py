"""Structured OBS against least squares, enumeration of all structures, and figures worked out by hand."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import damped, quadratic_error, remove_columns, structured_obs
from tests.solvers.matrices import drawn

PAIR = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def blocks(columns: int, size: int) -> Tensor:
    return torch.arange(columns).view(-1, size)


def fitted(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """W·H_:,K·(H_KK)⁻¹ for the columns K that are not among `columns`."""
    gone = torch.zeros(weight.shape[1], dtype=torch.bool)
    gone[columns.flatten()] = True
    out = torch.zeros_like(weight)
    out[:, ~gone] = torch.linalg.solve(hessian[~gone][:, ~gone], (weight @ hessian)[:, ~gone].T).T
    return out


def error(weight: Tensor, hessian: Tensor, columns: Tensor) -> float:
    return quadratic_error(weight, fitted(weight, hessian, columns), hessian)


def enumerated(weight: Tensor, hessian: Tensor, structures: Tensor, count: int) -> list[int]:
    """What goes when at each step every structure that is left is tried: the slow twin."""
    gone: list[int] = []
    for _ in range(count):
        left = [k for k in range(len(structures)) if k not in gone]
        gone.append(min(left, key=lambda k: error(weight, hessian, structures[[*gone, k]])))
    return gone


# -- against enumeration and the closed form ---------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.randoms())
def test_each_step_is_the_best_of_all_structures_and_the_rest_is_least_squares(
    seed: int, rows: int, count: int, size: int, loose: int, order: object
) -> None:
    columns = count * size + loose
    weight, hessian = drawn(seed, rows, columns)
    shuffled = list(range(columns))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    structures = torch.tensor(shuffled[: count * size]).view(count, size)
    levels = structured_obs(weight, hessian, structures, range(count + 1))
    matrix = damped(hessian)
    assert list(levels[-1].removed) == enumerated(weight, matrix, structures, count)
    for i, level in enumerate(levels):
        gone = structures[list(level.removed)]
        assert level.removed == levels[-1].removed[:i]
        assert (level.weight[:, gone.flatten()] == 0).all()
        torch.testing.assert_close(level.weight, fitted(weight, matrix, gone), rtol=1e-8, atol=1e-8)
        assert level.loss == pytest.approx(error(weight, matrix, gone), rel=1e-8, abs=1e-12)


@given(st.integers(0, 10**6))
def test_two_steps_cost_no_less_than_the_best_pair_and_as_much_without_correlation(seed: int) -> None:
    weight, hessian = drawn(seed, 3, 10)
    structures = blocks(10, 2)
    for moments, equal in ((hessian, False), (hessian.diagonal().diag(), True)):
        level = structured_obs(weight, moments, structures, [2])[0]
        pairs = itertools.combinations(range(5), 2)
        best = min(error(weight, damped(moments), structures[list(pair)]) for pair in pairs)
        assert level.loss >= best * (1 - 1e-9)
        assert not equal or level.loss == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2])
def test_an_inverse_that_is_computed_anew_changes_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = drawn(1, 5, 24)
    counts = [0, 3, 7, 24 // size]
    once = structured_obs(weight, hessian, blocks(24, size), counts)
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["secateurs.solvers.structured_obs"], "_REFRESH", 4)
    often = structured_obs(weight, hessian, blocks(24, size), counts)
    for one, other in zip(once, often, strict=True):
        assert one.removed == other.removed
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-9, atol=1e-9)
        assert one.loss == pytest.approx(other.loss, rel=1e-9)


def test_more_columns_than_go_between_two_inverses() -> None:
    weight, hessian = drawn(2, 3, 320)
    level = structured_obs(weight, hessian, blocks(320, 1), [300])[0]
    gone = torch.tensor(level.removed)
    torch.testing.assert_close(level.weight, fitted(weight, damped(hessian), gone), rtol=1e-8, atol=1e-8)
    assert level.loss == pytest.approx(error(weight, damped(hessian), gone), rel=1e-8)


def test_a_level_is_its_columns_removed_at_once() -> None:
    weight, hessian = drawn(3, 4, 12)
    level = structured_obs(weight, hessian, blocks(12, 3), [2])[0]
    gone = torch.zeros(12, dtype=torch.bool)
    gone[blocks(12, 3)[list(level.removed)].flatten()] = True
    torch.testing.assert_close(level.weight, remove_columns(weight, hessian, gone), rtol=1e-9, atol=1e-9)


# -- invariants --------------------------------------------------------------------------------------------------------


def test_two_columns_by_hand() -> None:
    ones = torch.ones(1, 2, dtype=torch.float64)
    levels = structured_obs(ones, PAIR, blocks(2, 1), [0, 1, 2], damping=0)
    assert [level.removed for level in levels] == [(), (1,), (1, 0)]
    assert [level.loss for level in levels] == pytest.approx([0, 0.75, 3.0], rel=1e-12)
    torch.testing.assert_close(levels[1].weight, torch.tensor([[1.5, 0.0]], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 3])
def test_inputs_without_correlation_go_by_their_magnitude_and_move_nothing(size: int) -> None:
    weight, _ = drawn(4, 4, 12)
    levels = structured_obs(weight, 3 * torch.eye(12), blocks(12, size), range(1, 12 // size + 1), damping=0)
    norms = weight.square().sum(0).view(-1, size).sum(1)
    assert list(levels[-1].removed) == norms.argsort().tolist()
    for count, level in enumerate(levels, 1):
        assert torch.equal(level.weight, torch.where(level.weight == 0, 0, weight))
        assert level.loss == pytest.approx(1.5 * float(norms.sort().values[:count].sum()), rel=1e-12)


def test_of_equal_structures_the_earlier_stay() -> None:
    assert structured_obs(torch.ones(2, 6), torch.eye(6), blocks(6, 2), [3])[0].removed == (2, 1, 0)


def test_of_two_inputs_that_are_the_same_one_goes_for_nothing_and_the_other_takes_over() -> None:
    weight, hessian = drawn(5, 4, 6)
    # The second input is a copy of the first, and the two weigh more than any other.
    hessian[1], weight[:, 0] = hessian[0], 5
    hessian[:, 1], weight[:, 1] = hessian[:, 0], 7
    levels = structured_obs(weight, hessian, blocks(6, 1), [1, 2], damping=1e-9)
    assert levels[0].removed[0] in (0, 1)
    assert 0 <= levels[0].loss < 1e-6 * levels[1].loss
    survivor = 1 - levels[0].removed[0]
    torch.testing.assert_close(levels[0].weight[:, survivor], torch.full_like(weight[:, 0], 12), rtol=1e-6, atol=0)
    # What is left of the pair is as dear as it is large.
    assert survivor not in levels[1].removed


def test_structures_of_one_column_are_structures_of_a_column_and_one_that_is_nothing() -> None:
    """The branches for one column and for blocks, on a matrix where each second column weighs nothing."""
    weight, hessian = drawn(6, 4, 8)
    wide, spaced = torch.zeros(4, 16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    wide[:, ::2], spaced[::2, ::2] = weight, hessian
    single = structured_obs(weight, hessian, blocks(8, 1), range(9), damping=0)
    double = structured_obs(wide, spaced, blocks(16, 2), range(9), damping=0)
    for one, two in zip(single, double, strict=True):
        assert one.removed == two.removed
        torch.testing.assert_close(one.weight, two.weight[:, ::2], rtol=1e-9, atol=1e-9)
        assert one.loss == pytest.approx(two.loss, rel=1e-9, abs=1e-12)


def test_the_update_is_worth_it() -> None:
    weight, hessian = drawn(7, 16, 48)
    level = structured_obs(weight, hessian, blocks(48, 4), [6])[0]
    plain = weight.clone()
    plain[:, blocks(48, 4)[list(level.removed)].flatten()] = 0
    smallest = weight.square().sum(0).view(-1, 4).sum(1).argsort()[:6]
    magnitude = weight.clone()
    magnitude[:, blocks(48, 4)[smallest].flatten()] = 0
    errors = [quadratic_error(weight, made, hessian) for made in (level.weight, plain, magnitude)]
    assert errors[0] < errors[1] < errors[2]


def test_the_first_level_is_the_weight_bit_for_bit_and_the_last_is_nothing() -> None:
    weight, hessian = drawn(8, 4, 12)
    weight[1, 2] = -0.0
    first, last = structured_obs(weight, hessian, blocks(12, 4), [0, 3])
    assert torch.equal(first.weight.view(torch.int64), weight.view(torch.int64))
    assert first.loss == 0
    assert torch.equal(last.weight, torch.zeros_like(weight))
    assert last.loss == pytest.approx(quadratic_error(weight, last.weight, damped(hessian)), rel=1e-9)
    first.weight.zero_()
    assert weight.any()


def test_no_level_asked_is_none() -> None:
    weight, hessian = drawn(9, 4, 12)
    assert structured_obs(weight, hessian, blocks(12, 4), []) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight, hessian = drawn(10, 4, 12)
    narrow = weight.to(dtype)
    levels = structured_obs(narrow, hessian, blocks(12, 2).int(), [0, 2])
    exact = structured_obs(narrow.double(), hessian, blocks(12, 2), [0, 2])
    for one, other in zip(levels, exact, strict=True):
        assert one.weight.dtype == dtype
        assert torch.equal(one.weight, other.weight.to(dtype))


# -- inputs that are poor ----------------------------------------------------------------------------------------------


def test_columns_that_saw_only_zeros_cost_nothing_and_keep_their_weights_while_they_stay() -> None:
    weight, hessian = drawn(11, 3, 8)
    for j in (2, 3, 5):
        hessian[j] = hessian[:, j] = 0
        weight[:, j] = 100
    levels = structured_obs(weight, hessian, blocks(8, 2), [1, 2])
    # Both columns of structure 1 are dead, of structure 2 one.
    assert levels[0].removed == (1,)
    assert levels[0].loss == 0
    assert torch.equal(levels[0].weight, weight * torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]))
    stays = 2 not in levels[1].removed
    assert (levels[1].weight[:, 5] == (100 if stays else 0)).all()
    live = torch.tensor([0, 1, 4, 6, 7])
    moments = damped(hessian)[live][:, live]
    assert levels[1].loss == pytest.approx(quadratic_error(weight[:, live], levels[1].weight[:, live], moments))


def test_rounding_on_a_near_singular_hessian_is_mended() -> None:
    i = torch.arange(1, 13, dtype=torch.float64)
    hilbert = 1 / (i[:, None] + i - 1)
    weight, _ = drawn(12, 3, 12)
    matrix = damped(hilbert, 1e-10)
    for size in (1, 2):
        for level in structured_obs(weight, hilbert, blocks(12, size), range(1, 12 // size), damping=1e-10):
            gone = blocks(12, size)[list(level.removed)]
            best = error(weight, matrix, gone)
            assert quadratic_error(weight, level.weight, matrix) == pytest.approx(best, rel=1e-2, abs=1e-9)


def test_a_singular_hessian_climbs_the_ladder_or_is_refused_by_name() -> None:
    weight = torch.ones(1, 2, dtype=torch.float64)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"fc: its hessian is inverted with damping 2, as 0\.02 is too little"):
        level = structured_obs(weight, indefinite, blocks(2, 1), [1], damping=0.02, where="fc")[0]
    assert level.loss == pytest.approx(quadratic_error(weight, level.weight, damped(indefinite, 2)), rel=1e-9)
    with pytest.raises(ModelError, match=r"hessian of block\.fc2 is not positive definite with damping up to 0 \(cond"):
        structured_obs(weight, torch.ones(2, 2), blocks(2, 1), [1], damping=0, where="block.fc2")


def test_broken_numbers_are_refused_by_name() -> None:
    weight, hessian = drawn(13, 4, 12)
    with pytest.raises(ModelError, match="NaN or infinite values among the inputs of fc1"):
        structured_obs(weight, hessian * float("nan"), blocks(12, 1), [1], where="fc1")
    with pytest.raises(ModelError, match="NaN or infinite values among the weights of fc1"):
        structured_obs(weight * float("inf"), hessian, blocks(12, 1), [1], where="fc1")
    with pytest.raises(OptionError, match=r"got \[4, 12\] and \[5, 5\]"):
        structured_obs(weight, hessian[:5, :5], blocks(12, 1), [1])


@pytest.mark.parametrize("counts", [[2, 1], [1, 1], [-1, 2], [0, 5]], ids=str)
def test_counts_that_do_not_rise_within_their_range_are_refused(counts: list[int]) -> None:
    weight, hessian = drawn(14, 4, 12)
    with pytest.raises(OptionError, match=r"counts must rise, each at least 0 and at most the 4 structures of fc; got"):
        structured_obs(weight, hessian, blocks(12, 3), counts, where="fc")


@pytest.mark.parametrize(
    ("structures", "text"),
    [
        (torch.arange(12), r"integers \[structures, size\] of at least 1 column each; got torch\.int64 \[12\] for fc"),
        (torch.zeros(3, 4), r"got torch\.float32 \[3, 4\] for fc"),
        (torch.zeros(3, 4, dtype=torch.bool), r"got torch\.bool \[3, 4\] for fc"),
        (torch.zeros(3, 0, dtype=torch.int64), r"got torch\.int64 \[3, 0\] for fc"),
        (torch.tensor([[0, 1], [1, 2]]), "must name columns 0 to 11 of fc, each at most once"),
        (torch.tensor([[0, 12]]), "must name columns 0 to 11 of fc, each at most once"),
        (torch.tensor([[-1, 2]]), "must name columns 0 to 11 of fc, each at most once"),
    ],
)
def test_structures_that_do_not_fit_are_refused(structures: Tensor, text: str) -> None:
    weight, hessian = drawn(15, 4, 12)
    with pytest.raises(OptionError, match=text):
        structured_obs(weight, hessian, structures, [1], where="fc")
