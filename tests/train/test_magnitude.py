"""Gradual and global magnitude pruning, against their specifications' invariants."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.core.errors import BudgetError, ModelError, OptionError
from secateurs.core.units import WeightGroup
from secateurs.train import GlobalMagnitude, GradualMagnitude, Pruner


def layer(values: Sequence[Sequence[float]] | Tensor) -> nn.Linear:
    weight = torch.as_tensor(values, dtype=torch.float32)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def stack(*sizes: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def idle(pruner: Pruner, steps: int) -> None:
    for _ in range(steps):
        pruner.step()


def test_the_schedule_s_counts_are_exact_at_every_update() -> None:
    model = layer(torch.randint(1, 4, (25, 40)).float())
    pruner = GradualMagnitude(model, None, sparsity=0.9, end=8, every=2)
    kept = []
    for _ in range(4):
        idle(pruner, 2)
        kept.append(int(pruner.masks["weight"].sum()))
    # 1 − s at quarters: 0.4796875, 0.2125 (in binary 0.21250000000000002), 0.1140625, 0.1.
    assert kept == [480, 213, 114, 100]


@pytest.mark.parametrize(("force", "sparsity"), [(True, 0.9), (False, 0.8999028)])
def test_the_last_update_meets_the_target_only_when_forced(force: bool, sparsity: float) -> None:
    model = layer(torch.randn(200, 500))
    pruner = GradualMagnitude(model, None, sparsity=0.9, begin=0, end=105, every=10, force_final=force)
    idle(pruner, 105)
    assert pruner.sparsity == pytest.approx(sparsity, abs=5e-6)
    if force:
        assert int(pruner.masks["weight"].sum()) == 10_000


def train(model: nn.Module, optimizer: Optimizer, pruner: Pruner, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, next(model.parameters()).shape[1])
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_masks_are_nested_when_nothing_is_revived(allocation: str) -> None:
    model = stack(6, 12, 8, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.8, end=20, every=2, allocation=allocation)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    for _ in range(10):
        train(model, optimizer, pruner, 2)
        assert all(not (mask & ~before[name]).any() for name, mask in pruner.masks.items())
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
    assert pruner.sparsity > 0.75


def test_a_value_returns_when_survivors_shrink_below_it() -> None:
    model = layer([[3.0, 2.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = GradualMagnitude(model, optimizer, sparsity=1 / 3, initial=1 / 3, end=1, every=1, revive="value")
    assert model.weight.tolist() == [[3.0, 2.0, 0.0]]
    with torch.no_grad():
        model.weight[0, 0] = 0.5
    optimizer.step()
    pruner.step()
    assert model.weight.tolist() == [[0.0, 2.0, 1.0]]


def test_the_same_shrinking_revives_nothing_by_default() -> None:
    model = layer([[3.0, 2.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = GradualMagnitude(model, optimizer, sparsity=1 / 3, initial=1 / 3, end=1, every=1)
    with torch.no_grad():
        model.weight[0, 0] = 0.5
    optimizer.step()
    pruner.step()
    assert model.weight.tolist() == [[0.5, 2.0, 0.0]]


def test_one_large_step_returns_a_weight() -> None:
    model = layer([[3.0, 2.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    pruner = GradualMagnitude(model, optimizer, sparsity=1 / 3, initial=1 / 3, end=1, every=1, revive="one-step")
    (model.weight * torch.tensor([[0.0, 1.5, 4.0]])).sum().backward()
    optimizer.step()
    pruner.step()
    assert model.weight.tolist() == [[3.0, 0.0, -4.0]]


def test_whole_rows_and_columns_as_blocks() -> None:
    weight = torch.tensor([[1.0, 5.0, 1.0], [2.0, 6.0, 2.0]])
    rows = GradualMagnitude(layer(weight), None, sparsity=0.5, initial=0.5, end=1, block=(1, -1))
    assert rows.masks["weight"].tolist() == [[False] * 3, [True] * 3]
    columns = GradualMagnitude(layer(weight), None, sparsity=0.6, initial=0.6, end=1, block=(-1, 1))
    assert columns.masks["weight"].tolist() == [[False, True, False]] * 2


def test_momentum_never_revives_for_100_steps() -> None:
    model = stack(6, 12, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.7, begin=5, end=20, every=5, debug=True)
    train(model, optimizer, pruner, 20)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    for _ in range(100):
        train(model, optimizer, pruner, 1)
        for name, mask in masks.items():
            assert torch.equal(pruner.masks[name], mask)
            assert not model.get_parameter(name)[~mask].any()


def test_targets_by_pattern() -> None:
    pruner = GradualMagnitude(stack(10, 10, 10, 10), None, sparsity=0.9, end=2, every=1, targets={"^1": 0.5, "^2": 0.0})
    idle(pruner, 2)
    assert pruner.masks.sparsities() == pytest.approx({"0.weight": 0.9, "1.weight": 0.5, "2.weight": 0.0})


def test_densities_by_name() -> None:
    wanted = {"0.weight": 0.3, "1.weight": 0.1}
    pruner = GradualMagnitude(stack(10, 10, 10), None, sparsity=0.8, end=1, every=1, allocation=wanted)
    idle(pruner, 1)
    assert pruner.masks.sparsities() == pytest.approx({"0.weight": 0.7, "1.weight": 0.9})


def test_options_reach_the_allocation() -> None:
    pruner = GradualMagnitude(stack(20, 20, 5), None, sparsity=0.5, end=1, every=1, allocation="erk+", fc_density=0.1)
    idle(pruner, 1)
    assert pruner.masks.sparsities()["1.weight"] == pytest.approx(0.9)


def test_a_criterion_is_a_function_of_model_and_groups() -> None:
    def fewest_first(model: nn.Module, groups: Sequence[WeightGroup]) -> dict[str, Tensor]:
        return {group.name: -model.get_parameter(group.name).detach().abs().flatten() for group in groups}

    pruner = GradualMagnitude(layer([[3.0, 1.0]]), None, sparsity=0.5, initial=0.5, end=1, criterion=fewest_first)
    assert pruner.masks["weight"].tolist() == [[False, True]]


def test_registered_criteria_fit_the_slot() -> None:
    from secateurs.criteria import score

    model = layer([[3.0, 1.0]])
    data = [(torch.tensor([[0.1, 9.0]]), torch.tensor([[0.0]]))]
    pruner = GlobalMagnitude(model, sparsity=0.5, criterion=functools.partial(score, "taylor", data=data))
    assert pruner.masks["weight"].tolist() == [[False, True]]


def test_ignored_weights_stay_dense() -> None:
    model = stack(6, 6, 6)
    before = model[0].weight.detach().clone()
    pruner = GradualMagnitude(model, None, sparsity=0.5, end=1, every=1, ignore="0")
    idle(pruner, 1)
    assert list(pruner.masks) == ["1.weight"]
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"final must lie in \[0, 1\)"),
        ({"sparsity": 0.2, "initial": 0.5}, "sparsity cannot fall"),
        ({"begin": 10}, "end must come after begin"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"allocation": "glbal"}, "unknown allocation 'glbal'"),
        ({"criterion": "magnitud"}, "unknown train-time criterion 'magnitud'"),
        ({"targets": {"0": 1.0}}, r"must lie in \[0, 1\)"),
        ({"targets": {"0": 0.5}, "initial": 0.1}, "they need initial=0"),
        ({"targets": {"0": 0.5}, "allocation": "global"}, "targets are for allocation 'uniform'"),
        ({"power": 2.0}, "allocation 'uniform' has no option power"),
        ({"power": 2.0, "allocation": "global"}, "allocation 'global' has no option power"),
        ({"block": (0, 2)}, "block sizes must be positive"),
        ({"allocation": "erk+", "fc_density": 1.0, "sparsity": 0.95}, r"erk\+ holds 1.weight at density 1"),
        ({"revive": "value"}, "revive='value' looks at optimizer steps"),
        ({"scope": "convolution"}, "unknown weight pattern"),
        ({"floor": -1}, "floor"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    model = stack(4, 4, 4)
    before = model[0].weight.detach().clone()
    with pytest.raises(OptionError, match=message):
        GradualMagnitude(model, None, **{"end": 10, **arguments})
    assert torch.equal(model[0].weight, before)
    assert not model[0].weight._post_accumulate_grad_hooks


def test_a_small_tensor_keeps_its_floor() -> None:
    model = layer(torch.randn(4, 10))
    pruner = GradualMagnitude(model, None, sparsity=0.99, end=1, every=1)
    idle(pruner, 1)
    assert int(pruner.masks["weight"].sum()) == 1
    pruner = GradualMagnitude(layer(torch.randn(4, 10)), None, sparsity=0.99, end=1, every=1, floor=0.1)
    idle(pruner, 1)
    assert int(pruner.masks["weight"].sum()) == 4


# -- global ------------------------------------------------------------------------------------------------------------


def test_with_one_layer_global_is_per_tensor() -> None:
    weight = torch.randn(30, 20)
    both = [GlobalMagnitude(layer(weight), sparsity=0.83)]
    both.append(GradualMagnitude(layer(weight), None, sparsity=0.83, initial=0.83, end=1))
    assert torch.equal(both[0].masks["weight"], both[1].masks["weight"])


def test_global_is_the_ranking_of_the_concatenation() -> None:
    model = stack(10, 20, 5)
    flat = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 1)])
    pruner = GlobalMagnitude(model, sparsity=0.7, floor=0)
    ours = torch.cat([mask.flatten() for mask in pruner.masks.values()])
    assert torch.equal(ours, flat >= flat.sort(descending=True).values[90 - 1])


def unequal() -> nn.Sequential:
    """100, 1000 and 8900 weights, the first two far below the third."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 100), nn.Linear(100, 89))
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
        model[1].weight.mul_(1e-3)
    return model


