from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.units import WeightGroup
from secateurs.criteria import score
from tests.criteria.models import ConvNet, first_channels, mlp

MODEL = mlp(50, 40, 30, 20)
GROUPS = [WeightGroup("0.weight", (40, 50)), WeightGroup("2.weight", (30, 40)), WeightGroup("4.weight", (20, 30))]


@given(st.integers(-(2**40), 2**40))
def test_the_seed_decides(seed: int) -> None:
    first, again = score("random", MODEL, GROUPS, seed=seed), score("random", MODEL, GROUPS, seed=seed)
    other = score("random", MODEL, GROUPS, seed=seed + 1)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@given(st.lists(st.sampled_from(GROUPS), min_size=1, max_size=3, unique_by=lambda g: g.name))
def test_groups_have_streams_of_their_own(some: list[WeightGroup]) -> None:
    whole, part = score("random", MODEL, GROUPS), score("random", MODEL, some)
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_streams_are_not_copies_of_each_other() -> None:
    found = score("random", MODEL, GROUPS)
    assert not torch.equal(found["0.weight"][:600], found["4.weight"])


def test_scores_are_uniform() -> None:
    found = score("random", MODEL, GROUPS[:1])["0.weight"]
    assert 0 <= found.min() < 0.01
    assert 0.99 < found.max() < 1
    assert abs(found.mean() - 0.5) < 0.03
    assert abs(found.var() - 1 / 12) < 0.01


def test_channels_are_drawn_too() -> None:
    assert score("random", ConvNet(), [first_channels()])["first"].unique().numel() == 4
