"""Rewinding of weights and of learning rates."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from secateurs.core.errors import OptionError, PlanError
from secateurs.core.state import read_state, write_state
from secateurs.recover import restore, rewind, rewound_rate, snapshot


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def disturb(model: nn.Module) -> None:
    model(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_lottery_ticket_is_the_first_weights_under_the_mask() -> None:
    model = net()
    first = copy.deepcopy(model)
    saved = snapshot(model)
    disturb(model)
    keep = torch.rand(4, 3) > 0.5
    rewind(model, saved, {"0.weight": keep})
    assert torch.equal(model[0].weight, first[0].weight * keep)
    assert torch.equal(model[2].weight, first[2].weight)
    assert torch.equal(model[1].running_mean, first[1].running_mean)


def test_a_snapshot_does_not_follow_the_model() -> None:
    model = net()
    saved = snapshot(model)
    before = {name: value.clone() for name, value in saved.items()}
    disturb(model)
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_buffers_may_stay() -> None:
    model = net()
    saved = snapshot(model)
    disturb(model)
    running = model[1].running_mean.clone()
    rewind(model, saved, buffers=False)
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(model[0].weight, saved["0.weight"])


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    saved = snapshot(model)
    disturb_weight = model[0].weight
    with torch.no_grad():
        disturb_weight.add_(1)
    rewind(model, saved, {"1.weight": torch.eye(3).bool()})
    assert torch.equal(model[0].weight, saved["0.weight"] * torch.eye(3))


def test_a_snapshot_goes_to_disk(tmp_path: Path) -> None:
    model = net()
    write_state(tmp_path / "first", snapshot(model))
    twin = net()
    restore(twin, read_state(tmp_path / "first"))
    assert torch.equal(twin[2].weight, model[2].weight)


def test_weights_of_another_model_are_refused_before_anything_changes() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    saved = snapshot(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)))
    with pytest.raises(PlanError, match=r"2.weight, 2.bias missing or of another shape"):
        rewind(model, saved)
    with pytest.raises(OptionError, match=r"masks are given for 9.weight"):
        rewind(model, snapshot(net()), {"9.weight": torch.ones(1).bool()})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_rewound_rate_is_the_end_of_the_original() -> None:
    rate = rewound_rate("cosine", to=0.75)
    assert rate(0.0) == pytest.approx((1 + math.cos(math.pi * 0.75)) / 2)
    assert rate(1.0) == pytest.approx(0)
    assert rewound_rate(lambda p: p, to=0.0)(0.3) == pytest.approx(0.3)
    with pytest.raises(OptionError, match=r"to must lie in \[0, 1\), got 1"):
        rewound_rate(to=1)
