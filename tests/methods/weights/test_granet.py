"""GraNet as a method: prune and exchange over a training of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import secateurs as sec
from secateurs.core.errors import BudgetError, OptionError
from secateurs.methods.weights import granet as module
from secateurs.methods.weights.granet import Neuroregeneration, granet
from secateurs.train.pruner import Pruner
from tests.methods.contract import INPUTS, batches, small


@pytest.fixture
def pruners(monkeypatch: pytest.MonkeyPatch) -> list[Pruner]:
    """The pruners that the method makes."""
    made: list[Pruner] = []
    original = module.GraNet

    def noted(*arguments: Any, **options: Any) -> Pruner:
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(module, "GraNet", noted)
    return made


def train(
    pruners: list[Pruner],
    budget: str,
    steps: int,
    how: Neuroregeneration | None = None,
    look: Callable[[Pruner], Any] = id,
    **common: Any,
) -> tuple[sec.Pruned, list[Any]]:
    """The result, and what `look` sees of the pruner after each step."""
    seen: list[Any] = []
    made = granet(
        small(), INPUTS, budget, options=how, data=batches(), measure=False, recover=sec.FineTune(steps=steps, lr=0.05),
        on_step=lambda progress: seen.append(look(pruners[-1])), **common,
    )  # fmt: skip
    return made, seen


def masks(pruner: Pruner) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in pruner.masks.items()}


def live(pruner: Pruner) -> int:
    return sum(int(mask.sum()) for mask in pruner.masks.values())


def changes(seen: list[dict[str, torch.Tensor]]) -> list[int]:
    """Steps, from 1, at which a mask changed."""
    pairs = enumerate(pairwise(seen), start=2)
    return [step for step, (a, b) in pairs if any(not torch.equal(a[name], b[name]) for name in a)]


def test_sparsity_rises_from_a_half_over_the_first_half_of_the_training(pruners: list[Pruner]) -> None:
    made, seen = train(pruners, "sparsity=90%", 60, look=live)
    curve = [0.9 - 0.4 * (1 - min(step / 30, 1)) ** 3 for step in range(1, 61)]
    assert seen == [round(192 * (1 - s)) for s in curve]
    assert sum(made.plan.counts.values()) == 19


def test_the_exchange_goes_on_and_leaves_the_last_update_s_time_to_learn(pruners: list[Pruner]) -> None:
    made, seen = train(pruners, "sparsity=75%", 40, Neuroregeneration(updates=8, last_share=0.5), look=masks)
    assert changes(seen) == [5, 10, 15, 20, 25, 30, 35]
    for name, mask in made.masks.items():
        assert torch.equal(made.model.get_parameter(name) != 0, mask)
    assert any(bool((seen[-1][name] & ~seen[19][name]).any()) for name in made.masks)


def test_settings_reach_the_pruner(pruners: list[Pruner]) -> None:
    how = Neuroregeneration(
        initial=0.25, begin=0.2, end=0.6, updates=10, share=0.4, last_share=0.1, grow="random", exponent=1,
        allocation="erk", start="uniform", granularity="block:2x1",
    )  # fmt: skip
    made, seen = train(pruners, "sparsity=75%", 50, how, look=lambda pruner: pruner.sparsity, seed=7)
    rule, schedule = pruners[0]._rule, pruners[0].schedule
    assert [t for t in range(60) if schedule.due(t)] == [0, 10, 15, 20, 25, 30, 35, 40, 45]
    assert (schedule(10), schedule(20), schedule(30)) == (0.25, 0.5, 0.75)
    assert (rule.share(0), rule.share(45), rule.grow, rule.seed) == (0.4, 0.1, "random", 7)
    assert [group.block for group in rule.prune.groups] == [(2, 1), (2, 1)]
    assert seen[-1] == 0.75
    assert list(made.plan.counts.values()) != [16, 8]
    assert (made.plan.recipe.allocation, made.plan.recipe.granularity) == ("erk", "block:2x1")


def test_the_seed_decides_the_start(pruners: list[Pruner]) -> None:
    starts = [train(pruners, "sparsity=60%", 4, look=masks, seed=seed)[1][0]["0.weight"] for seed in (1, 1, 2)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_constant_sparsity_and_random_growth_are_set(pruners: list[Pruner]) -> None:
    how = Neuroregeneration(initial=0.8, updates=10, share=0.3, last_share=0.3, grow="random", start="er")
    _, seen = train(pruners, "sparsity=80%", 40, how, look=masks)
    assert {sum(int(m.sum()) for m in found.values()) for found in seen} == {38}
    assert changes(seen) == list(range(4, 40, 4))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_trainings_meet_their_sparsity(pruners: list[Pruner], steps: int) -> None:
    made, _ = train(pruners, "sparsity=75%", steps)
    assert sum(made.plan.counts.values()) == 48


@pytest.mark.parametrize("budget", ["macs<=50%", "2:4", "sparsity=90%,macs<=50%"])
def test_budgets_other_than_a_sparsity_are_refused(budget: str) -> None:
    with pytest.raises(BudgetError, match=r"GraNet needs a budget such as 'sparsity=90%', got '"):
        granet(small(), INPUTS, budget, data=batches(), recover=sec.FineTune(epochs=1))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(OptionError, match=r"begin must come before end, got 0.7 and 0.3; last_share must not exceed"):
        Neuroregeneration(begin=0.7, end=0.3, share=0.1, last_share=0.2)
    with pytest.raises(OptionError, match=r"start must be a density rule such as erk, got 'global'; granularity must"):
        Neuroregeneration(start="global", granularity="channel")
    assert Neuroregeneration(share=0).last_share == 0.005
    with pytest.raises(OptionError, match=r"final 0\.4 is below initial 0\.5"):
        granet(small(), INPUTS, "sparsity=40%", data=batches(), recover=sec.FineTune(epochs=1))


def test_the_face_knows_the_method_and_the_train_time_classes() -> None:
    made = sec.prune(
        small(), INPUTS, "sparsity=75%", method="granet", data=batches(), recover=sec.FineTune(epochs=1), measure=False
    )
    assert sum(made.plan.counts.values()) == 48
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for make in (sec.GraNet, sec.RigL, sec.SET):
        assert isinstance(make(model, optimizer, until=4, every=2), Pruner)
    assert isinstance(sec.SRSTE(model, optimizer), Pruner)
