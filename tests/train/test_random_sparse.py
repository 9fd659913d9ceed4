"""Random pruning at initialization."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.allocate import densities
from secateurs.core.errors import BudgetError, OptionError
from secateurs.core.units import WeightGroup
from secateurs.train import RandomSparse, ranked_densities


def lenet() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


SHAPES = {"0.weight": (300, 784), "2.weight": (100, 300), "4.weight": (10, 100)}


@pytest.mark.parametrize(
    ("rule", "options"), [("erk", {}), ("er", {}), ("uniform", {}), ("uniform+", {}), ("erk+", {"fc_density": 0.1})]
)
def test_counts_are_the_rounded_densities(rule: str, options: dict[str, float]) -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 300), nn.Linear(300, 10))
    pruner = RandomSparse(model, sparsity=0.8, allocation=rule, **options)
    wanted = densities(rule, {"0.weight": (10, 20), "1.weight": (300, 10), "2.weight": (10, 300)}, 1 - 0.8, **options)
    for name, mask in pruner.masks.items():
        assert int(mask.sum()) == round(wanted[name] * mask.numel())
    assert pruner.sparsity == pytest.approx(0.8, abs=1.5 / 6200)


def test_densities_of_lenet() -> None:
    pruner = RandomSparse(lenet(), sparsity=0.95)
    kept = [1 - s for s in pruner.masks.sparsities().values()]
    assert kept == pytest.approx([0.03848, 0.11133, 0.91851], abs=1e-3)


def test_the_seed_decides_the_masks_and_nothing_else_does() -> None:
    first = RandomSparse(lenet(), seed=1).masks
    torch.manual_seed(99)
    again, other = RandomSparse(lenet(), seed=1).masks, RandomSparse(lenet(), seed=2).masks
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_layer_s_mask_does_not_depend_on_the_other_layers() -> None:
    whole = RandomSparse(lenet(), sparsity=0.5, allocation="uniform").masks
    part = RandomSparse(lenet(), sparsity=0.5, allocation="uniform", ignore="0").masks
    assert torch.equal(whole["2.weight"], part["2.weight"])


def test_masks_are_static_for_100_steps() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    pruner = RandomSparse(model, optimizer, sparsity=0.6, debug=True)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
        pruner.step()
        for name, mask in masks.items():
            assert torch.equal(pruner.masks[name], mask)
            assert not model.get_parameter(name)[~mask].any()
    assert pruner.steps == 100


def test_rescaled_weights_have_the_scale_of_their_density() -> None:
    model = nn.Linear(400, 500)
    pruner = RandomSparse(model, sparsity=0.9, allocation="uniform", rescale=True)
    kept = model.weight.detach()[pruner.masks["weight"]]
    assert float(kept.std()) == pytest.approx(math.sqrt(2 / 1.0001) / math.sqrt(400 * 0.1), rel=0.02)
    plain = nn.Linear(400, 500)
    before = plain.weight.detach().clone()
    pruner = RandomSparse(plain, sparsity=0.9)
    assert torch.equal(plain.weight, before * pruner.masks["weight"])


def test_given_densities() -> None:
    given = {"0.weight": 0.25, "2.weight": 0.5, "4.weight": 1.0}
    pruner = RandomSparse(lenet(), allocation=given)
    assert pruner.masks.sparsities() == {"0.weight": 0.75, "2.weight": 0.5, "4.weight": 0.0}


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"0.weight": 0.5, "2.weight": 0.5}, "4.weight differ"),
        ({"0.weight": 0.5, "2.weight": 0.5, "4.weight": 1.5}, r"densities must lie in \[0, 1\], got 4.weight 1.5"),
        ("global", "takes its counts from scores"),
        ("snip", "unknown allocation 'snip'"),
    ],
)
def test_wrong_allocations_are_refused(allocation: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RandomSparse(lenet(), allocation=allocation)


def test_options_belong_to_named_rules() -> None:
    with pytest.raises(OptionError, match=r"only a named allocation has options, got power"):
        RandomSparse(lenet(), allocation=dict.fromkeys(SHAPES, 0.5), power=2.0)
    with pytest.raises(OptionError, match=r"allocation 'erk' has no option powr"):
        RandomSparse(lenet(), powr=2.0)


def test_a_classifier_larger_than_the_budget_is_refused() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1000))
    with pytest.raises(BudgetError, match=r"1.weight at density 1"):
        RandomSparse(model, sparsity=0.9, allocation="erk+")


@pytest.mark.parametrize("sparsity", [1.0, -0.1])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match=r"must lie in \[0, 1\)"):
        RandomSparse(lenet(), sparsity=sparsity)


@pytest.mark.filterwarnings("ignore:no weight is left")
def test_fewer_weights_than_tensors_warns() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    with pytest.warns(UserWarning, match=r"leaves 1 of 36 weights for 4 tensors"):
        RandomSparse(model, sparsity=0.97, allocation="uniform")


# -- densities from a ranking ------------------------------------------------------------------------------------------


def by_size(model: nn.Module, groups: Sequence[WeightGroup]) -> dict[str, Tensor]:
    return {group.name: model.get_parameter(group.name).detach().abs().flatten() for group in groups}


def test_densities_are_the_shares_of_the_global_ranking() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[6.0, 5.0], [4.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[3.0, 2.0]]))
    shapes = {"0.weight": (2, 2), "1.weight": (1, 2)}
    assert ranked_densities(model, shapes, 1 / 3, by_size) == {"0.weight": 0.75, "1.weight": 0.5}
    pruner = RandomSparse(model, sparsity=1 / 3, allocation=by_size)
    assert pruner.masks.sparsities() == {"0.weight": 0.25, "1.weight": 0.5}


def test_redrawn_weights_are_xavier_s_and_the_model_is_left_alone() -> None:
    seen: dict[str, Tensor] = {}

    def spy(model: nn.Module, groups: Sequence[WeightGroup]) -> dict[str, Tensor]:
        assert model.training
        seen.update({group.name: model.get_parameter(group.name).detach().clone() for group in groups})
        return by_size(model, groups)

    model = nn.Sequential(nn.Conv2d(20, 40, 3)).eval()
    before = model[0].weight.detach().clone()
    ranked_densities(model, {"0.weight": (40, 20, 3, 3)}, 0.5, spy)
    assert torch.equal(seen["0.weight"], before)
    ranked_densities(model, {"0.weight": (40, 20, 3, 3)}, 0.5, spy, redraw=True)
    assert float(seen["0.weight"].std()) == pytest.approx(math.sqrt(2 / (9 * 60)), rel=0.05)
    assert torch.equal(model[0].weight, before)
    assert not model.training


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_snip_and_grasp_ratios(criterion: str) -> None:
    from secateurs.criteria import score

    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    data = [(torch.randn(30, 6), torch.randint(0, 3, (30,)))]
    pruner = RandomSparse(model, sparsity=0.5, allocation=functools.partial(score, criterion, data=data), redraw=True)
    kept = [int(mask.sum()) for mask in pruner.masks.values()]
    assert sum(kept) == 90
    assert all(kept)
