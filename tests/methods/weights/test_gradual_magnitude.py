"""Gradual magnitude pruning as a method: the curve over a training of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError, OptionError
from secateurs.methods.weights import gradual_magnitude as module
from secateurs.methods.weights.gradual_magnitude import Gradual, gradual_magnitude
from secateurs.train.pruner import Pruner
from tests.methods.contract import INPUTS, batches, small


@pytest.fixture
def pruners(monkeypatch: pytest.MonkeyPatch) -> list[Pruner]:
    """The pruners that the method makes."""
    made: list[Pruner] = []
    original = module.GradualMagnitude

    def noted(*arguments: Any, **options: Any) -> Pruner:
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(module, "GradualMagnitude", noted)
    return made


def train(
    pruners: list[Pruner],
    budget: str,
    steps: int,
    how: Gradual | None = None,
    look: Callable[[Pruner], Any] = id,
    lr: float = 0.05,
) -> tuple[sec.Pruned, list[Any]]:
    """The result, and what `look` sees of the pruner after each step."""
    seen: list[Any] = []
    made = gradual_magnitude(
        small(), INPUTS, budget, options=how, data=batches(), measure=False,
        recover=sec.FineTune(steps=steps, lr=lr), on_step=lambda progress: seen.append(look(pruners[-1])),
    )  # fmt: skip
    return made, seen


def kept(pruner: Pruner) -> list[int]:
    return [int(mask.sum()) for mask in pruner.masks.values()]


def curve(step: int, begin: int, end: int, final: float = 0.9, initial: float = 0.0) -> float:
    """Equation 1, written out."""
    progress = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return final + (initial - final) * (1 - progress) ** 3


def test_masks_follow_the_curve_from_a_tenth_to_seven_tenths(pruners: list[Pruner]) -> None:
    made, seen = train(pruners, "sparsity=90%", 40, look=kept)
    wanted = [[max(round(n * (1 - curve(step, 4, 28))), 1) for n in (128, 64)] for step in range(1, 41)]
    assert seen == wanted
    assert wanted[3] == [128, 64]
    assert wanted[27] == [13, 6] == list(made.plan.counts.values())


def test_masks_shrink_only_and_stay_after_the_end(pruners: list[Pruner]) -> None:
    made, seen = train(
        pruners, "sparsity=80%", 40, look=lambda pruner: {name: mask.clone() for name, mask in pruner.masks.items()}
    )
    for earlier, later in pairwise(seen):
        assert not any((later[name] & ~earlier[name]).any() for name in later)
    for masks in seen[27:]:
        assert all(torch.equal(masks[name], made.masks[name]) for name in masks)
    assert not all(torch.equal(seen[3][name], made.masks[name]) for name in made.masks)


def test_the_end_is_met_when_updates_do_not_lead_there(pruners: list[Pruner]) -> None:
    """From step 2 to 16 every 3 steps: 2, 5, 8, 11, 14, and 16 since the sparsity asked for must be met."""
    made, seen = train(pruners, "sparsity=90%", 23, Gradual(updates=4), look=kept)
    changes = [step for step in range(2, 24) if seen[step - 1] != seen[step - 2]]
    assert changes == [5, 8, 11, 14, 16]
    assert made.plan.counts == {"0.weight": 13, "3.weight": 6}


def test_initial_sparsity_and_exponent(pruners: list[Pruner]) -> None:
    _, seen = train(pruners, "sparsity=90%", 20, Gradual(initial=0.5, exponent=1, begin=0, end=0.5), look=kept)
    line = [0.5 + 0.4 * min(step / 10, 1) for step in range(1, 21)]
    assert [counts[0] for counts in seen] == [round(128 * (1 - s)) for s in line]


def test_the_shortest_training_still_meets_its_sparsity(pruners: list[Pruner]) -> None:
    made, _ = train(pruners, "sparsity=75%", 1)
    assert made.plan.counts == {"0.weight": 32, "3.weight": 16}


@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_other_allocations_divide_the_whole(pruners: list[Pruner], allocation: str) -> None:
    made, _ = train(pruners, "sparsity=75%", 20, Gradual(allocation=allocation))
    assert sum(made.plan.counts.values()) == 48
    assert made.plan.counts != {"0.weight": 32, "3.weight": 16}
    assert made.plan.recipe.allocation == allocation


def test_blocks_go_whole(pruners: list[Pruner]) -> None:
    """24 blocks of 2 rows and 4 columns; the mean of |w| ranks them, per tensor."""
    made, _ = train(pruners, "sparsity=75%", 20, Gradual(granularity="block:2x4"))
    assert made.plan.counts == {"0.weight": 4, "3.weight": 2}
    assert [group.size for group in made.plan.groups] == [16, 8]
    for name, mask in made.masks.items():
        tiles = mask.unfold(0, 2, 2).unfold(1, 4, 4).flatten(2)
        assert torch.equal(tiles.all(-1), tiles.any(-1))
        assert torch.equal(made.plan.masks(made.model)[name], mask)


@pytest.mark.parametrize("revive", ["never", "value", "one-step"])
def test_the_fate_of_masked_weights_reaches_the_pruner(pruners: list[Pruner], revive: str) -> None:
    made, seen = train(
        pruners, "sparsity=60%", 40, Gradual(revive=revive), lr=1.0,
        look=lambda pruner: torch.cat([mask.flatten() for mask in pruner.masks.values()]),
    )  # fmt: skip
    assert any(bool((later & ~earlier).any()) for earlier, later in pairwise(seen)) == (revive != "never")
    for name, mask in made.masks.items():
        assert torch.equal(made.model.get_parameter(name) != 0, mask)


def test_only_the_scope_is_pruned() -> None:
    arguments = {"data": batches(), "recover": sec.FineTune(epochs=1), "measure": False}
    first = gradual_magnitude(small(), INPUTS, "sparsity=75%", scope="0", **arguments)
    assert set(first.masks) == {"0.weight"} == set(first.plan.counts)
    assert set(gradual_magnitude(small(), INPUTS, "sparsity=75%", ignore="0", **arguments).masks) == {"3.weight"}


def test_the_report_knows_the_training() -> None:
    model = small()
    made = gradual_magnitude(
        model, INPUTS, "sparsity=75%", data=batches(), test=batches(), recover=sec.FineTune(epochs=10, lr=0.05),
        measure=False, name="small",
    )  # fmt: skip
    assert (made.report.model, made.report.form, made.report.budget) == ("small", "mask", "sparsity=75%")
    assert list(made.report.stages) == ["pruned in training"]
    assert made.report.after.quality["accuracy"] > made.report.before.quality["accuracy"]
    # 48 weights, 20 biases, and scale and shift of 16 channels.
    assert made.report.after.nonzero == 48 + 20 + 32
    assert made.report.history is not None
    assert len(made.report.history.values) == 10
    assert set(made.report.seconds) == {"training"}


def test_a_teacher_may_take_part() -> None:
    arguments = {"data": batches(), "measure": False}
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone, taught = (
        gradual_magnitude(model, INPUTS, "sparsity=50%", recover=sec.FineTune(epochs=2, distill=distill), **arguments)
        for distill in (False, True)
    )
    assert not alone.model[0].weight.equal(taught.model[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("budget", ["macs<=50%", "2:4", "sparsity=90%,macs<=50%", "latency<=50%"])
def test_budgets_other_than_a_sparsity_are_refused(budget: str) -> None:
    with pytest.raises(BudgetError, match=r"gradual magnitude pruning needs a budget such as 'sparsity=90%', got '"):
        gradual_magnitude(small(), INPUTS, budget, data=batches(), recover=sec.FineTune(epochs=1))


def test_wrong_shares_of_the_training_are_refused() -> None:
    with pytest.raises(OptionError, match=r"Gradual: begin must come before end, got 0\.7 and 0\.3"):
        Gradual(begin=0.7, end=0.3)
    with pytest.raises(OptionError, match=r"Gradual: begin must .* got -1; end must .* got 2; updates must .* got 0"):
        Gradual(begin=-1, end=2, updates=0)
    with pytest.raises(OptionError, match=r"Gradual: granularity must be weight or block:ROWSxCOLUMNS, got 'channel'"):
        Gradual(granularity="channel")
    arguments = {"data": batches(), "recover": sec.FineTune(epochs=1)}
    with pytest.raises(OptionError, match=r"final 0\.5 is below initial 0\.8"):
        gradual_magnitude(small(), INPUTS, "sparsity=50%", options=Gradual(initial=0.8), **arguments)


class Tied(nn.Module):
    """An encoder and a decoder that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).relu())


def test_a_tied_weight_has_one_mask_and_counts_once() -> None:
    made = gradual_magnitude(
        Tied(), INPUTS, "sparsity=75%", data=batches(), recover=sec.FineTune(epochs=2), measure=False
    )
    assert made.plan.counts == {"encode.weight": 16}
    assert made.model.encode.weight is made.model.decode.weight
    assert int((made.model.decode.weight != 0).sum()) == 16
