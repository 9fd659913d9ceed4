"""Global magnitude pruning with a minimum threshold as a method, against its specification's invariants."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError
from secateurs.methods.weights.global_magnitude import Global, global_magnitude


def stack(*weights: Tensor) -> nn.Sequential:
    """Linear layers without biases that have these weights."""
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
    return nn.Sequential(*layers)


def prune(model: nn.Module, budget: str, minimum: float = 0.0, **options: Any) -> sec.Pruned:
    inputs = torch.ones(1, next(model.parameters()).shape[1])
    return global_magnitude(model, inputs, budget, options=Global(minimum), measure=False, **options)


def masks(made: sec.Pruned) -> Tensor:
    return torch.cat(list(made.plan.keep.values()))


def unequal() -> nn.Sequential:
    """100, 1000 and 8900 weights, the first two far below the third."""
    return stack(torch.randn(10, 10) * 1e-4, torch.randn(100, 10) * 1e-3, torch.randn(89, 100))


def random() -> nn.Sequential:
    return stack(torch.randn(20, 10), torch.randn(5, 20) * 0.7)


def test_of_ten_magnitudes_exactly_one_stays_at_ninety_percent() -> None:
    """The published code keeps what is not below its threshold, and with it 0.9 as well."""
    made = prune(stack(torch.arange(1, 11).view(1, 10) / 10), "sparsity=90%")
    assert made.model[0].weight.tolist() == [[0.0] * 9 + [1.0]]


def test_the_ranking_is_that_of_the_concatenation() -> None:
    model = random()
    flat = torch.cat([layer.weight.detach().abs().flatten() for layer in model])
    assert torch.equal(masks(prune(model, "sparsity=70%")), flat >= flat.sort(descending=True).values[90 - 1])


def test_only_the_scale_between_layers_matters() -> None:
    model = random()
    plain = prune(model, "sparsity=70%")
    for layers in ([0], [0, 1]):
        scaled = stack(*(w.weight.detach() * (10 if i in layers else 1) for i, w in enumerate(model)))
        assert (prune(scaled, "sparsity=70%").plan.counts == plain.plan.counts) == (layers == [0, 1])


def test_one_layer_is_pruned_as_by_itself() -> None:
    model = stack(torch.randn(30, 20))
    ours = prune(model, "sparsity=83%")
    alone = sec.prune(
        model, torch.ones(1, 20), "sparsity=83%", granularity="weight", allocation="uniform", measure=False
    )
    assert torch.equal(masks(ours), masks(alone))


def test_the_floor_of_the_paper_s_example() -> None:
    made = prune(unequal(), "sparsity=98%", minimum=0.5)
    assert list(made.plan.counts.values()) == [50, 50, 100]
    shares = [1 - int(mask.sum()) / mask.numel() for mask in made.masks.values()]
    assert shares == pytest.approx([0.5, 0.95, 0.988764], abs=1e-6)


def published_loop(sparsity: list[float], sizes: list[int], target: float, minimum: int, most: int) -> list[float]:
    """Survivors of the last layer after each round of the code's rescaling, at most `most` rounds of it."""

    def overall() -> float:
        return sum(n * s for n, s in zip(sizes, sparsity, strict=True)) / sum(sizes)

    survivors: list[float] = []
    while len(survivors) < most and overall() != target:
        scale = overall()
        sparsity[:] = [s / scale * target for s in sparsity]
        survivors.append((1 - sparsity[-1]) * sizes[-1])
        for i, size in enumerate(sizes):
            if (1 - sparsity[i]) * size < minimum:
                sparsity[i] = 1 - minimum / size
    return survivors


def test_water_filling_gives_at_once_what_the_published_loop_never_reaches() -> None:
    sparsity = [1.0, 0.995, 0.97966]
    survivors = published_loop(sparsity, [100, 1000, 8900], 0.98, 50, 1000)
    assert survivors[:5] == pytest.approx([193.4, 109.6, 101.0, 100.1, 100.01], abs=0.05)
    assert len(survivors) == 1000
    assert sum(n * s for n, s in zip([100, 1000, 8900], sparsity, strict=True)) / 10_000 == 0.9799999999999999
    assert prune(unequal(), "sparsity=98%", minimum=0.5).plan.counts["2.weight"] == round(survivors[-1])


