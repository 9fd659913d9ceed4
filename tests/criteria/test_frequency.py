"""How often data looks up each row, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.core.dims import Atom
from secateurs.core.errors import DataError, OptionError
from secateurs.core.units import ChannelGroup, Member
from secateurs.criteria import score


def table(*inputs: str, kind: str = "embedding") -> ChannelGroup:
    return ChannelGroup("t", 5, kind, (Member("weight", 0, Atom("t", 5), 2),), inputs=inputs)


MODEL = nn.Embedding(5, 2)


def test_ids_count_as_inputs_and_as_labels() -> None:
    data = [
        {"ids": torch.tensor([[0, 1, 1]]), "labels": torch.tensor([[3, -100, 3]]), "mask": torch.tensor([[4, 4, 4]])}
    ]
    found = score("token-frequency", MODEL, [table("ids", "0", "labels")], data=data)
    assert found["t"].tolist() == pytest.approx([0.2, 0.4, 0, 0.4, 0])
    found = score("token-frequency", MODEL, [table("ids", "0")], data=data)
    assert found["t"].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0, 0])


def test_positions_and_columns() -> None:
    data = [(torch.tensor([[0, 4], [1, 4]]), torch.tensor([2, 2])), (torch.tensor([[1, 3]]), torch.tensor([2]))]
    found = score("token-frequency", MODEL, [table("0[1]", "ids[1]")], data=data)
    assert found["t"].tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3])
    found = score("token-frequency", MODEL, [table("0", "labels")], data=data)
    assert found["t"].tolist() == pytest.approx([1 / 9, 2 / 9, 3 / 9, 1 / 9, 2 / 9])


def test_it_does_not_run_the_model() -> None:
    class Refuses(nn.Embedding):
        def forward(self, _input: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    assert score("token-frequency", Refuses(5, 2), [table("0")], data=[torch.tensor([1])])["t"].argmax() == 1


def test_what_is_no_id_is_refused() -> None:
    with pytest.raises(DataError, match="id 5 in the data is beyond the 5 rows of t"):
        score("token-frequency", MODEL, [table("0")], data=[torch.tensor([5])])
    with pytest.raises(DataError, match="the data holds no ids of t: they are looked for at ids, 1 of each batch"):
        score("token-frequency", MODEL, [table("ids", "1")], data=[torch.tensor([1])])
    with pytest.raises(OptionError, match="scores embedding groups"):
        score("token-frequency", MODEL, [table("0", kind="channel")], data=[torch.tensor([1])])
