"""The order of channels against the deal by hand and against all assignments of a slot."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.budget import Pattern
from secateurs.core.errors import MissingExtraError, OptionError
from secateurs.core.select import n_of_m
from secateurs.solvers import channel_order

cases = st.tuples(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)])
)


def kept_sum(scores: Tensor, order: Tensor, keep: int, of: int) -> float:
    moved = scores[:, order]
    return float(moved[n_of_m(moved, keep, of)].double().sum())


def drawn(seed: int, rows: int, groups: int, of: int) -> Tensor:
    return torch.rand(rows, groups * of, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_deal_by_hand() -> None:
    """Ranks 0 … 11 to three groups of four: slot by slot, to and fro."""
    sums = torch.arange(12, 0, -1.0)
    order = channel_order(sums[None], Pattern(2, 4))
    assert order.view(3, 4).tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert sums[shuffled][channel_order(sums[shuffled][None], Pattern(2, 4))].tolist() == sums[order].tolist()


def test_equal_sums_are_dealt_by_index() -> None:
    assert channel_order(torch.ones(3, 6), Pattern(1, 2)).view(3, 2).tolist() == [[0, 5], [1, 4], [2, 3]]


def test_important_channels_side_by_side_are_parted() -> None:
    scores = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]]).expand(3, 8)
    order = channel_order(scores, Pattern(2, 4))
    assert kept_sum(scores, torch.arange(8), 2, 4) == 60
    assert kept_sum(scores, order, 2, 4) == 108


@given(cases, st.booleans())
def test_it_is_a_permutation_and_has_an_inverse(one: tuple[int, int, int, tuple[int, int]], refine: bool) -> None:
    seed, rows, groups, (keep, of) = one
    if refine:
        pytest.importorskip("scipy")
    scores = drawn(seed, rows, groups, of)
    order = channel_order(scores, Pattern(keep, of), refine=refine)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(groups * of))
    mask = n_of_m(scores[:, order], keep, of)[:, order.argsort()]
    assert float(scores[mask].sum()) == pytest.approx(kept_sum(scores, order, keep, of))


@given(cases)
def test_a_refinement_is_the_best_of_all_assignments_slot_by_slot(one: tuple[int, int, int, tuple[int, int]]) -> None:
    pytest.importorskip("scipy")
    seed, rows, groups, (keep, of) = one
    # With many rows no two assignments are equally good.
    scores = drawn(seed, 40 * rows, groups, of)
    table = channel_order(scores, Pattern(keep, of)).view(groups, of)
    sums = [kept_sum(scores, table.flatten(), keep, of)]
    for slot in range(of):
        tried = []
        for chosen in itertools.permutations(range(groups)):
            other = table.clone()
            other[:, slot] = table[list(chosen), slot]
            tried.append((kept_sum(scores, other.flatten(), keep, of), other))
        best, table = max(tried, key=lambda entry: entry[0])
        sums.append(best)
    assert sums == sorted(sums)
    made = channel_order(scores, Pattern(keep, of), refine=True)
    assert kept_sum(scores, made, keep, of) == pytest.approx(sums[-1], rel=1e-9)


@given(cases)
def test_a_refinement_is_never_worse(one: tuple[int, int, int, tuple[int, int]]) -> None:
    pytest.importorskip("scipy")
    seed, rows, groups, (keep, of) = one
    scores = drawn(seed, rows, groups, of).round(decimals=1)
    plain, refined = (channel_order(scores, Pattern(keep, of), refine=on) for on in (False, True))
    assert kept_sum(scores, refined, keep, of) >= kept_sum(scores, plain, keep, of) - 1e-9


def test_a_small_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    scores = drawn(7, 6, 9, 4)
    whole = channel_order(scores, Pattern(2, 4), refine=True)
    assert kept_sum(scores, whole, 2, 4) > kept_sum(scores, channel_order(scores, Pattern(2, 4)), 2, 4)
    monkeypatch.setitem(channel_order.__globals__, "_CHUNK", 1)
    assert torch.equal(channel_order(scores, Pattern(2, 4), refine=True), whole)


def test_without_scipy_the_refinement_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert len(channel_order(torch.ones(1, 4), Pattern(1, 2))) == 4
    with pytest.raises(MissingExtraError, match="scipy is needed here"):
        channel_order(torch.ones(1, 4), Pattern(1, 2), refine=True)


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(OptionError, match=r"2:4 needs scores .* that 4 divides; got \[3, 6\]"):
        channel_order(torch.ones(3, 6), Pattern(2, 4))
    with pytest.raises(OptionError, match=r"got \[4\]"):
        channel_order(torch.ones(4), Pattern(2, 4))
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(OptionError, match="must be finite and at least 0"):
            channel_order(torch.full((1, 4), value), Pattern(2, 4))