@pytest.mark.parametrize("minimum", [0.0, 0.05, 0.3, 0.66])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_the_total_is_met_with_every_feasible_floor(sparsity: float, minimum: float) -> None:
    counts = prune(unequal(), f"sparsity={sparsity:%}", minimum).plan.counts
    assert sum(counts.values()) == round((1 - sparsity) * 10_000)
    assert all(count >= min(int(10_000 * minimum / 100), size) for count, size in zip(
        counts.values(), (100, 1000, 8900), strict=True))  # fmt: skip


def test_floors_above_the_budget_quote_both_numbers() -> None:
    with pytest.raises(BudgetError, match=r"keeps 210 of 10000 units") as caught:
        prune(unequal(), "sparsity=98%", minimum=0.7)
    assert caught.value.nearest == "sparsity=97.9%"
    assert sum(prune(unequal(), "sparsity=97.9%", minimum=0.7).plan.counts.values()) == 210


def test_floors_of_nothing_and_of_everything() -> None:
    model = stack(*(torch.randn(5, 5) * 1000.0**i for i in range(4)))
    inputs = torch.ones(1, 5)
    plain = sec.plan(model, inputs, "sparsity=80%", granularity="weight", allocation="global", floor=0)
    assert prune(model, "sparsity=80%").plan.same_as(plain)
    # 20 of 100 weights stay: 5 in each of four equal layers.
    assert list(prune(model, "sparsity=80%", minimum=5).plan.counts.values()) == [5, 5, 5, 5]
    assert list(plain.counts.values()) == [0, 0, 0, 20]


def test_no_other_mask_keeps_more_mass() -> None:
    weight = torch.tensor([0.3, -2.0, 0.9, 1.1, -0.2, 0.5, -0.7, 1.6, 0.1, -1.2])
    for keep in range(1, 11):
        made = prune(stack(weight[:4].view(2, 2), weight[4:].view(3, 2)), f"sparsity={10 * (10 - keep)}%")
        mass = float(weight[masks(made)].square().sum())
        best = max(float(weight[list(some)].square().sum()) for some in combinations(range(10), keep))
        assert mass == pytest.approx(best)


def test_no_layer_gains_when_sparsity_grows() -> None:
    plan = prune(random(), "sparsity=10%").plan
    counts = [plan.rebudget(f"sparsity={percent}%").counts for percent in range(10, 100, 5)]
    assert all(fewer[name] <= more[name] for more, fewer in pairwise(counts) for name in fewer)
    assert counts[0] != counts[-1]


def test_a_floor_prevents_the_collapse_that_is_warned_about() -> None:
    collapsed = prune(unequal(), "sparsity=98%")
    assert list(collapsed.plan.counts.values()) == [0, 0, 200]
    assert collapsed.plan.warnings[0] == "0.weight keeps 0 of 100 units; give floor=, or ask for less."
    # By default 0.05% of all weights stay in each layer.
    inputs = torch.ones(1, 10)
    assert list(global_magnitude(unequal(), inputs, "sparsity=98%", measure=False).plan.counts.values()) == [5, 5, 190]


def test_a_layer_smaller_than_the_floor_stays_dense() -> None:
    assert list(prune(unequal(), "sparsity=95%", minimum=1.2).plan.counts.values()) == [100, 120, 280]


def test_the_floor_is_a_share_of_the_scope() -> None:
    """1% of the 1100 weights in scope, not of all 10,000."""
    made = prune(unequal(), "sparsity=95%", minimum=1, scope=["0", "1"])
    assert made.plan.counts == {"0.weight": 11, "1.weight": 44}
    assert prune(unequal(), "sparsity=95%", minimum=1, ignore="2").plan.counts == made.plan.counts


def test_masks_hold_in_fine_tuning() -> None:
    model = random()
    data = [(torch.randn(8, 10), torch.randint(5, (8,))) for _ in range(4)]
    made = prune(model, "sparsity=80%", data=data, recover=sec.FineTune(steps=20, lr=0.05, label_smoothing=0.1))
    assert torch.equal(masks(made), masks(prune(model, "sparsity=80%")))
    assert all(torch.equal(made.model.get_parameter(name) != 0, mask) for name, mask in made.masks.items())
    assert not made.model[0].weight.equal(prune(model, "sparsity=80%").model[0].weight)
