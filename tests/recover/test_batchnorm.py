"""Batch-norm statistics follow the data, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import DataError
from secateurs.recover import recalibrate_batch_norm


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False),
    )  # fmt: skip


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(6, 3, 4, 4) * (i + 1) for i in range(count)]


def test_statistics_are_the_plain_average_over_batches() -> None:
    model, data = net(), batches()
    model(torch.randn(6, 3, 4, 4) + 50)
    assert recalibrate_batch_norm(model, [(x, torch.zeros(6)) for x in data]) == 1
    inside = [model[0](x).detach().movedim(1, 0).flatten(1) for x in data]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(1) for x in inside]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var(1) for x in inside]).mean(0))
    assert model[1].num_batches_tracked == 4


def test_batches_limit() -> None:
    ours, theirs, data = net(), net(), batches()
    theirs.load_state_dict(ours.state_dict())
    recalibrate_batch_norm(ours, data, batches=2)
    recalibrate_batch_norm(theirs, data[:2])
    assert torch.equal(ours[1].running_var, theirs[1].running_var)


def test_everything_else_is_as_before() -> None:
    model = net().train()
    model[3].eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model]
    recalibrate_batch_norm(model, batches())
    assert model[1].momentum == 0.3
    assert [m.training for m in model] == flags
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_meanwhile() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2))
    recalibrate_batch_norm(model.train(), [torch.ones(8, 2)])
    assert model[1].running_mean.tolist() == [1.0, 1.0]


def test_without_batch_norm_the_data_is_not_read() -> None:
    def unread() -> object:
        raise AssertionError
        yield

    assert recalibrate_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), unread()) == 0


def test_an_error_leaves_the_old_statistics() -> None:
    model = net()
    recalibrate_batch_norm(model, batches())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, [*batches(1), torch.randn(2, 7, 4, 4)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[1].momentum == 0.3
    with pytest.raises(DataError, match=r"empty"):
        recalibrate_batch_norm(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_by_size_the_mean_is_that_of_the_data_however_it_is_cut() -> None:
    every = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 4 + 2
    for sizes in ([20], [7, 7, 6], [16, 4], [9, 9, 2]):
        norm = nn.BatchNorm1d(3)
        parts = every.split(sizes)
        recalibrate_batch_norm(nn.Sequential(norm), parts, by_size=True)
        torch.testing.assert_close(norm.running_mean, every.mean(0), atol=1e-6, rtol=1e-6)
        weighted = sum(part.var(0) * len(part) for part in parts) / 20
        torch.testing.assert_close(norm.running_var, weighted, atol=1e-5, rtol=1e-5)
        assert (norm.momentum, len(norm._forward_pre_hooks)) == (0.1, 0)
    pooled = every.var(0)
    assert not torch.allclose(norm.running_var, pooled, atol=1e-3)
