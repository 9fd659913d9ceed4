"""Scratch-E, Scratch-B and the initial weights of sparse networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.recover import ScratchSchedule, reinitialize, scratch_epochs


@pytest.mark.parametrize(
    ("dense", "pruned", "epochs"),
    [
        (627_880_970, 413_364_234, 243),
        (252_572_938, 226_390_090, 178),
        (252_572_938, 183_137_866, 220),
        (508_925_194, 428_291_338, 190),
        (508_925_194, 312_745_738, 260),
    ],
)
def test_cifar_epochs_of_the_paper_s_networks(dense: int, pruned: int, epochs: int) -> None:
    assert scratch_epochs(160, dense, pruned) == ScratchSchedule(epochs, (int(0.5 * epochs), int(0.75 * epochs)))


def test_at_equal_cost_both_budgets_are_one() -> None:
    for rule in ("cifar", "imagenet"):
        assert scratch_epochs(160, 7, 7, "E", rule=rule) == scratch_epochs(160, 7, 7, "B", rule=rule)
    assert scratch_epochs(160, 7, 3, "E") == ScratchSchedule(160, (80, 120))


@pytest.mark.parametrize(
    ("ratio", "epochs", "milestones"),
    [(2.5, 180, (60, 120)), (2.0, 180, (60, 120)), (1.3, 117, (39, 78)), (1.0, 90, (30, 60))],
)
def test_imagenet(ratio: float, epochs: int, milestones: tuple[int, int]) -> None:
    assert scratch_epochs(90, ratio, 1.0, rule="imagenet") == ScratchSchedule(epochs, milestones)


def test_fine_tuning_epochs_are_added_for_a_strict_match() -> None:
    assert scratch_epochs(160, 2, 1, fine_tuning=40).epochs == 360


def test_an_integer_number_of_epochs_is_met() -> None:
    """90 · (7/5) is 125.99… in binary."""
    assert scratch_epochs(90, 7, 5).epochs == 126


def test_the_rate_falls_at_the_milestones() -> None:
    rate = scratch_epochs(160, 252_572_938, 183_137_866).rate
    assert [round(rate(e / 220), 6) for e in (0, 109, 110, 164, 165, 219)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((160, 1.0, 1.1), "costs 1.1, more than the dense one's 1: .* use Scratch-E"),
        ((160, 1.0, 0.0), "costs positive"),
        ((0, 1.0, 1.0), "epochs must be 1 or more"),
        ((160, 1.0, 1.0, "C"), "budget must be E or B"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scratch_epochs(*arguments)


# -- initial weights ---------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 64, 3, bias=False), nn.Linear(64, 100))


def quarter() -> torch.Tensor:
    mask = torch.zeros(16 * 16 * 9, dtype=torch.bool)
    mask[torch.randperm(mask.numel())[: mask.numel() // 4]] = True
    return mask.view(16, 16, 3, 3)


def test_dense_scales() -> None:
    model = net()
    reinitialize(model)
    assert float(model[0].weight.std().detach()) == pytest.approx(0.117851, rel=0.05)
    assert float(model[2].weight.std().detach()) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert float(model[3].weight.std().detach()) == pytest.approx(0.01, rel=0.05)
    assert not model[0].bias.any()
    assert model[1].weight.unique().tolist() == [1.0]


def test_a_sparse_layer_starts_at_the_scale_of_its_density() -> None:
    model, mask = net(), quarter()
    assert int(mask.sum()) == 576
    reinitialize(model, {"0.weight": mask}, batch_norm=0.5)
    kept = model[0].weight.detach()[mask]
    assert float(kept.std()) == pytest.approx(0.235702, rel=0.08)
    assert not model[0].weight[~mask].any()
    assert model[1].weight.unique().tolist() == [0.5]


def test_linear_layers_by_fan_out() -> None:
    model = net()
    mask = torch.arange(6400).view(100, 64) % 4 == 0
    reinitialize(model, {"3.weight": mask}, linear="fan-out")
    assert float(model[3].weight.detach()[mask].std()) == pytest.approx(math.sqrt(2 / 25), rel=0.05)


def test_running_statistics_are_fresh() -> None:
    model = net()
    model[:2](torch.randn(4, 16, 8, 8) + 7)
    reinitialize(model)
    assert not model[1].running_mean.any()


def test_the_seed_decides() -> None:
    models = [net() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        reinitialize(model, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(models[0][2].weight, models[1][2].weight)
    assert not torch.equal(models[0][2].weight, models[2][2].weight)


def test_other_layers_reset_themselves() -> None:
    model = nn.Sequential(nn.Embedding(50, 40), nn.LayerNorm(40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    reinitialize(model)
    assert float(model[0].weight.std().detach()) == pytest.approx(1, rel=0.1)
    assert model[1].weight.unique().tolist() == [1.0]


def test_what_has_no_rule_is_named_before_anything_changes() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(3))

    model = nn.Sequential(nn.Linear(3, 3), Token())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"no rule to draw 1 \(Token\) anew"):
        reinitialize(model)
    with pytest.raises(OptionError, match=r"masks are given for 5.weight"):
        reinitialize(net(), {"5.weight": torch.ones(1).bool()})
    with pytest.raises(OptionError, match=r"linear must be normal or fan-out"):
        reinitialize(net(), linear="xavier")  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
