"""Random pruning as a method, against its specification's invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError, OptionError
from secateurs.methods.weights.random_pruning import Random, random_pruning
from tests.methods.contract import INPUTS, batches, small


class Convolutions(nn.Module):
    """The specification's stack: (16, 3, 3, 3), (32, 16, 3, 3) and (10, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).mean((2, 3)))


def lenet() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def prune(model: nn.Module, inputs: Tensor, budget: str, rule: str = "erk", **options: Any) -> sec.Pruned:
    return random_pruning(model, inputs, budget, options=Random(rule), measure=False, **options)


def shares(made: sec.Pruned) -> list[float]:
    return [int(kept.sum()) / len(kept) for kept in made.plan.keep.values()]


@pytest.mark.parametrize(
    ("sparsity", "wanted"),
    [
        (95, [0.03848, 0.11133, 0.91851]),
        (90, [0.07957, 0.23019, 1.0]),
        (80, [0.16224, 0.46936, 1.0]),
        (50, [0.4341, 1.0, 1.0]),
    ],
)
def test_densities_of_lenet(sparsity: int, wanted: list[float]) -> None:
    made = prune(lenet(), torch.ones(1, 784), f"sparsity={sparsity}%")
    assert shares(made) == pytest.approx(wanted, abs=1e-3)
    assert sum(made.plan.counts.values()) == round((1 - sparsity / 100) * 266_200)


@pytest.mark.parametrize(
    ("rule", "wanted"), [("erk", [0.12818, 0.02596, 0.29070]), ("er", [0.16447, 0.03895, 0.05453])]
)
def test_densities_of_convolutions(rule: str, wanted: list[float]) -> None:
    made = prune(Convolutions(), torch.ones(1, 3, 7, 7), "sparsity=95%", rule)
    sizes = [len(kept) for kept in made.plan.keep.values()]
    assert sizes == [432, 4608, 320]
    for share, density, size in zip(shares(made), wanted, sizes, strict=True):
        assert abs(share - density) <= 1 / size
    assert sum(made.plan.counts.values()) == round(0.05 * 5360)


def test_the_first_layer_or_the_classifier_may_stay_dense() -> None:
    inputs = torch.ones(1, 3, 7, 7)
    assert shares(prune(Convolutions(), inputs, "sparsity=70%", "uniform+"))[0] == 1.0
    assert shares(prune(Convolutions(), inputs, "sparsity=90%", "erk+"))[2] == 1.0
    uniform = shares(prune(Convolutions(), inputs, "sparsity=70%", "uniform"))
    assert uniform == pytest.approx([0.3, 0.3, 0.3], abs=0.002)


def test_the_seed_decides_the_positions() -> None:
    first, again, other = (prune(small(), INPUTS, "sparsity=75%", seed=seed).masks for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [int(mask.sum()) for mask in first.values()] == [int(mask.sum()) for mask in other.values()]
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_values_have_no_say_in_the_positions() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(1, 129).view(16, 8))
    wanted = prune(small(), INPUTS, "sparsity=75%").masks
    assert all(torch.equal(mask, wanted[name]) for name, mask in prune(model, INPUTS, "sparsity=75%").masks.items())


def test_layers_have_streams_of_their_own() -> None:
    """The mask of a layer is the same whether or not another one is pruned; equal layers have different masks."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    whole = prune(model, INPUTS, "sparsity=50%", "uniform").masks
    part = prune(model, INPUTS, "sparsity=50%", "uniform", ignore="0").masks
    assert torch.equal(whole["1.weight"], part["1.weight"])
    assert not torch.equal(whole["0.weight"], whole["1.weight"])
    assert not torch.equal(whole["1.weight"], whole["2.weight"])


def test_a_classifier_larger_than_the_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"erk\+ holds 3\.weight at density 1, which is 64 weights, but") as caught:
        prune(small(), INPUTS, "sparsity=75%", "erk+")
    assert caught.value.nearest is not None
    # All that may stay, but for the one weight without which the first layer would be empty.
    assert prune(small(), INPUTS, caught.value.nearest, "erk+").plan.counts == {"0.weight": 1, "3.weight": 63}


def test_the_mask_is_static_for_100_steps() -> None:
    model = small()
    start = prune(model, INPUTS, "sparsity=60%", data=batches(), recalibrate=False)
    trained = prune(
        model, INPUTS, "sparsity=60%", data=batches(), recalibrate=False,
        recover=sec.FineTune(steps=100, lr=0.1, weight_decay=5e-4),
    )  # fmt: skip
    for name, mask in start.masks.items():
        weight = trained.model.get_parameter(name)
        assert torch.equal(trained.masks[name], mask)
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight, start.model.get_parameter(name))


@pytest.mark.parametrize("rule", ["global", "lamp"])
def test_a_rule_that_ranks_is_refused(rule: str) -> None:
    with pytest.raises(OptionError, match=f"random pruning ranks nothing, so rule '{rule}' has no scores to divide by"):
        Random(rule)


def test_an_unknown_rule_has_its_nearest() -> None:
    with pytest.raises(OptionError, match=r"Random: rule is an unknown allocation 'ekr'; the nearest are er"):
        Random("ekr")
