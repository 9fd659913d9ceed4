"""L-ADMM against its formula written out, and against the least squares that it converges to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.budget import Pattern, units_kept
from secateurs.core.comparison import Comparison
from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import admm, least_squares
from tests.solvers.matrices import drawn, layer, relative_error

seeds = st.integers(0, 10**6)
HALVES = [Comparison(0.5), Comparison(0.5, "row"), Comparison.of(Pattern(2, 4))]
DOUBLE = {"dtype": torch.float64}


def written_out(
    weight: Tensor, gram: Tensor, comparison: Comparison, turns: int, refreshes: int, gradual: bool
) -> Tensor:
    """The published loop on the transposed weight, with a solve in place of the inverse."""
    norms = gram.diagonal().sqrt()[:, None]
    scaled = gram / (norms * norms.T)
    scaled += 0.1 * scaled.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    dense = first = weight.T * norms
    dual, mask = torch.zeros_like(dense), torch.ones_like(dense)
    for t in range(1, turns + 1):
        if t <= refreshes:
            sparsity = comparison.sparsity * (1 - (1 - t / refreshes) ** 3) if gradual else comparison.sparsity
            eased = Comparison(sparsity, comparison.within, comparison.pattern)
            mask = eased.keep((dense + dual).T.abs()).T
        pruned = (dense + dual) * mask
        dual = dual + dense - pruned
        shifted = scaled + torch.eye(len(gram), dtype=gram.dtype)
        dense = torch.linalg.solve(shifted, scaled @ first + pruned - dual)
    return (((dense + dual) * mask) / norms).T


@pytest.mark.parametrize("gradual", [True, False])
@pytest.mark.parametrize("comparison", HALVES, ids=str)
@given(seeds)
def test_it_is_the_published_loop(gradual: bool, comparison: Comparison, seed: int) -> None:
    weight, hessian = drawn(seed)
    made = admm(weight, hessian, comparison, gradual=gradual, **DOUBLE)
    wanted = written_out(weight, hessian, comparison, 20, 15, gradual)
    torch.testing.assert_close(made.weight, wanted, rtol=1e-7, atol=1e-7)
    assert torch.equal(made.mask, wanted != 0)


def test_lengths_are_options() -> None:
    weight, hessian = drawn(1)
    made = admm(weight, hessian, HALVES[0], iterations=7, refreshes=4, **DOUBLE)
    torch.testing.assert_close(made.weight, written_out(weight, hessian, HALVES[0], 7, 4, True), rtol=1e-9, atol=1e-9)


def test_the_schedule_is_active() -> None:
    weight, hessian = layer(0)
    gradual, inert = (admm(weight, hessian, Comparison(0.7), gradual=on) for on in (True, False))
    assert not torch.equal(gradual.mask, inert.mask)
    assert relative_error(weight, gradual.weight, hessian) < relative_error(weight, inert.weight, hessian)


@given(seeds, st.sampled_from([0.1, 0.3, 0.5, 0.77, 0.9]), st.sampled_from(["matrix", "row"]))
def test_counts_are_exact(seed: int, sparsity: float, within: str) -> None:
    weight, hessian = drawn(seed)
    made = admm(weight, hessian, Comparison(sparsity, within))  # type: ignore[arg-type]
    if within == "matrix":
        assert int(made.mask.sum()) == units_kept(sparsity, 40)
    else:
        assert made.mask.sum(1).tolist() == [units_kept(sparsity, 8)] * 5
    assert (made.weight[~made.mask] == 0).all()


@given(seeds)
def test_patterns_hold(seed: int) -> None:
    weight, hessian = drawn(seed)
    mask = admm(weight, hessian, Comparison.of(Pattern(1, 4))).mask
    assert (mask.view(-1, 4).sum(1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_where_nothing_goes_the_weight_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    weight, hessian = drawn(2)
    weight = weight.to(dtype)
    for made in (
        admm(weight, hessian, Comparison(0.0)),
        admm(weight, hessian, None, mask=torch.ones(5, 8, dtype=torch.bool)),
    ):
        assert torch.equal(made.weight, weight)
        assert made.weight is not weight
        assert made.mask.all()


# -- with a mask -------------------------------------------------------------------------------------------------------


@given(seeds)
def test_a_mask_that_is_given_stays_and_the_weights_go_to_least_squares(seed: int) -> None:
    """In its scaled columns the damped hessian is H + 0.1·diag(H)."""
    weight, hessian = drawn(seed)
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    made = admm(weight, hessian, None, mask=mask, iterations=400, **DOUBLE)
    assert torch.equal(made.mask, mask)
    wanted = least_squares(weight, hessian + 0.1 * hessian.diagonal().diag(), mask, damping=0)
    torch.testing.assert_close(made.weight, wanted, rtol=1e-5, atol=1e-6)


def test_a_mask_needs_no_more_iterations_than_are_asked_for() -> None:
    weight, hessian = layer(1)
    mask = Comparison(0.7, "row").keep(weight.abs() * hessian.diagonal().sqrt())
    errors = [
        relative_error(weight, admm(weight, hessian, None, mask=mask, iterations=n).weight, hessian)
        for n in (2, 5, 10, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * relative_error(weight, weight * mask, hessian)
    assert errors[-1] < 1.1 * relative_error(weight, least_squares(weight, hessian, mask), hessian)


# -- odd inputs --------------------------------------------------------------------------------------------------------


def test_a_scale_of_the_hessian_is_nothing() -> None:
    weight, hessian = drawn(3)
    made = [admm(weight, hessian * scale, HALVES[0]) for scale in (2.0**-120, 1, 2.0**120, 1e-5)]
    assert torch.equal(made[0].weight, made[1].weight)
    assert torch.equal(made[2].weight, made[1].weight)
    torch.testing.assert_close(made[3].weight, made[1].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight, hessian = drawn(4)
    made = admm(weight.to(dtype), hessian, HALVES[1])
    assert made.weight.dtype == dtype
    assert torch.equal(made.weight, admm(weight.to(dtype).double(), hessian, HALVES[1]).weight.to(dtype))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_columns_that_saw_only_zeros_go_first_and_keep_what_stays(scale: float) -> None:
    weight, hessian = drawn(5)
    weight[:, 2] = 100
    hessian[2] = hessian[:, 2] = 0
    assert not admm(weight, hessian * scale, Comparison(1 / 8)).mask[:, 2].any()
    made = admm(weight, hessian * scale, Comparison(0.05))
    assert int(made.mask[:, 2].sum()) == 3
    torch.testing.assert_close(made.weight, weight * made.mask, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.weight[:, 2], weight[:, 2] * made.mask[:, 2])


def test_fewer_inputs_than_columns_and_none() -> None:
    weight, hessian = drawn(6, samples=2)
    made = admm(weight, hessian, HALVES[0])
    before = relative_error(weight, weight * Comparison(0.5).keep(weight.abs()), hessian)
    assert relative_error(weight, made.weight, hessian) < 0.5 * before
    none = admm(weight, torch.zeros(8, 8), HALVES[0])
    assert torch.equal(none.weight, weight * none.mask)
    assert int(none.mask.sum()) == 20


def test_what_cannot_be_solved_is_refused() -> None:
    weight, hessian = drawn(7)
    mask = torch.ones(5, 8, dtype=torch.bool)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="NaN or infinite values among the weights of fc"):
            admm(weight * broken, hessian, HALVES[0], where="fc")
        with pytest.raises(ModelError, match="NaN or infinite values among the inputs of fc"):
            admm(weight, hessian * broken, HALVES[0], where="fc")
    with pytest.raises(OptionError, match="needs either a comparison, to choose a mask, or a mask to keep"):
        admm(weight, hessian, HALVES[0], mask=mask)
    with pytest.raises(OptionError, match="give one of the two"):
        admm(weight, hessian, None)
    with pytest.raises(OptionError, match=r"got torch\.bool \[5, 7\]"):
        admm(weight, hessian, None, mask=mask[:, 1:])
    with pytest.raises(OptionError, match=r"3:5 needs a number of inputs that 5 divides; fc has 8"):
        admm(weight, hessian, Comparison.of(Pattern(3, 5)), where="fc")
    with pytest.raises(OptionError, match=r"refreshes must lie between 1 and iterations \(10\), got 15"):
        admm(weight, hessian, HALVES[0], iterations=10)
    with pytest.raises(OptionError, match=r"rho must be positive, got 0"):
        admm(weight, hessian, HALVES[0], rho=0)
    with pytest.raises(ModelError, match=r"hessian of fc is not positive definite with damping"):
        admm(weight, hessian - 1e5 * (1 - torch.eye(8, dtype=torch.float64)), HALVES[0], where="fc")
