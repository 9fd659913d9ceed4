"""Least squares on a support against the inputs themselves, and conjugate gradients against least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.comparison import Comparison
from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import conjugate_gradients, damped, least_squares, remove_columns
from tests.solvers.matrices import drawn, layer, relative_error, weight_and_inputs

seeds = st.integers(0, 10**6)


def some(seed: int, weight: Tensor, density: float = 0.5) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed + 1)) < density


def from_inputs(weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Row by row the weights on the mask whose outputs are nearest to the dense ones."""
    out = torch.zeros_like(weight)
    for row, (dense, kept) in enumerate(zip(weight, mask, strict=True)):
        if kept.any():
            out[row, kept] = torch.linalg.lstsq(x[:, kept], x @ dense).solution
    return out


# -- exactly -----------------------------------------------------------------------------------------------------------


def test_two_weights_by_hand() -> None:
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    ones = torch.ones(2, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, True]])
    made = least_squares(ones, hessian, mask, damping=0)
    torch.testing.assert_close(made, torch.tensor([[1.5, 0], [0, 1.5]], dtype=torch.float64), rtol=1e-14, atol=0)


@given(seeds, st.floats(0, 1))
def test_the_outputs_are_as_near_as_they_can_be(seed: int, density: float) -> None:
    weight, x = weight_and_inputs(seed)
    mask = some(seed, weight, density)
    wanted = from_inputs(weight, x, mask)
    made = least_squares(weight, x.T @ x, mask, damping=0)
    scale = max(float(torch.linalg.cond(x)) / 1e4, 1) * max(float(wanted.abs().max()), 1)
    assert float((made - wanted).abs().max()) <= 1e-8 * scale
    assert (made[~mask] == 0).all()


@given(seeds)
def test_rows_with_one_support_are_a_removal_of_columns(seed: int) -> None:
    weight, hessian = drawn(seed)
    gone = some(seed, weight)[0]
    made = least_squares(weight, hessian, ~gone.expand_as(weight), damping=0.01)
    torch.testing.assert_close(made, remove_columns(weight, hessian, gone, share=0.01), rtol=1e-8, atol=1e-8)


