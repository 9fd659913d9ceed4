"""Slimming's subgradient and soft filter pruning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.train.regularize import penalized, slimming_penalty, soft_filter_step


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Tanh(), nn.Conv2d(10, 7, 3), nn.BatchNorm2d(7))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()


def test_slimming_adds_the_sign_of_every_scale() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 10))
        model[4].weight[0] = 0
    backward(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    penalty = slimming_penalty(model, 0.01)
    for name, parameter in model.named_parameters():
        added = 0.01 * torch.sign(parameter) if name in ("1.weight", "4.weight") else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad - before[name], added)
    assert model[4].weight.grad[0] == before["4.weight"][0]
    assert float(penalty) == pytest.approx(
        0.01 * float((model[1].weight.abs().sum() + model[4].weight.abs().sum()).detach())
    )


def test_slimming_is_the_gradient_of_its_value() -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(4, 3, 8, 8)
    model(inputs).square().mean().backward()
    slimming_penalty(model, 0.1)
    l1 = twin[1].weight.abs().sum() + twin[4].weight.abs().sum()
    (twin(inputs).square().mean() + 0.1 * l1).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_slimming_refuses_what_it_cannot_slim() -> None:
    with pytest.raises(ModelError, match=r"Linear has no batch norm with a trainable scale"):
        slimming_penalty(nn.Linear(2, 2))
    with pytest.raises(OptionError, match=r"call it after loss.backward"):
        slimming_penalty(net())
    with pytest.raises(OptionError, match=r"strength must be 0 or more, got -1"):
        slimming_penalty(net(), -1)


def test_frozen_scales_are_left_alone() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    backward(model)
    slimming_penalty(model, 0.1)
    assert model[1].weight.grad is None


def zero_filters(conv: nn.Conv2d) -> list[int]:
    return [i for i, row in enumerate(conv.weight.flatten(1).abs().sum(1).tolist()) if row == 0]


def test_soft_filters_are_the_smallest_and_learn_on() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(10, 0, -1.0).view(10, 1, 1, 1).expand(10, 3, 3, 3))
    kept = soft_filter_step(model, 0.3)
    assert zero_filters(model[0]) == [7, 8, 9]
    assert kept["0.weight"].tolist() == [True] * 7 + [False] * 3
    assert len(zero_filters(model[3])) == 2
    backward(model)
    assert model[0].weight.grad[7:].flatten(1).abs().sum(1).all()
    with torch.no_grad():
        model[0].weight[9] += 100
    soft_filter_step(model, 0.3)
    assert zero_filters(model[0]) == [6, 7, 8]


@pytest.mark.parametrize(("filters", "sparsity", "gone"), [(10, 0.3, 3), (100, 0.29, 29), (7, 0.3, 2), (4, 0.0, 0)])
def test_soft_filter_counts(filters: int, sparsity: float, gone: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, filters, 1))
    soft_filter_step(model, sparsity)
    assert len(zero_filters(model[0])) == gone


def test_soft_filters_in_scope_only() -> None:
    model = nn.Sequential(nn.Conv2d(2, 10, 1), nn.Conv2d(10, 10, 1), nn.ConvTranspose2d(10, 10, 1), nn.Linear(3, 10))
    kept = soft_filter_step(model, 0.5, ignore="0")
    assert list(kept) == ["1.weight"]
    assert model[3].weight.all()
    with pytest.raises(OptionError, match=r"sparsity must lie in \[0, 1\), got 1"):
        soft_filter_step(model, 1)
    with pytest.raises(ModelError, match=r"no convolution in the scope"):
        soft_filter_step(model, 0.5, scope="3")


def test_a_penalty_counts_once_a_step_and_after_clipping() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], 0.5)
    asked = iter([weight.square().sum, lambda: None])
    handle = penalized(optimizer, lambda: next(asked)())
    weight.grad = torch.tensor([1.0])
    with torch.no_grad():
        optimizer.step()
    # 1 - 0.5·(1 + 2·1)
    assert weight.tolist() == [-0.5]
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    assert weight.tolist() == [-1.0]
    handle.remove()
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    assert weight.tolist() == [-1.5]
