from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.errors import DataError, OptionError
from secateurs.integrations import Batches, Loader


def listed(count: int, size: int, seed: int = 0) -> Batches:
    """Batches whose samples are their own positions."""
    return Batches(count, list, size, seed)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3))
def test_batches_hold_every_sample_once(count: int, size: int, seed: int, epoch: int) -> None:
    data = listed(count, size, seed)
    stored = list(data)
    assert len(stored) == len(data)
    assert [i for batch in stored for i in batch] == list(range(count))
    shuffled = list(data(epoch))
    seen = [i for batch in shuffled for i in batch]
    assert len(set(seen)) == len(seen)
    # Complete batches only, unless there is none.
    assert {len(batch) for batch in shuffled} == ({size} if count >= size else {count})
    assert len(seen) == (count - count % size or count)
    assert len(data(epoch)) == len(shuffled)  # type: ignore[arg-type]


def test_a_pass_follows_from_seed_and_number() -> None:
    data = listed(20, 5, seed=3)
    assert list(data(1)) == list(data(1))
    assert list(data(1)) != list(data(2))
    assert list(data(1)) != list(listed(20, 5, seed=4)(1))
    assert list(data(0)) != list(data)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_a_sample_is_drawn_without_replacement(count: int, size: int, limit: int) -> None:
    drawn = listed(count, size).sample(limit)
    seen = [i for batch in drawn for i in batch]
    assert len(seen) == len(set(seen)) == min(count, size * limit)
    assert len(drawn) <= limit
    assert seen == [i for batch in drawn for i in batch]


def test_a_sample_of_sorted_data_is_mixed() -> None:
    (first,) = listed(1000, 20).sample(1)
    assert max(first) > 500


def test_a_loader_is_called_for_each_pass() -> None:
    calls = []

    def make() -> Iterator[int]:
        calls.append(1)
        yield from (1, 2, 3)

    loader = Loader(make)
    assert (list(loader), list(loader(0)), list(loader.sample(2))) == ([1, 2, 3], [1, 2, 3], [1, 2])
    assert len(calls) == 3


@pytest.mark.parametrize("data", [listed(3, 1), Loader(list)])
def test_a_limit_is_positive(data: Batches | Loader) -> None:
    with pytest.raises(OptionError, match="a limit is at least 1 batch, got 0"):
        data.sample(0)


def test_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="the data is empty"):
        listed(0, 1)
    with pytest.raises(OptionError, match="a batch has at least 1 sample, got 0"):
        listed(3, 0)
