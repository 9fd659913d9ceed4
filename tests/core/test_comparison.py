"""Comparisons: exact counts within matrices, rows and patterns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison
from secateurs.core.errors import OptionError


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, 0.99), st.sampled_from(["matrix", "row"]), st.integers(0, 9))
def test_counts_are_exact_also_among_ties(rows: int, columns: int, sparsity: float, within: str, seed: int) -> None:
    scores = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = Comparison(sparsity, within).keep(scores)  # type: ignore[arg-type]
    if within == "matrix":
        assert int(mask.sum()) == round((1 - sparsity) * rows * columns)
    else:
        assert mask.sum(1).tolist() == [round((1 - sparsity) * columns)] * rows


@pytest.mark.parametrize(("progress", "kept"), [(0.0, 4), (0.49, 4), (0.5, 3), (1.0, 2)])
def test_a_pattern_can_be_approached(progress: float, kept: int) -> None:
    easing = Comparison.of(Pattern(2, 4)).eased(progress)
    assert easing.keep(torch.arange(8.0)[None]).view(2, 4).sum(1).tolist() == [kept, kept]
    assert easing.removed == (4 - kept) / 4


def test_the_idiom_of_a_threshold_removes_one_too_many_and_this_does_not() -> None:
    scores = torch.arange(16.0).view(4, 4)
    assert int((scores <= scores.flatten()[int(16 * 0.5)]).sum()) == 9
    assert int((~Comparison(0.5).keep(scores)).sum()) == 8


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match=r"sparsity must lie in \[0, 1\)"):
        Comparison(sparsity)


def test_a_pattern_that_does_not_divide_is_refused_with_the_name_of_the_layer() -> None:
    with pytest.raises(OptionError, match=r"2:4 needs a number of inputs that 4 divides; fc has 6"):
        Comparison.of(Pattern(2, 4)).check(torch.ones(3, 6), "fc")


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(OptionError, match="within must be matrix or row"):
        Comparison(0.5, "column")  # type: ignore[arg-type]
