"""SAM: where the gradient is taken, that weights come back bit for bit, and its way through fine-tuning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from secateurs.core.errors import FileError, OptionError
from secateurs.recover import fine_tune
from secateurs.train import SAM
from secateurs.train.sam import statistics_kept


def half_square(w: Tensor) -> Tensor:
    return w.square().sum() / 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(10, 4, generator=generator) for _ in range(4)]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("rho", [0.0, 0.3, 2.0])
def test_the_perturbed_gradient_of_a_bowl(rho: float) -> None:
    w = nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer, before = SGD([w], 0.1), w.detach().clone()
    half_square(w).backward()
    with SAM(rho).perturbed(optimizer):
        optimizer.zero_grad()
        half_square(w).backward()
    torch.testing.assert_close(w.grad, before * (1 + rho / 5))
    assert torch.equal(w, before)


def test_the_adaptive_way_is_relative_to_each_weight() -> None:
    w = nn.Parameter(torch.tensor([3.0, -4.0]))
    w.grad = torch.tensor([1.0, 2.0])
    with SAM(0.5, adaptive=True).perturbed(SGD([w], 0.1)):
        norm = (3**2 + 8**2) ** 0.5
        torch.testing.assert_close(w.detach(), torch.tensor([3 + 0.5 * 9 / norm, -4 + 0.5 * 32 / norm]))


def test_all_weights_move_together_and_those_without_a_gradient_stay() -> None:
    a, b, idle = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    with SAM(1.0).perturbed(SGD([{"params": [a]}, {"params": [b, idle]}], 0.1)):
        assert (a.item(), b.item(), idle.item()) == pytest.approx((0.6, 0.8, 0.0))


def test_weights_come_back_after_an_error() -> None:
    w = nn.Parameter(torch.tensor([0.1]))
    w.grad = torch.ones(1)
    with pytest.raises(KeyError), SAM(0.7).perturbed(SGD([w], 0.1)):
        raise KeyError
    assert torch.equal(w.detach(), torch.tensor([0.1]))


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.01)])
def test_a_radius_of_zero_is_the_plain_optimizer(make) -> None:
    plain, flat, (x, y) = net(), net(), batches()[0]
    loss = nn.CrossEntropyLoss()
    for model in (plain, flat):
        model.eval()
    first, second = make(plain.parameters()), make(flat.parameters())
    for _ in range(5):
        first.zero_grad()
        loss(plain(x), y).backward()
        first.step()
        SAM(0.0).step(second, lambda: loss(flat(x), y))
    assert equal(plain, flat)


def test_a_step_returns_the_loss_before_it() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    assert SAM(1.0).step(SGD([w], 0.5), lambda: half_square(w)) == 2.0
    assert w.item() == pytest.approx(2 - 0.5 * 3)


def test_fine_tuning_with_it() -> None:
    plain, zero, sharp = net(), net(), net()
    fine_tune(plain, batches(), epochs=3, lr=0.1)
    fine_tune(zero, batches(), epochs=3, lr=0.1, sam=SAM(0.0))
    fine_tune(sharp, batches(), epochs=3, lr=0.1, sam=SAM(0.2))
    assert equal(plain, zero)
    assert not equal(plain, sharp)
    assert int(sharp[1].num_batches_tracked) == 12


def test_fine_tuning_takes_the_step_of_the_formula() -> None:
    ours, theirs, (x, y) = net(), net(), batches()[0]
    fine_tune(ours, [(x, y)], epochs=1, lr=0.1, schedule="constant", sam=SAM(0.3))
    theirs.train()
    loss = nn.CrossEntropyLoss()
    gradients = torch.autograd.grad(loss(theirs(x), y), list(theirs.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    moved = copy.deepcopy(theirs)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), gradients, strict=True):
            p += 0.3 * g / norm
    second = torch.autograd.grad(loss(moved(x), y), list(moved.parameters()))
    for p, q, g in zip(ours.parameters(), theirs.parameters(), second, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * g, atol=1e-6, rtol=1e-4)


def test_masks_hold() -> None:
    model, keep = net(), {"0.weight": torch.arange(32).view(8, 4) % 2 == 0}
    seen: list[bool] = []
    model[0].register_forward_hook(lambda layer, *_: seen.append(bool((layer.weight[~keep["0.weight"]] == 0).all())))
    fine_tune(model, batches(), epochs=1, lr=0.1, weight_decay=0.1, sam=SAM(0.5), masks=keep)
    assert seen == [True] * 8
    assert torch.equal(model[0].weight != 0, keep["0.weight"])


def test_a_checkpoint_knows_it(tmp_path) -> None:
    fine_tune(net(), batches(), epochs=1, lr=0.1, checkpoint=tmp_path, sam=SAM(0.1))
    fine_tune(net(), batches(), epochs=1, lr=0.1, checkpoint=tmp_path, sam=SAM(0.1))
    with pytest.raises(FileError, match="sam"):
        fine_tune(net(), batches(), epochs=1, lr=0.1, checkpoint=tmp_path)


def test_statistics_stay() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    with statistics_kept(model):
        model(batches()[0][0])
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nonsense_is_refused() -> None:
    for rho in (-1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="rho must be"):
            SAM(rho)
    with pytest.raises(OptionError, match=r"call loss\.backward"), SAM().perturbed(SGD([nn.Parameter(torch.ones(1))])):
        pass
