"""Reconstruction on recorded inputs: it reaches the closed forms, and touches nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.batch import Call
from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.recover.adapters import attach, merge
from secateurs.recover.reconstruct import reconstruct


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, list[Tensor], list[Tensor]]:
    """A Linear 5 → 4 without three fifths of its weights, two batches of correlated inputs, and its outputs before."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(5, 4).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        mixed = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        x = torch.randn(40, 5, generator=generator, dtype=torch.float64) @ (torch.eye(5) + 0.3 * mixed) + 0.5
        targets = [layer(part) for part in x.to(dtype).split(20)]
        order = torch.rand(4, 5, generator=generator).argsort(1)
        layer.weight.scatter_(1, order[:, :3], 0)
    return layer, list(x.to(dtype).split(20)), targets


def squared(layer: nn.Module, calls: list[Tensor], targets: list[Tensor], wide: bool = False) -> float:
    with torch.no_grad():
        output, target = layer(torch.cat(calls)), torch.cat(targets)
        return float(((output.float() - target.float()) if wide else (output - target)).square().mean())


def test_a_bias_alone_reaches_the_closed_form() -> None:
    layer, calls, targets = problem()
    whole = [torch.cat(calls)], [torch.cat(targets)]
    residual = (whole[1][0] - layer(whole[0][0])).detach()
    wanted = layer.bias.detach() + residual.mean(0)
    weight, start = layer.weight.detach().clone(), squared(layer, calls, targets)
    before, after = reconstruct(layer, *whole, steps=800, lr=0.05, train="biases")
    torch.testing.assert_close(layer.bias.detach(), wanted, rtol=1e-4, atol=1e-4)
    assert before == pytest.approx(start)
    # Per output the mean square falls by the square of the mean.
    assert before - after == pytest.approx(float(residual.mean(0).square().mean()), rel=1e-6)
    assert torch.equal(layer.weight, weight)


def test_mask_lora_of_full_rank_reaches_restricted_least_squares() -> None:
    layer, calls, targets = problem()
    mask, x, y = layer.weight.detach() != 0, torch.cat(calls), torch.cat(targets) - layer.bias.detach()
    wanted = torch.zeros(4, 5, dtype=torch.float64)
    for row, stays in enumerate(mask):
        chosen = x[:, stays]
        wanted[row, stays] = torch.linalg.solve(chosen.T @ chosen, chosen.T @ y[:, row])
    with attach(layer, "*", "mask-lora", rank=4, alpha=4.0):
        before, after = reconstruct(layer, [x], [torch.cat(targets)], steps=3000, lr=0.02, train="adapters")
        merge(layer)
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer.weight != 0, mask)
    best = float((x @ wanted.T - y).square().mean())
    assert after == pytest.approx(best, rel=1e-4)
    assert after < before


def test_the_error_is_of_all_batches_whatever_their_sizes() -> None:
    layer, calls, targets = problem()
    uneven = [calls[0][:3], torch.cat([calls[0][3:], calls[1]])]
    wanted = [targets[0][:3], torch.cat([targets[0][3:], targets[1]])]
    before, after = reconstruct(layer, uneven, wanted, steps=40, lr=0.01, train="biases")
    assert before > after == pytest.approx(squared(layer, calls, targets))
    assert before == pytest.approx(squared(problem()[0], calls, targets))


def test_batches_come_in_their_order_and_round_again() -> None:
    layer, calls, targets = problem()
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if torch.is_grad_enabled() else None)
    reconstruct(layer, calls, targets, steps=5, lr=0.01, train="biases")
    assert [next(i for i, known in enumerate(calls) if known is x) for x in seen] == [0, 1, 0, 1, 0]


class Block(nn.Module):
    """It wants a keyword, has dropout and a norm, and returns more than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(5, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, str]:
        return x + self.down(self.dropout(self.up(self.norm(x)).relu())) * scale, "more"


def block() -> tuple[Block, list[Call], list[Tensor]]:
    torch.manual_seed(0)
    made = Block()
    calls = [Call((torch.randn(16, 5),), {"scale": 2.0}) for _ in range(3)]
    with torch.no_grad():
        targets = [made.eval()(*c.args, **c.kwargs)[0] for c in calls]
        made.up.weight[:, :3] = 0
    return made.train(), calls, targets


def test_a_block_with_adapters_is_better_and_otherwise_as_it_was() -> None:
    made, calls, targets = block()
    before = copy.deepcopy(made.state_dict())
    with attach(made, "up", "mask-lora", rank=2) as adapters:
        first, last = reconstruct(made, calls, targets, steps=60, lr=0.02)
        adapters.merge()
    assert last < 0.9 * first
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"norm.weight", "norm.bias", "up.weight", "down.bias"}
    assert not made.up.weight[:, :3].any()
    assert made.training
    assert made.dropout.training
    assert all(p.requires_grad and p.grad is None for p in made.parameters())
    again, calls, targets = block()
    assert reconstruct(again, calls, targets, steps=60, lr=0.02)[0] == first


def test_half_precision_is_compared_in_float32() -> None:
    layer, calls, targets = problem(torch.bfloat16)
    exact = squared(layer, calls, targets, wide=True)
    before, after = reconstruct(layer, calls, targets, steps=50, lr=0.05, train="biases")
    assert before == pytest.approx(exact)
    assert after < before
    assert layer.bias.dtype == torch.bfloat16
    narrow, calls, targets = problem(torch.float32)
    assert reconstruct(narrow, calls, targets, steps=20, lr=0.01, train="biases", autocast=torch.bfloat16)[1] < before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, OptionError, "steps must be 1 or more and lr positive, got 0 and 0.1"),
        ({"lr": 0.0}, OptionError, "steps must be 1 or more and lr positive, got 4 and 0.0"),
        ({"train": "weights"}, OptionError, "unknown selector of parameters 'weights'"),
        ({"schedule": "cosin"}, OptionError, "unknown learning-rate schedule 'cosin'"),
        ({"calls": []}, DataError, "each call needs one target, and there must be one; got 0 and 2"),
        ({"targets": [torch.ones(20, 4)]}, DataError, "got 2 and 1"),
        ({"targets": [torch.ones(20, 3)] * 2}, DataError, r"the block gives \[20, 4\] where the target is \[20, 3\]"),
        ({"train": "adapters"}, ModelError, "Linear has no adapters to train"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    layer, calls, targets = problem()
    before = copy.deepcopy(layer.state_dict())
    arguments: dict[str, Any] = {"calls": calls, "targets": targets, "steps": 4, "lr": 0.1, "train": "biases"}
    with pytest.raises(error, match=message):
        reconstruct(layer, **{**arguments, **changes})
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_output_that_is_not_finite_leaves_the_block_as_it_was() -> None:
    layer, calls, targets = problem()
    before = copy.deepcopy(layer.state_dict())
    targets[1] = targets[1] / 0
    with pytest.raises(ModelError, match="the block's output or its error is not finite"):
        reconstruct(layer, calls, targets, steps=4, lr=0.1, train="biases")
    fine = problem()[2]
    with pytest.raises(ModelError, match="is not finite: look at the recorded inputs and targets, or lower lr"):
        reconstruct(layer, calls, fine, steps=4, lr=1e300, train="biases", schedule="constant")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(p.requires_grad for p in layer.parameters())
