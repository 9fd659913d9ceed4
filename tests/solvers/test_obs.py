"""Optimal brain surgery against least squares, brute force and figures worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import damped, inverse, quadratic_error, remove_columns, saliency
from secateurs.solvers.obs import check_layer, factor, factored

PAIR = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def drawn(seed: int, rows: int = 4, columns: int = 7, samples: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), 2 / samples * x.T @ x


def columns_of(*gone: int, n: int = 7) -> Tensor:
    return torch.tensor([i in gone for i in range(n)])


# -- the update --------------------------------------------------------------------------------------------------------


def test_two_weights_by_hand() -> None:
    ones = torch.ones(1, 2, dtype=torch.float64)
    made = remove_columns(ones, PAIR, torch.tensor([False, True]), share=0)
    torch.testing.assert_close(made, torch.tensor([[1.5, 0.0]], dtype=torch.float64), rtol=1e-12, atol=0)
    assert made[0, 1] == 0
    assert quadratic_error(ones, made, PAIR) == pytest.approx(0.75, rel=1e-12)
    assert quadratic_error(ones, torch.tensor([[1.0, 0.0]]), PAIR) == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(saliency(ones, PAIR, share=0), torch.full((1, 2), 0.75, dtype=torch.float64))


@given(st.integers(0, 10**6), st.sets(st.integers(0, 6), min_size=1, max_size=6))
def test_the_block_step_is_least_squares(seed: int, gone: set[int]) -> None:
    weight, hessian = drawn(seed)
    columns = columns_of(*gone)
    made = remove_columns(weight, hessian, columns, share=0)
    left = hessian[~columns][:, ~columns]
    wanted = torch.linalg.solve(left, (weight @ hessian)[:, ~columns].T).T
    # The step goes through the inverse of the whole, which may be closer to singular than what is left.
    scale = float(wanted.abs().max()) * max(float(torch.linalg.cond(hessian)) / 1e6, 1)
    assert float((made[:, ~columns] - wanted).abs().max()) <= 1e-10 * scale
    assert (made[:, columns] == 0).all()


def test_no_other_weights_have_a_smaller_error() -> None:
    weight, hessian = drawn(1)
    columns = columns_of(0, 3)
    made = remove_columns(weight, hessian, columns, share=0)
    least = quadratic_error(weight, made, hessian)
    for entry in itertools.product(range(4), (1, 2, 4, 5, 6)):
        for step in (-1e-3, 1e-3):
            other = made.clone()
            other[entry] += step
            assert quadratic_error(weight, other, hessian) > least


def test_one_block_is_one_column_after_the_other() -> None:
    """The removal of one column with a smaller inverse each time (the formula of single weights)."""
    weight, hessian = drawn(2)
    spread, left = torch.linalg.inv(hessian), weight.clone()
    for q in (1, 4, 5):
        left -= left[:, q : q + 1] / spread[q, q] * spread[q]
        spread = spread - spread[:, q : q + 1] * spread[q] / spread[q, q]
    made = remove_columns(weight, hessian, columns_of(1, 4, 5), share=0)
    torch.testing.assert_close(made, left, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6))
def test_a_saliency_is_the_error_of_its_removal(seed: int) -> None:
    weight, hessian = drawn(seed, rows=1)
    cost = saliency(weight, hessian, share=0)
    for q in range(7):
        made = remove_columns(weight, hessian, columns_of(q), share=0)
        assert quadratic_error(weight, made, hessian) == pytest.approx(float(cost[0, q]), rel=1e-6, abs=1e-12)


def test_a_scale_of_the_hessian_is_nothing_to_the_weights() -> None:
    weight, hessian = drawn(3)
    made = [remove_columns(weight, hessian * scale, columns_of(2)) for scale in (1e-6, 1, 1e6)]
    torch.testing.assert_close(made[0], made[1])
    torch.testing.assert_close(made[1], made[2])


def test_nothing_and_everything() -> None:
    weight, hessian = drawn(4)
    assert torch.equal(remove_columns(weight, hessian, columns_of()), weight)
    assert torch.equal(remove_columns(weight, hessian, columns_of(*range(7))), torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight, hessian = drawn(5)
    narrow = weight.to(dtype)
    made = remove_columns(narrow, hessian, columns_of(6))
    assert made.dtype == dtype
    assert torch.equal(made, remove_columns(narrow.double(), hessian, columns_of(6)).to(dtype))


def test_inputs_that_are_not_correlated_move_nothing() -> None:
    weight, _ = drawn(6)
    hessian = torch.arange(1.0, 8.0, dtype=torch.float64).diag()
    made = remove_columns(weight, hessian, columns_of(0, 5))
    torch.testing.assert_close(made, weight.masked_fill(columns_of(0, 5), 0), rtol=0, atol=1e-15)


# -- damping -----------------------------------------------------------------------------------------------------------


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    hessian = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
    assert damped(hessian, 0.5).tolist() == [[5.0, 1.0], [1.0, 7.0]]
    assert damped(hessian, 0).tolist() == hessian.tolist()
    assert hessian.tolist() == [[3.0, 1.0], [1.0, 5.0]]


def dead() -> tuple[Tensor, Tensor]:
    weight, hessian = drawn(7)
    hessian[2] = hessian[:, 2] = 0
    return weight, hessian


def test_columns_that_saw_only_zeros_keep_their_weights_and_cost_nothing() -> None:
    weight, hessian = dead()
    assert damped(hessian, 0)[2].tolist() == [0, 0, 1, 0, 0, 0, 0]
    made = remove_columns(weight, hessian, columns_of(1), share=0)
    assert torch.equal(made[:, 2], weight[:, 2])
    cost = saliency(weight, hessian)
    assert (cost[:, 2] == 0).all()
    assert (cost[:, [0, 1, 3, 4, 5, 6]] > 0).all()


def test_removing_a_column_that_saw_only_zeros_moves_nothing() -> None:
    weight, hessian = dead()
    made = remove_columns(weight, hessian, columns_of(2))
    torch.testing.assert_close(made, weight.masked_fill(columns_of(2), 0), rtol=0, atol=0)


def test_no_input_at_all_is_a_plain_cut() -> None:
    weight, _ = drawn(8)
    made = remove_columns(weight, torch.zeros(7, 7), columns_of(3))
    assert torch.equal(made, weight.masked_fill(columns_of(3), 0))


def test_the_factor_is_lower_triangular_and_gives_the_damped_hessian() -> None:
    _, hessian = drawn(8)
    root = factor(hessian, share=0.1)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, damped(hessian, 0.1), rtol=1e-12, atol=1e-12)


def test_inputs_that_depend_on_one_another_need_damping() -> None:
    hessian = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"hessian of block\.fc2 is not positive definite with damping up to 0 \(cond"):
        inverse(hessian, share=0, where="block.fc2")
    # Three equal inputs: the two that stay take over what the third did.
    made = remove_columns(torch.ones(1, 3), hessian, torch.tensor([True, False, False]), share=1e-9)
    torch.testing.assert_close(made, torch.tensor([[0.0, 1.5, 1.5]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [256, 257, 600])
def test_a_large_factor_is_that_of_a_small_one(columns: int) -> None:
    _, hessian = drawn(11, columns=columns, samples=2 * columns)
    before = hessian.clone()
    root = factor(hessian, share=0.1)
    assert torch.equal(hessian, before)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root, torch.linalg.cholesky(damped(hessian, 0.1)), rtol=1e-9, atol=1e-9)
    assert torch.equal(factor(hessian, share=0.1), root)


@pytest.mark.parametrize("place", [3, 500])
def test_a_large_hessian_climbs_the_ladder_wherever_it_is_not_positive(place: int) -> None:
    hessian = torch.eye(600, dtype=torch.float64)
    hessian[place, place + 1] = hessian[place + 1, place] = 2
    with pytest.warns(UserWarning, match=r"fc: its hessian is inverted with damping 2, as 0\.02 is too little"):
        root = factor(hessian, share=0.02, where="fc")
    torch.testing.assert_close(root @ root.T, damped(hessian, 2), rtol=1e-12, atol=1e-12)
    # Two equal inputs leave a pivot that is nothing but rounding.
    hessian[place, place + 1] = hessian[place + 1, place] = 1
    with pytest.raises(ModelError, match="not positive definite with damping up to 0"):
        factor(hessian, share=0)


@pytest.mark.parametrize("columns", [7, 600])
def test_a_factor_in_place_leaves_the_hessian_as_it_was(columns: int) -> None:
    _, hessian = drawn(12, columns=columns, samples=2 * columns)
    hessian = hessian.triu() + hessian.triu(1).T
    before, place = hessian.clone(), hessian.data_ptr()
    with factored(hessian, share=0.1) as enough:
        assert enough == 0.1
        assert torch.equal(hessian.tril(), factor(before, share=0.1))
        assert torch.equal(hessian.triu(1), before.triu(1))
    assert torch.equal(hessian, before)
    assert torch.equal(inverse(hessian, share=0.1, in_place=True), inverse(before, share=0.1))
    assert (hessian.data_ptr(), torch.equal(hessian, before)) == (place, True)


@pytest.mark.parametrize("entry", [2.0, 500.0])
def test_a_factor_in_place_leaves_the_hessian_also_if_it_climbs_or_fails(entry: float) -> None:
    hessian = torch.eye(600, dtype=torch.float64)
    hessian[400, 401] = hessian[401, 400] = entry
    before = hessian.clone()
    found: list[Tensor] = []

    def work() -> None:
        with factored(hessian, share=0.02) as enough:
            found.extend((torch.tensor(enough), hessian.tril()))

    if entry == 2.0:
        with pytest.warns(UserWarning, match="damping 2"):
            work()
        assert float(found[0]) == 2
        assert torch.equal(found[1], factor(damped(before, 2), share=0))
    else:
        with pytest.raises(ModelError, match="not positive definite"):
            work()
    assert torch.equal(hessian, before)


def test_a_ladder_of_damping_with_a_warning_on_each_step_up() -> None:
    # Eigenvalues 3 and -1, mean of the diagonal 1: positive definite from a damping above 1 on.
    hessian = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"fc: its hessian is inverted with damping 2, as 0\.02 is too little"):
        found = inverse(hessian, share=0.02, where="fc")
    torch.testing.assert_close(found @ damped(hessian, 2), torch.eye(2, dtype=torch.float64))


def test_the_ladder_ends_in_an_error_with_layer_and_condition_number() -> None:
    hessian = torch.tensor([[1.0, 500.0], [500.0, 1.0]], dtype=torch.float64)
    # Eigenvalues 1 ± 500, and 10 added on the last rung: 511 and -489.
    text = (
        r"hessian of layer4\.conv2 is not positive definite with damping up to 10 \(condition number 1\.0e\+00\): give"
    )
    with pytest.raises(ModelError, match=text):
        inverse(hessian, share=0.01, where="layer4.conv2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_inputs_are_refused_by_name(value: float) -> None:
    hessian = torch.eye(7)
    hessian[1, 1] = value
    with pytest.raises(ModelError, match=r"NaN or infinite values among the inputs of fc1: look at the data"):
        remove_columns(torch.ones(2, 7), hessian, columns_of(0), where="fc1")


def test_broken_weights_are_refused_by_name() -> None:
    weight, hessian = drawn(9)
    check_layer(weight, hessian)
    for value in (float("nan"), float("inf")):
        weight[1, 1] = value
        with pytest.raises(ModelError, match="NaN or infinite values among the weights of fc1: mend the model"):
            check_layer(weight, hessian, "fc1")
    with pytest.raises(OptionError, match=r"got \[4, 7\] and \[6, 6\]"):
        check_layer(weight, hessian[:6, :6])


def test_sizes_that_do_not_fit_are_refused() -> None:
    weight, hessian = drawn(9)
    with pytest.raises(OptionError, match=r"needs a hessian \[columns, columns\]; got \[4, 7\] and \[6, 6\]"):
        remove_columns(weight, hessian[:6, :6], columns_of(0))
    with pytest.raises(
        OptionError, match=r"columns must be bool \[7\], one for each column of fc; got torch\.bool \[6"
    ):
        remove_columns(weight, hessian, columns_of(0, n=6), where="fc")
    with pytest.raises(OptionError, match=r"columns must be bool \[7\].*got torch\.int64 \[7\]"):
        remove_columns(weight, hessian, torch.arange(7))
    with pytest.raises(OptionError, match=r"a hessian is square, \[columns, columns\]; got shape \(2, 3\)"):
        damped(torch.ones(2, 3))
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="the damping must be a number of at least 0"):
            inverse(hessian, share=wrong)