def test_the_floor_of_the_paper_s_example() -> None:
    pruner = GlobalMagnitude(unequal(), sparsity=0.98, floor=50)
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [50, 50, 100]
    assert list(pruner.masks.sparsities().values()) == pytest.approx([0.5, 0.95, 0.988764], abs=1e-6)


def test_the_default_floor_is_a_share_of_all_weights() -> None:
    pruner = GlobalMagnitude(unequal(), sparsity=0.98)
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [5, 5, 190]


def test_a_tensor_smaller_than_the_floor_stays_dense() -> None:
    pruner = GlobalMagnitude(unequal(), sparsity=0.95, floor=120)
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [100, 120, 280]


def test_floors_that_exceed_the_budget_are_refused_before_anything_changes() -> None:
    model = unequal()
    with pytest.raises(BudgetError, match=r"leaves 100 of 10000 units, but the floors of the tensors add up to 150"):
        GlobalMagnitude(model, sparsity=0.99, floor=50, end=1000)
    assert model[0].weight.all()


def test_floors_hold_all_along_a_gradual_global_schedule() -> None:
    model = unequal()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pruner = GlobalMagnitude(model, optimizer, sparsity=0.98, floor=50, end=10, every=2)
    for _ in range(10):
        train(model, optimizer, pruner, 1)
        assert all(int(mask.sum()) >= 50 for mask in pruner.masks.values())
    assert sum(int(mask.sum()) for mask in pruner.masks.values()) == 200


def test_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ModelError, match=r"nothing to prune in BatchNorm2d"):
        GlobalMagnitude(nn.BatchNorm2d(3))


def test_half_precision_models_are_pruned() -> None:
    pruner = GlobalMagnitude(stack(8, 8).bfloat16(), sparsity=0.5)
    assert pruner.sparsity == 0.5
