"""Scores of entries from their inputs: the formulas entry by entry, and magnitude where all inputs are alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison
from secateurs.core.errors import OptionError
from secateurs.solvers import relative_importance, wanda_scores

KINDS = [Comparison(0.4), Comparison(0.4, "row"), Comparison.of(Pattern(2, 4))]


def test_four_entries_by_hand() -> None:
    weight, norm = torch.tensor([[1.0, -3.0], [-4.0, 2.0]]), torch.tensor([4.0, 9.0])
    assert wanda_scores(weight, norm).tolist() == [[4.0, 27.0], [16.0, 18.0]]
    # 1 is a fifth of its column and a quarter of its row.
    expected = torch.tensor([[0.2 + 0.25, 0.6 + 0.75], [0.8 + 4 / 6, 0.4 + 2 / 6]])
    torch.testing.assert_close(relative_importance(weight, norm), expected * torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(relative_importance(weight, norm, power=0), expected)


@pytest.mark.parametrize("comparison", KINDS, ids=str)
@given(seed=st.integers(0, 10**6), norm=st.floats(1e-3, 1e3))
def test_inputs_of_one_norm_are_magnitude(comparison: Comparison, seed: int, norm: float) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    kept = comparison.keep(wanda_scores(weight, torch.full((8,), norm)))
    assert torch.equal(kept, comparison.keep(weight.abs()))


def test_rows_and_columns_of_zeros_are_worth_nothing() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert relative_importance(weight, torch.ones(2)).tolist() == [[0.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("scores", [wanda_scores, relative_importance])
def test_half_precision_is_scored_in_float32(scores) -> None:
    weight = torch.tensor([[300.0, 1.0]], dtype=torch.float16)
    found = scores(weight, torch.tensor([300.0, 1.0]))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert weight.tolist() == [[300.0, 1.0]]


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(OptionError, match="power must be at least 0, got -1"):
        relative_importance(torch.ones(1, 2), torch.ones(2), power=-1)
