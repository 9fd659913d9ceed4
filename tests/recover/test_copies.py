"""Copies differ in the order of the data alone, and equal ones are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import DataError, OptionError
from secateurs.recover import fine_tune
from secateurs.recover.copies import passes_from, trained_copies


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(10, 4, generator=generator) for _ in range(4)]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_copies_differ_and_repeat_while_the_model_stays() -> None:
    model = net()
    before = copy.deepcopy(model)
    made = trained_copies(model, batches(), 3, epochs=2, lr=0.1)
    torch.manual_seed(7)
    again = trained_copies(model, batches(), 3, epochs=2, lr=0.1)
    assert equal(model, before)
    assert not equal(made[0].model, made[1].model)
    assert all(equal(a.model, b.model) for a, b in zip(made, again, strict=True))
    assert [one.scores for one in made] == [()] * 3


def test_a_function_of_the_pass_gets_numbers_of_its_own() -> None:
    asked: list[int] = []

    def data(epoch: int) -> Any:
        asked.append(epoch)
        return iter(batches()[epoch % 4 :])

    trained_copies(net(), data, 2, epochs=3, lr=0.1)
    assert asked == [0, 1, 2, 3, 4, 5]


def test_scores_are_read_after_each_of_the_last_passes() -> None:
    seen: list[Tensor] = []

    def score(model: nn.Module) -> float:
        seen.append(model[0].weight.detach().clone())
        return float(len(seen))

    made = trained_copies(net(), batches(), 2, epochs=4, score=score, last=2, lr=0.1, schedule="constant")
    assert [one.scores for one in made] == [(1.0, 2.0), (3.0, 4.0)]
    assert torch.equal(seen[1], made[0].model[0].weight)
    shorter = net()
    fine_tune(shorter, passes_from(batches(), 0), epochs=3, lr=0.1, schedule="constant")
    assert torch.equal(seen[0], shorter[0].weight)
    every = trained_copies(net(), batches(), 2, epochs=2, score=score, last=9, lr=0.1)
    assert [len(one.scores) for one in every] == [2, 2]


def test_equal_copies_and_a_single_one_are_refused() -> None:
    with pytest.raises(DataError, match="two copies are equal after training"):
        trained_copies(net(), lambda epoch: iter(batches()), 2, epochs=1, lr=0.1)
    with pytest.raises(OptionError, match="at least 2, got 1"):
        trained_copies(net(), batches(), 1, epochs=1, lr=0.1)
