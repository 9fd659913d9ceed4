"""SparseGPT against its textbook form (the upper factor of the inverse, column by column) and figures by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison, Within
from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import damped, quadratic_error, sparsegpt
from tests.solvers.matrices import Largest, drawn

PAIR = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def textbook(
    weight: Tensor, hessian: Tensor, comparison: Comparison | None, mask: Tensor | None = None, block: int = 128
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The algorithm as the paper has it: weight, mask, scores and ½·Σe². The slow twin."""
    w, rows, columns = weight.clone(), *weight.shape
    inverse = torch.linalg.inv(damped(hessian))
    u = torch.linalg.cholesky(inverse, upper=True)
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    scores = torch.zeros_like(w)
    loss = 0.0
    size = comparison.pattern.of if comparison and comparison.pattern else block
    for j in range(columns):
        if comparison is not None and j % size == 0:
            end = min(j + size, columns)
            scores[:, j:end] = w[:, j:end] ** 2 / u.diagonal()[j:end] ** 2
            keep[:, j:end] = highest(scores[:, j:end], comparison, j, end, rows)
        e = torch.where(keep[:, j], 0, w[:, j]) / u[j, j]
        w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
        w[:, j] = torch.where(keep[:, j], w[:, j], 0)
        loss += float(e.square().sum()) / 2
    return w, keep, scores, loss


def highest(scores: Tensor, comparison: Comparison, start: int, end: int, rows: int) -> Tensor:
    """By sorting; the counts of blocks add up to those of the matrix."""
    groups = scores if comparison.pattern or comparison.within == "row" else scores.reshape(1, -1)
    each = rows if len(groups) < rows else 1
    k = round((1 - comparison.sparsity) * (each * end)) - round((1 - comparison.sparsity) * (each * start))
    k = comparison.pattern.keep if comparison.pattern else k
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.argsort(dim=1, descending=True, stable=True)[:, :k], True)
    return mask.view(scores.shape)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


# -- the sweep ---------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    columns=st.integers(1, 24),
    block=st.integers(1, 30),
    sparsity=st.floats(0, 0.99),
    within=st.sampled_from(["matrix", "row"]),
)
def test_the_sweep_is_the_textbook_s(
    seed: int, rows: int, columns: int, block: int, sparsity: float, within: Within
) -> None:
    weight, hessian = drawn(seed, rows, columns)
    comparison = Comparison(sparsity, within)
    made = sparsegpt(weight, hessian, comparison, block=block, with_scores=True)
    wanted, mask, scores, loss = textbook(weight, hessian, comparison, block=block)
    assert torch.equal(made.mask, mask)
    close(made.weight, wanted)
    assert made.scores is not None
    torch.testing.assert_close(made.scores, scores, rtol=1e-6, atol=1e-9)
    assert made.loss == pytest.approx(loss, rel=1e-8, abs=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8)]))
def test_patterns_are_chosen_at_their_first_column(seed: int, rows: int, groups: int, pattern: tuple[int, int]) -> None:
    weight, hessian = drawn(seed, rows, groups * pattern[1])
    comparison = Comparison.of(Pattern(*pattern))
    made = sparsegpt(weight, hessian, comparison, block=12)
    wanted, mask, _, _ = textbook(weight, hessian, comparison)
    assert torch.equal(made.mask, mask)
    assert (made.mask.view(rows, groups, -1).sum(2) == pattern[0]).all()
    close(made.weight, wanted)


