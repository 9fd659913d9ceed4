"""The shared mask, its losses, and the operators that merge into layers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from secateurs.core.errors import OptionError
from secateurs.train.shared_mask import (
    MaskPruner,
    Operator,
    SharedMask,
    count_loss,
    identity_loss,
    mask_scalar,
    offset,
    separation_loss,
    temperature,
)

N = 10_000


def test_temperature_and_offset_follow_the_schedule() -> None:
    assert [temperature(t, N) for t in (0, 1)] == pytest.approx([1.0, 1.0], abs=2e-6)
    assert [temperature(t, N) for t in (1000, 5000, 8000, N)] == pytest.approx(
        [4.0, 13.2875, 41.2737, 41.2737], rel=1e-4
    )
    assert [offset(t, N) for t in (0, 1000, 5000, 9000)] == pytest.approx([0.5, 0.4, 0.0, 0.0])


def test_the_scalar_is_one_at_first_and_never_zero() -> None:
    assert mask_scalar(torch.zeros(3), temperature(0, N), offset(0, N)).tolist() == [1.0, 1.0, 1.0]
    low, high = mask_scalar(torch.tensor([-5.0, 5.0]), 41.0, 0.0).tolist()
    assert low == pytest.approx(1 / (1 + math.exp(10)))
    assert high == pytest.approx(1.0)
    assert float(mask_scalar(torch.tensor(0.3), 2.0, 0.1)) == pytest.approx(1 / (1 + math.exp(-0.6)) + 0.1)


def test_losses_of_the_logits() -> None:
    zeros = torch.zeros(4096, requires_grad=True)
    assert float(count_loss(zeros, 3072).detach()) == pytest.approx(3.3333, abs=1e-4)
    assert float(separation_loss(zeros).detach()) == pytest.approx(0.25)
    (count_loss(zeros, 3072) + separation_loss(zeros)).backward()
    assert zeros.grad is not None
    # 10/d' passed straight through, and 2·(0 - ½)/d of the upper cluster.
    assert torch.allclose(zeros.grad, torch.tensor(10 / 3072 - 1 / 4096))
    few = torch.tensor([0.4, -0.1, -0.7], requires_grad=True)
    count_loss(few, 2).backward()
    assert few.grad is not None
    assert few.grad.tolist() == pytest.approx([-5.0] * 3)
    assert float(separation_loss(few.detach())) == pytest.approx(0.01 + (0.16 + 0.04) / 2)


def test_identity_loss_at_first_and_of_a_rotation() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        operator = Operator(SharedMask(4096, 3072, N), 200)
    assert float(identity_loss(operator.reduce.detach())) == pytest.approx(4 / 9 / 200 + 1 / (9 * 4096), rel=0.05)
    rows = torch.linalg.qr(torch.randn(16, 5)).Q.T
    assert float(identity_loss(rows)) == pytest.approx(0, abs=1e-10)


def test_an_operator_starts_as_the_identity_bit_for_bit() -> None:
    mask = SharedMask(8, 6, N)
    x = torch.randn(3, 8)
    assert torch.equal(Operator(mask, 2)(x), x)
    assert torch.equal(Operator(mask, 0, scaled=False)(x), x)


def trained(rank: int, seed: int = 0) -> Operator:
    generator = torch.Generator().manual_seed(seed)
    mask = SharedMask(8, 6, N).double()
    operator = Operator(mask, rank).double()
    with torch.no_grad():
        mask.logits.copy_(torch.randn(8, generator=generator, dtype=torch.float64))
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return operator


@pytest.mark.parametrize("rank", [0, 3])
def test_merged_layers_do_what_the_operator_does(rank: int) -> None:
    operator = trained(rank)
    mask: SharedMask = operator.mask
    mask.eval()
    stays = mask.stays()
    assert int(stays.sum()) == 6
    layer, x = nn.Linear(5, 8).double(), torch.randn(4, 5, dtype=torch.float64)
    whole = torch.diag(operator.scale) @ (torch.eye(8) + operator.expand @ operator.reduce).double()
    expected = (layer(x) @ whole.T) * stays
    torch.testing.assert_close(operator(layer(x)), expected, atol=1e-12, rtol=0)
    merged = nn.Linear(5, 8).double()
    with torch.no_grad():
        merged.weight.copy_(operator.merged(layer.weight, 0))
        merged.bias.copy_(operator.merged(layer.bias, 0))
    torch.testing.assert_close(merged(x)[:, stays], expected[:, stays], atol=1e-12, rtol=0)
    table, ids = nn.Embedding(7, 8).double(), torch.tensor([3, 0])
    rows = operator.merged(table.weight, 1)[ids]
    torch.testing.assert_close(rows[:, stays], operator(table(ids))[:, stays], atol=1e-12, rtol=0)


def test_the_mask_is_soft_in_training_and_frozen_late() -> None:
    mask = SharedMask(4, 2, 10)
    with torch.no_grad():
        mask.logits.copy_(torch.tensor([0.5, 0.2, 0.2, -0.5]))
    assert mask.stays().tolist() == [True, True, False, False]
    mask.step += 7
    assert mask.scalar().requires_grad
    assert float(mask.loss().detach()) > 0
    mask.step += 1
    assert not mask.scalar().requires_grad
    assert float(mask.loss()) == 0
    frozen = mask.scalar()
    mask.step += 1
    assert torch.equal(mask.scalar(), frozen)
    assert 0 < float(frozen[3]) < float(frozen[0]) < 1
    mask.step += 1
    assert mask.scalar().tolist() == [1, 1, 0, 0]
    mask.step -= 5
    assert mask.scalar().tolist() != [1, 1, 0, 0]
    assert mask.eval().scalar().tolist() == [1, 1, 0, 0]


def anneal(mask: SharedMask, operators: list[Operator], steps: int, **options: Any) -> MaskPruner:
    parameters = [mask.logits, *(p for operator in operators for p in operator.parameters())]
    optimizer = torch.optim.Adam(parameters, 0.005)
    pruner = MaskPruner(mask, operators, optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step()
        pruner.step()
    return pruner


def test_the_count_comes_to_what_was_asked_without_a_task() -> None:
    mask = SharedMask(64, 40, 600)
    with torch.no_grad():
        mask.logits.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    pruner = anneal(mask, [], 600)
    assert abs(int((mask.logits >= 0).sum()) - 40) <= 2
    assert int(pruner.finalize().sum()) == 40


@pytest.mark.parametrize("identity", [True, False])
def test_identity_losses_of_all_operators_count(identity: bool) -> None:
    mask = SharedMask(8, 6, 400)
    operators = [Operator(mask, 3), Operator(mask, 3)]
    before = [float(identity_loss(operator.reduce.detach())) for operator in operators]
    anneal(mask, operators, 200, identity=identity).finalize()
    after = [float(identity_loss(operator.reduce.detach())) for operator in operators]
    assert all((b < a / 10) is identity for a, b in zip(before, after, strict=True))


def test_after_the_end_nothing_is_added_and_copies_are_whole() -> None:
    mask = SharedMask(4, 2, 4)
    holder = nn.Sequential(Operator(mask, 1), Operator(mask, 1))
    holder.add_module("shared", mask)
    assert [name for name, _ in holder.named_parameters() if "logits" in name] == ["shared.logits"]
    twin = copy.deepcopy(holder)
    assert twin[0].mask is twin[1].mask is twin.shared
    assert twin.shared is not mask
    pruner = anneal(mask, [], 4)
    assert pruner.loss() is None
    pruner.finalize()


@pytest.mark.parametrize(("keep", "steps"), [(0, 10), (5, 10), (2, 1)])
def test_what_cannot_be_annealed_is_refused(keep: int, steps: int) -> None:
    with pytest.raises(OptionError, match=r"2 steps or more and keeps 1 to 4 channels, got \d+ and \d+\."):
        SharedMask(4, keep, steps)
