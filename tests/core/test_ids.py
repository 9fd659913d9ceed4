"""Ids and their new numbers, where they stand in inputs, and batches on their way to a model with fewer rows."""

from __future__ import annotations

from operator import length_hint
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import DataError, OptionError
from secateurs.core.ids import Recoded, column, located, recoded, recoded_batch, renumbered

KEPT = torch.tensor([0, 2, 5, 9])


@given(st.sets(st.integers(0, 30), min_size=1), st.data())
def test_there_and_back(some: set[int], data: st.DataObject) -> None:
    kept = torch.tensor(sorted(some))
    ids = torch.tensor(data.draw(st.lists(st.sampled_from(sorted(some)), max_size=12)), dtype=torch.long)
    new = renumbered(ids, kept)
    assert torch.equal(kept[new], ids)
    assert torch.equal(ids.argsort(stable=True), new.argsort(stable=True))


@given(st.sets(st.integers(0, 30), min_size=1, max_size=30), st.integers(0, 40))
def test_what_is_gone_is_refused_or_unknown(some: set[int], asked: int) -> None:
    kept, ids = torch.tensor(sorted(some)), torch.tensor([asked])
    if asked in some:
        assert kept[renumbered(ids, kept, unknown=min(some))] == asked
    else:
        assert kept[renumbered(ids, kept, unknown=min(some))] == min(some)
        with pytest.raises(DataError, match=f"id {asked} was removed"):
            renumbered(ids, kept)


def test_unknown_must_stay() -> None:
    assert renumbered(torch.tensor([1, 2]), KEPT, unknown=9).tolist() == [3, 1]
    with pytest.raises(OptionError, match="unknown=4 was removed itself"):
        renumbered(torch.tensor([1]), KEPT, unknown=4)


def test_negative_ids_are_none() -> None:
    made = renumbered(torch.tensor([[-100, 5], [9, -1]], dtype=torch.int32), KEPT)
    assert made.dtype == torch.int32
    assert made.tolist() == [[-100, 2], [3, -1]]


def test_an_empty_tensor_stays_empty() -> None:
    assert renumbered(torch.zeros(2, 0, dtype=torch.long), KEPT).shape == (2, 0)


def test_places() -> None:
    a, b, c = (torch.zeros(1, dtype=torch.long) for _ in range(3))
    assert [name for name, _ in located(a)] == ["0"]
    assert [name for name, _ in located((a, [b, c]))] == ["0", "1.0", "1.1"]
    assert [name for name, _ in located({"x": a, "y": {"z": b}})] == ["x", "y.z"]
    assert [name for name, _ in located([a, b])] == ["0.0", "0.1"]
    assert column("1.0[12]") == ("1.0", 12)


class Pair(NamedTuple):
    ids: Tensor
    weights: Tensor


def test_only_ids_at_their_places_change() -> None:
    ids, floats = torch.tensor([2, 9]), torch.tensor([2.0, 9.0])
    assert recoded(ids, {"0": KEPT}).tolist() == [1, 3]
    made = recoded((ids, {"x": ids, "y": floats}, Pair(ids, floats), True), {"1.x": KEPT, "1.y": KEPT, "2.0": KEPT})
    assert made[0] is ids
    assert made[1]["x"].tolist() == [1, 3]
    assert made[1]["y"] is floats
    assert isinstance(made[2], Pair)
    assert made[2].ids.tolist() == [1, 3]
    assert made[3] is True


def test_columns_have_tables_of_their_own() -> None:
    given_ids = torch.tensor([[2, 7, 3], [9, 7, 1]])
    made = recoded((given_ids,), {"0[0]": KEPT, "0[2]": torch.tensor([1, 3])})
    assert made[0].tolist() == [[1, 7, 1], [3, 7, 0]]
    assert given_ids.tolist() == [[2, 7, 3], [9, 7, 1]]


@pytest.mark.parametrize("batch", [(torch.tensor([2]), torch.tensor([9])), [torch.tensor([2]), torch.tensor([9])]])
def test_a_target_is_at_labels(batch: tuple[Tensor, Tensor] | list[Tensor]) -> None:
    both = recoded_batch(batch, {"0": KEPT, "labels": KEPT})
    assert type(both) is type(batch)
    assert [t.tolist() for t in both] == [[1], [3]]
    assert [t.tolist() for t in recoded_batch(batch, {"0": KEPT})] == [[1], [9]]


def test_batches_of_other_forms() -> None:
    ids = torch.tensor([2, 5])
    assert recoded_batch(ids, {"0": KEPT}).tolist() == [1, 2]
    assert recoded_batch((ids,), {"0": KEPT})[0].tolist() == [1, 2]
    first, second, target = recoded_batch((ids, ids, ids), {"1": KEPT})
    assert (first.tolist(), second.tolist(), target.tolist()) == ([2, 5], [1, 2], [2, 5])
    assert recoded_batch({"a": ids, "labels": ids}, {"labels": KEPT})["labels"].tolist() == [1, 2]


def test_data_is_renumbered_as_it_is_read() -> None:
    data = Recoded([torch.tensor([2]), torch.tensor([9])], {"0": KEPT})
    assert [b.tolist() for b in data] == [b.tolist() for b in data] == [[1], [3]]
    assert length_hint(data) == 2
    assert [b.tolist() for b in data(0)] == [[1], [3]]
    passes = Recoded(lambda number: [torch.tensor([number])], {"0": KEPT}, unknown=5)
    assert [b.tolist() for b in passes(2)] == [[1]]
    assert [b.tolist() for b in passes(3)] == [[2]]
