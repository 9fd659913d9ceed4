"""Rounds of training, pruning and going back."""

from __future__ import annotations

import copy
from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import OptionError
from secateurs.core.select import top
from secateurs.recover.finetune import Epoch, History, fine_tune
from secateurs.recover.tickets import Masks, Round, training_rounds


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(1))
    return [(part, part[:, :3].argmax(1)) for part in x]


def dense(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1}


def halved(trained: Masks, masks: Masks, number: int) -> dict[str, Tensor]:
    scores = {name: weight.abs().masked_fill(~masks[name], -1) for name, weight in trained.items()}
    return {name: top(scores[name], int(mask.sum()) // 2) for name, mask in masks.items()}


def test_every_round_begins_with_the_first_weights_bit_for_bit() -> None:
    model = net()
    first = copy.deepcopy(model.state_dict())
    begun: list[tuple[dict[str, Tensor], Masks]] = []

    def train(masks: Masks, number: int) -> History:
        begun.append((copy.deepcopy(model.state_dict()), masks))
        assert len(begun) == number + 1
        return fine_tune(model, batches(), epochs=2, lr=0.1, masks=masks)

    rounds = list(islice(training_rounds(model, dense(model), train, halved), 4))
    assert [one.number for one in rounds] == [0, 1, 2, 3]
    assert [int(one.masks["0.weight"].sum()) for one in rounds] == [48, 24, 12, 6]
    assert [one.history.steps for one in rounds] == [8] * 4
    for state, masks in begun:
        for name, value in first.items():
            assert torch.equal(state[name], value * masks[name] if name in masks else value), name
    for earlier, later in pairwise(rounds):
        assert not any(bool((later.masks[name] & ~earlier.masks[name]).any()) for name in later.masks)
        assert later.density == pytest.approx(earlier.density / 2)
    assert all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in rounds[-1].masks.items())


def test_without_rewinding_training_goes_on() -> None:
    model = net()
    ended: list[dict[str, Tensor]] = []
    begun: list[dict[str, Tensor]] = []

    def train(masks: Masks, number: int) -> History:
        begun.append(copy.deepcopy(model.state_dict()))
        found = fine_tune(model, batches(), epochs=1, lr=0.1, masks=masks)
        ended.append(copy.deepcopy(model.state_dict()))
        return found

    list(islice(training_rounds(model, dense(model), train, halved, rewinding=False), 3))
    for before, after in zip(ended[:-1], begun[1:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def nothing(masks: Masks, number: int) -> History:
    return History((Epoch(1, 0.0, 0.1),))


def test_rounds_end_when_nothing_goes_or_the_rule_says_so() -> None:
    model = net()
    assert [r.number for r in training_rounds(model, dense(model), nothing, lambda trained, masks, number: masks)] == [
        0
    ]
    ended = training_rounds(model, dense(model), nothing, lambda t, m, n: None if n == 2 else halved(t, m, n))
    assert [r.number for r in ended] == [0, 1, 2]


def test_what_went_does_not_come_back() -> None:
    model = net()
    masks = {"0.weight": torch.arange(48).view(8, 6) % 2 == 0}

    def revives(trained: Masks, masks: Masks, number: int) -> dict[str, Tensor]:
        return {"0.weight": torch.arange(48).view(8, 6) > 20}

    first, second = training_rounds(model, masks, nothing, revives)
    assert torch.equal(second.masks["0.weight"], masks["0.weight"] & (torch.arange(48).view(8, 6) > 20))
    assert first.density == 0.5


def test_the_rule_sees_the_trained_weights_and_a_round_is_seen_before_it_is_pruned() -> None:
    model = net()
    seen: list[Tensor] = []

    def train(masks: Masks, number: int) -> History:
        with torch.no_grad():
            model[0].weight.fill_(number + 1)
        return nothing(masks, number)

    def choose(trained: Masks, masks: Masks, number: int) -> Masks | None:
        seen.append(trained["0.weight"].clone())
        return halved(trained, masks, number) if number < 1 else None

    for one in training_rounds(model, dense(model), train, choose):
        assert float(model[0].weight.detach().max()) == one.number + 1
    assert [float(weight.max()) for weight in seen] == [1, 2]
    assert isinstance(one, Round)


def test_a_mask_of_no_parameter() -> None:
    with pytest.raises(OptionError, match="masks are given for nobody"):
        next(training_rounds(net(), {"nobody": torch.ones(1, dtype=torch.bool)}, nothing, halved))
