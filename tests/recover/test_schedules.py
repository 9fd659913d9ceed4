"""Learning-rate rules, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from secateurs.core.errors import OptionError
from secateurs.recover.schedules import get_rate, linear


def test_linear_with_warm_up() -> None:
    rate = get_rate("linear-warmup")
    assert [rate(step / 20) for step in range(5)] == pytest.approx([0, 0.5, 1, 17 / 18, 16 / 18])
    assert rate(1.0) == 0


def test_linear_without() -> None:
    assert [get_rate("linear")(p) for p in (0.0, 0.25, 0.5, 1.0)] == [1, 0.75, 0.5, 0]


@pytest.mark.parametrize("warmup", [0.1, 0.3])
def test_it_is_the_rule_that_language_models_are_tuned_with(warmup: float) -> None:
    steps = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0)
    transformers = pytest.importorskip("transformers")
    known = transformers.get_linear_schedule_with_warmup(optimizer, int(steps * warmup), steps)
    for step in range(steps):
        assert linear(warmup)(step / steps) == pytest.approx(known.get_last_lr()[0])
        optimizer.step()
        known.step()


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_warm_up_is_a_share(warmup: float) -> None:
    with pytest.raises(OptionError, match=r"warmup is a share of the training in \[0, 1\), got"):
        linear(warmup)