@pytest.mark.parametrize("comparison", [Comparison(0.6), Comparison(0.5, "row"), Comparison.of(Pattern(2, 4))], ids=str)
def test_more_columns_than_a_block_and_a_panel_have(comparison: Comparison) -> None:
    weight, hessian = drawn(1, 6, 300)
    made = sparsegpt(weight, hessian, comparison)
    wanted, mask, _, loss = textbook(weight, hessian, comparison)
    assert torch.equal(made.mask, mask)
    close(made.weight, wanted)
    assert made.loss == pytest.approx(loss, rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_a_mask_that_is_given_is_kept(seed: int, columns: int) -> None:
    weight, hessian = drawn(seed, 3, columns)
    mask = torch.rand(3, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    made = sparsegpt(weight, hessian, mask=mask, with_scores=True)
    wanted, _, _, loss = textbook(weight, hessian, None, mask)
    assert torch.equal(made.mask, mask)
    assert (made.weight[~mask] == 0).all()
    close(made.weight, wanted)
    assert made.loss == pytest.approx(loss, rel=1e-8, abs=1e-12)


def test_a_mask_s_scores_are_those_it_would_have_been_chosen_by() -> None:
    weight, hessian = drawn(2, 3, 10)
    chosen = sparsegpt(weight, hessian, Comparison(0.5), with_scores=True)
    again = sparsegpt(weight, hessian, mask=chosen.mask, with_scores=True)
    assert chosen.scores is not None
    assert again.scores is not None
    assert torch.equal(chosen.scores, again.scores)
    assert torch.equal(chosen.weight, again.weight)
    assert sparsegpt(weight, hessian, Comparison(0.5)).scores is None


# -- invariants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", ["matrix", "row"])
def test_equal_inputs_without_correlation_are_magnitude(within: Within) -> None:
    weight, _ = drawn(3, 4, 12)
    comparison = Comparison(0.4, within)
    made = sparsegpt(weight, 3 * torch.eye(12, dtype=torch.float64), comparison)
    mask = comparison.keep(weight.abs())
    assert torch.equal(made.mask, mask)
    assert torch.equal(made.weight, weight * mask)


def test_inputs_without_correlation_are_wanda_over_the_matrix_and_move_nothing() -> None:
    weight, _ = drawn(4, 4, 12)
    power = torch.rand(12, dtype=torch.float64) + 0.1
    made = sparsegpt(weight, power.diag(), Comparison(0.5), damping=0)
    assert torch.equal(made.mask, Comparison(0.5).keep(weight.square() * power))
    torch.testing.assert_close(made.weight, weight * made.mask, rtol=0, atol=1e-16)


@given(st.integers(0, 10**6), st.sampled_from([Comparison(0.5), Comparison(0.7, "row"), Comparison.of(Pattern(2, 4))]))
def test_the_steps_add_up_to_the_error(seed: int, comparison: Comparison) -> None:
    weight, hessian = drawn(seed, 4, 12)
    made = sparsegpt(weight, hessian, comparison, block=5)
    assert made.loss == pytest.approx(quadratic_error(weight, made.weight, damped(hessian)), rel=1e-9)


def test_two_weights_by_hand() -> None:
    ones = torch.ones(1, 2, dtype=torch.float64)
    made = sparsegpt(ones, PAIR, mask=torch.tensor([[False, True]]), damping=0)
    torch.testing.assert_close(made.weight, torch.tensor([[0.0, 1.5]], dtype=torch.float64), rtol=1e-12, atol=0)
    assert made.loss == pytest.approx(0.75, rel=1e-12)
    # Removed from the right there is nothing left to make up for it.
    made = sparsegpt(ones, PAIR, mask=torch.tensor([[True, False]]), damping=0)
    assert made.weight.tolist() == [[1.0, 0.0]]
    assert made.loss == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("within", ["matrix", "row"])
@pytest.mark.parametrize("block", [1, 3, 5, 128])
def test_the_counts_of_blocks_add_up_to_those_of_the_matrix(within: Within, block: int) -> None:
    weight, hessian = drawn(5, 7, 19)
    comparison = Comparison(0.37, within)
    made = sparsegpt(weight, hessian, comparison, block=block)
    wanted = comparison.keep(weight)
    assert int(made.mask.sum()) == int(wanted.sum())
    if within == "row":
        assert torch.equal(made.mask.sum(1), wanted.sum(1))


def test_equal_weights_lose_as_many_as_asked() -> None:
    made = sparsegpt(torch.ones(4, 4), torch.eye(4), Comparison(0.5))
    assert made.mask.tolist() == [[True] * 4, [True] * 4, [False] * 4, [False] * 4]


def test_nothing_asked_is_the_weight_bit_for_bit() -> None:
    weight, hessian = drawn(6, 4, 12)
    weight[1, 2] = -0.0
    made = sparsegpt(weight, hessian, Comparison(0.0))
    assert torch.equal(made.weight.view(torch.int64), weight.view(torch.int64))
    assert made.mask.all()
    assert made.loss == 0


def test_the_weight_that_was_given_is_not_touched() -> None:
    weight, hessian = drawn(7, 4, 12)
    for given_weight in (weight, weight.T.contiguous().T):
        before, moments = given_weight.clone(), hessian.clone()
        sparsegpt(given_weight, hessian, Comparison(0.5))
        assert torch.equal(given_weight, before)
        assert torch.equal(hessian, moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight, hessian = drawn(8, 5, 40)
    narrow = weight.to(dtype)
    made = sparsegpt(narrow, hessian.float(), Comparison(0.5))
    exact = sparsegpt(narrow.double(), hessian.float().double(), Comparison(0.5))
    assert made.weight.dtype == dtype
    assert torch.equal(made.mask, exact.mask)
    torch.testing.assert_close(made.weight, exact.weight.to(dtype), rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)


def test_weights_whose_squares_overflow_are_ranked() -> None:
    weight = torch.tensor([[3e30, 1e30, 2e30, 4e30]])
    made = sparsegpt(weight, torch.eye(4), Comparison(0.5))
    assert made.mask.tolist() == [[True, False, False, True]]


# -- inputs that are poor ----------------------------------------------------------------------------------------------


def dead() -> tuple[Tensor, Tensor]:
    """The third and the sixth of eight columns met only zeros; their weights are the largest."""
    weight, hessian = drawn(9, 2, 8)
    for j in (2, 5):
        hessian[j] = hessian[:, j] = 0
        weight[:, j] = 100
    return weight, hessian


def test_columns_that_saw_only_zeros_go_first_and_cost_nothing() -> None:
    weight, hessian = dead()
    made = sparsegpt(weight, hessian, Comparison(0.25, "row"), with_scores=True)
    assert made.mask.tolist() == [[j not in (2, 5) for j in range(8)]] * 2
    assert torch.equal(made.weight, weight * made.mask)
    assert made.loss == 0
    assert made.scores is not None
    assert made.scores[:, [2, 5]].tolist() == [[0, 0], [0, 0]]
    assert (made.scores[:, [0, 1, 3, 4, 6, 7]] > 0).all()


def test_columns_that_saw_only_zeros_and_need_not_go_keep_their_weights() -> None:
    weight, hessian = dead()
    made = sparsegpt(weight, hessian, Comparison(0.125, "row"))
    assert made.mask.tolist() == [[j != 5 for j in range(8)]] * 2
    assert torch.equal(made.weight, weight * made.mask)


def test_a_singular_hessian_climbs_the_ladder_or_is_refused_by_name() -> None:
    weight = torch.ones(1, 2, dtype=torch.float64)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"fc: its hessian is inverted with damping 2, as 0\.02 is too little"):
        made = sparsegpt(weight, indefinite, Comparison(0.5), damping=0.02, where="fc")
    assert made.loss == pytest.approx(quadratic_error(weight, made.weight, damped(indefinite, 2)), rel=1e-9)
    with pytest.raises(ModelError, match=r"hessian of block\.fc2 is not positive definite with damping up to 0 \(cond"):
        sparsegpt(weight, torch.ones(2, 2), Comparison(0.5), damping=0, where="block.fc2")


def test_broken_numbers_are_refused_by_name() -> None:
    weight, hessian = drawn(10, 4, 12)
    with pytest.raises(ModelError, match="NaN or infinite values among the inputs of fc1"):
        sparsegpt(weight, hessian * float("nan"), Comparison(0.5), where="fc1")
    weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinite values among the weights of fc1: mend the model"):
        sparsegpt(weight, hessian, Comparison(0.5), where="fc1")


def test_what_does_not_fit_is_refused() -> None:
    weight, hessian = drawn(11, 3, 6)
    half = Comparison(0.5)
    with pytest.raises(OptionError, match=r"needs a hessian \[columns, columns\]; got \[3, 6\] and \[5, 5\]"):
        sparsegpt(weight, hessian[:5, :5], half)
    with pytest.raises(OptionError, match=r"2:4 needs a number of inputs that 4 divides; fc has 6"):
        sparsegpt(weight, hessian, Comparison.of(Pattern(2, 4)), where="fc")
    with pytest.raises(OptionError, match="either a comparison or a mask for fc; got neither"):
        sparsegpt(weight, hessian, where="fc")
    with pytest.raises(OptionError, match="either a comparison or a mask for fc; got both"):
        sparsegpt(weight, hessian, half, mask=weight > 0, where="fc")
    with pytest.raises(OptionError, match=r"a mask must be bool \[3, 6\], as the weight of fc; got torch\.bool \[3\]"):
        sparsegpt(weight, hessian, mask=torch.ones(3, dtype=torch.bool), where="fc")
    with pytest.raises(OptionError, match="a block has at least 1 column, got 0"):
        sparsegpt(weight, hessian, half, block=0)


@pytest.mark.parametrize("columns", [12, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sweep_in_the_hessian_s_own_memory_is_the_same_and_leaves_it(columns: int, dtype: torch.dtype) -> None:
    weight, hessian = drawn(3, 4, columns, samples=2 * columns)
    hessian = hessian.triu() + hessian.triu(1).T
    before = hessian.clone()
    made = sparsegpt(weight.to(dtype), hessian, Comparison(0.5), in_place=True)
    wanted = sparsegpt(weight.to(dtype), before, Comparison(0.5))
    assert torch.equal(made.weight, wanted.weight)
    assert torch.equal(hessian, before)


def test_a_sweep_that_fails_leaves_the_hessian() -> None:
    hessian = torch.tensor([[1.0, 500.0, 2.0], [500.0, 1.0, 3.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    before = hessian.clone()
    with pytest.raises(ModelError, match="not positive definite"):
        sparsegpt(torch.ones(2, 3), hessian, Comparison(0.5), in_place=True)
    assert torch.equal(hessian, before)


def test_a_sweep_in_place_holds_no_second_matrix() -> None:
    columns = 1500
    weight, hessian = torch.randn(8, columns), torch.eye(columns, dtype=torch.float64)
    found = []
    for in_place in (True, False):
        with Largest() as seen:
            sparsegpt(weight, hessian, Comparison(0.5), in_place=in_place)
        found.append(seen.most / hessian.nbytes)
    # The hessian itself and strips of it; and a whole one beside these.
    assert found[0] < 1.5
    assert found[1] > 2