def test_shared_supports_are_solved_as_single_ones_are() -> None:
    weight, hessian = drawn(3, rows=12)
    supports = some(3, weight[:3])
    mask = supports[[0, 1, 2, 1, 0, 0, 2, 1, 1, 0, 2, 2]]
    together = least_squares(weight, hessian, mask)
    alone = torch.cat([least_squares(weight[i : i + 1], hessian, mask[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_a_small_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_and_inputs(4, rows=20)
    mask = some(4, weight)
    assert len(mask.unique(dim=0)) > 10
    whole = least_squares(weight, x.T @ x, mask)
    monkeypatch.setitem(least_squares.__globals__, "_CHUNK", 60)
    torch.testing.assert_close(least_squares(weight, x.T @ x, mask), whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(whole, from_inputs(weight, x, mask), rtol=1e-5, atol=1e-6)


def test_damping_is_that_of_the_hessian() -> None:
    weight, hessian = drawn(5)
    mask = some(5, weight)
    made = least_squares(weight, hessian, mask, damping=0.3)
    torch.testing.assert_close(made, least_squares(weight, damped(hessian, 0.3), mask, damping=0))
    assert float((made - least_squares(weight, hessian, mask)).abs().max()) > 1e-3


@given(seeds, st.floats(0, 1))
def test_the_error_never_rises(seed: int, density: float) -> None:
    weight, hessian = drawn(seed)
    mask = some(seed, weight, density)
    before = relative_error(weight, weight * mask, hessian)
    assert relative_error(weight, least_squares(weight, hessian, mask), hessian) <= before * (1 + 1e-9)


def test_what_lost_nothing_is_kept_to_the_bit_and_what_lost_all_is_zero() -> None:
    weight, hessian = drawn(6)
    weight = weight.float()
    mask = some(6, weight)
    mask[1], mask[3] = True, False
    made = least_squares(weight, hessian, mask)
    assert torch.equal(made[1], weight[1])
    assert (made[3] == 0).all()
    for full in (torch.ones_like(mask), torch.zeros_like(mask)):
        assert torch.equal(least_squares(weight, hessian, full), weight * full)


@pytest.mark.parametrize("solve", [least_squares, conjugate_gradients])
def test_a_scale_of_the_hessian_is_nothing_to_the_weights(solve: type) -> None:
    weight, hessian = drawn(7)
    mask = some(7, weight)
    made = [solve(weight, hessian * scale, mask) for scale in (1e-30, 1, 1e30)]
    torch.testing.assert_close(made[0], made[1])
    torch.testing.assert_close(made[2], made[1])


@pytest.mark.parametrize("solve", [least_squares, conjugate_gradients])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype(solve: type, dtype: torch.dtype) -> None:
    weight, hessian = drawn(8)
    mask = some(8, weight)
    made = solve(weight.to(dtype), hessian, mask)
    assert made.dtype == dtype
    assert torch.equal(made, solve(weight.to(dtype).double(), hessian, mask).to(dtype))


@pytest.mark.parametrize("solve", [least_squares, conjugate_gradients])
def test_columns_that_saw_only_zeros_keep_their_weights_and_move_nothing(solve: type) -> None:
    weight, hessian = drawn(9)
    hessian[2] = hessian[:, 2] = 0
    mask = some(9, weight)
    mask[:, 2] = torch.tensor([True, True, False, True, False])
    made = solve(weight, hessian, mask)
    assert torch.equal(made[:, 2], weight[:, 2] * mask[:, 2])
    mask[:, 2] = False
    rest = [0, 1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(made[:, rest], solve(weight, hessian, mask)[:, rest], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solve", [least_squares, conjugate_gradients])
def test_no_input_at_all_is_a_plain_cut(solve: type) -> None:
    weight, _ = drawn(10)
    mask = some(10, weight)
    assert torch.equal(solve(weight, torch.zeros(8, 8), mask), weight * mask)


def test_fewer_inputs_than_columns_leave_a_choice() -> None:
    """Three observations of eight inputs: four weights or more reproduce them, and damping picks the nearest ones."""
    weight, x = weight_and_inputs(11, rows=6, samples=3)
    mask = some(11, weight, 0.8)
    mask[:, :4] = True
    made = least_squares(weight, x.T @ x, mask)
    torch.testing.assert_close(made @ x.T, weight @ x.T, rtol=1e-4, atol=1e-4)
    for row, kept in enumerate(mask):
        change = torch.linalg.lstsq(x[:, kept], x[:, ~kept] @ weight[row, ~kept], driver="gelsd").solution
        torch.testing.assert_close(made[row, kept], weight[row, kept] + change, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"hessian of fc is not positive definite with damping up to 0 \(condition"):
        least_squares(weight, x.T @ x, mask, damping=0, where="fc")


def test_the_ladder_of_damping_is_climbed_with_a_warning() -> None:
    # Eigenvalues 3 and -1, mean of the diagonal 1: positive definite from a damping above 1 on.
    hessian = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    weight, mask = torch.ones(1, 2), torch.tensor([[True, False]])
    with pytest.warns(UserWarning, match=r"fc: its hessian is inverted with damping 2, as 0\.02 is too little"):
        made = least_squares(weight, hessian, mask, damping=0.02, where="fc")
    # 1 + 2/(1 + 2).
    torch.testing.assert_close(made, torch.tensor([[5 / 3, 0.0]]))


@pytest.mark.parametrize("solve", [least_squares, conjugate_gradients])
def test_what_cannot_be_solved_is_refused(solve: type) -> None:
    weight, hessian = drawn(12)
    mask = some(12, weight)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite values among the weights of fc"):
        solve(broken, hessian, mask, where="fc")
    with pytest.raises(ModelError, match="NaN or infinite values among the inputs of fc"):
        solve(weight, hessian * float("inf"), mask, where="fc")
    with pytest.raises(OptionError, match=r"needs a hessian \[columns, columns\].* got \[5, 8\] and \[7, 7\]"):
        solve(weight, hessian[:7, :7], mask)
    text = r"a mask must be bool \[5, 8\], as the weight of fc; got torch\.float64 \[5, 8\]"
    with pytest.raises(OptionError, match=text):
        solve(weight, hessian, mask.double(), where="fc")
    with pytest.raises(OptionError, match=r"got torch\.bool \[4, 8\]"):
        solve(weight, hessian, mask[:4])


# -- cheaply -----------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
def test_as_many_steps_as_columns_are_exact(seed: int, density: float) -> None:
    weight, hessian = drawn(seed)
    mask = some(seed, weight, density)
    options = {"damping": 0.01, "dtype": torch.float64}
    made = conjugate_gradients(weight, hessian, mask, steps=12, **options)
    torch.testing.assert_close(made, least_squares(weight, hessian, mask, damping=0.01), rtol=1e-5, atol=1e-5)
    assert (made[~mask] == 0).all()


@given(seeds)
def test_the_damped_error_falls_with_each_step(seed: int) -> None:
    weight, hessian = drawn(seed)
    mask, steady = some(seed, weight), damped(hessian, 0.01)
    options = {"damping": 0.01, "dtype": torch.float64}
    errors = [
        relative_error(weight, conjugate_gradients(weight, hessian, mask, steps=n, **options), steady) for n in range(8)
    ]
    assert errors[0] == pytest.approx(relative_error(weight, weight * mask, steady))
    assert all(later <= earlier * (1 + 1e-9) + 1e-15 for earlier, later in itertools.pairwise(errors))


def test_a_step_is_the_steepest_one_of_each_row() -> None:
    """One step by hand: with columns scaled to a unit diagonal, along the masked residual of each row."""
    weight, hessian = drawn(13)
    mask = some(13, weight)
    norms = damped(hessian, 0.1).diagonal().sqrt()
    gram, target = damped(hessian, 0.1) / norms / norms[:, None], weight * norms
    made = target * mask
    for row in range(5):
        slope = ((target[row] - made[row]) @ gram) * mask[row]
        made[row] += slope * (slope @ slope) / (slope @ gram @ slope)
    found = conjugate_gradients(weight, hessian, mask, steps=1, damping=0.1, dtype=torch.float64)
    torch.testing.assert_close(found, made / norms, rtol=1e-10, atol=1e-12)


def test_ten_steps_are_nearly_exact_on_a_layer() -> None:
    weight, hessian = layer(0)
    mask = Comparison(0.7, "row").keep(weight.abs() * hessian.diagonal().sqrt())
    exact = relative_error(weight, least_squares(weight, hessian, mask), hessian)
    assert exact < relative_error(weight, conjugate_gradients(weight, hessian, mask), hessian) < 1.01 * exact
