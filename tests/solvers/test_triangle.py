"""Symmetric matrices in the memory that they take, beside PyTorch's own functions that make new ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.solvers import triangle
from secateurs.solvers.triangle import mirror, strips, turn


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "_ROWS", 3)


@given(st.integers(0, 2000))
def test_strips_are_all_rows_once(rows: int) -> None:
    assert [row for a, b in strips(rows) for row in range(a, b)] == list(range(rows))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("n", range(1, 12))
def test_what_is_above_comes_below(n: int) -> None:
    matrix = torch.randn(2, n, n)
    wanted = matrix.triu() + matrix.triu(1).mT
    assert mirror(matrix) is matrix
    assert torch.equal(matrix, wanted)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("n", range(1, 15))
def test_turned_round_is_flipped_both_ways(n: int) -> None:
    matrix = torch.randn(n, n)
    wanted = matrix.flip(0, 1)
    assert turn(matrix) is matrix
    assert torch.equal(matrix, wanted)
