"""Batches of another size: the same samples in the same order, whatever a batch is."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.methods.rebatching import rebatched


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), size=st.integers(1, 9))
def test_samples_stay_in_order_and_only_the_rest_is_left_out(sizes: list[int], size: int) -> None:
    every = torch.arange(sum(sizes))
    found = list(rebatched(((x, -x) for x in every.split(sizes)), size))
    whole = sum(sizes) // size * size or sum(sizes)
    assert torch.equal(torch.cat([x for x, _ in found]), every[:whole])
    assert all(torch.equal(y, -x) for x, y in found)
    assert {len(x) for x, _ in found} == {min(size, sum(sizes))}


def test_every_kind_of_batch() -> None:
    x = torch.arange(6)
    batches: list[Any] = [{"ids": part, "more": [part, (part,)]} for part in x.split(2)]
    first, second = rebatched(batches, 3)
    assert first["ids"].tolist() == first["more"][1][0].tolist() == [0, 1, 2]
    assert second["more"][0].tolist() == [3, 4, 5]
    assert [part.tolist() for part in rebatched(x.split(4), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert list(rebatched([], 3)) == []
