"""PDP as a method: its three kinds of unit over a training of its own, and the contract for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateurs as sec
from secateurs.core.catalogue import get_method
from secateurs.core.errors import BudgetError, OptionError
from secateurs.methods.weights import pdp as module
from secateurs.methods.weights.pdp import Differentiable, pdp
from secateurs.train.pdp import PDP
from tests.methods import contract
from tests.methods.contract import INPUTS, Case, Check, batches, small

CASES = {
    "weights": Case("sparsity=75%", "sparsity=99.5%", Differentiable(stairs=3)),
    "hard": Case("sparsity=75%", "sparsity=99.5%", Differentiable(stairs=3, end=0.5, hard=0.6)),
    "absolute": Case("sparsity=75%", "sparsity=99.5%", Differentiable(temperature=1e-3, scale="absolute")),
    "2:4": Case("2:4", "2:4,macs<=50%", Differentiable(stairs=3)),
    "blocks": Case("sparsity=75%", "sparsity=99.5%", Differentiable(stairs=3, granularity="block:2x4")),
}
CHECKS: tuple[Check, ...] = (
    contract.infeasible_budget_is_refused, contract.asked_units_go, contract.same_seed_same_plan,
    contract.plan_survives_its_file, contract.model_is_untouched, contract.killed_run_resumes,
    contract.saved_result_is_equal, contract.zeros_are_the_masks,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_weights_keep_the_contract_too(name: str, check: Check, tmp_path: Path) -> None:
    check(get_method("pdp"), CASES[name], tmp_path)


@pytest.fixture
def pruners(monkeypatch: pytest.MonkeyPatch) -> list[PDP]:
    """The pruners that the method makes."""
    made: list[PDP] = []

    def noted(*arguments: Any, **options: Any) -> PDP:
        made.append(PDP(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(module, "PDP", noted)
    return made


def run(budget: str, steps: int, how: Differentiable | None = None, **common: Any) -> sec.Pruned:
    arguments: dict[str, Any] = {"data": batches(), "measure": False, **common}
    return pdp(small(), INPUTS, budget, recover=sec.FineTune(steps=steps, lr=0.05), options=how, **arguments)


def test_the_published_times_over_a_hundred_epochs(pruners: list[PDP]) -> None:
    """16 of 100 epochs dense, 67 stairs of one epoch, the last at 16 + 66."""
    seen: list[float] = []
    run("sparsity=75%", 100, on_step=lambda progress: seen.append(pruners[-1].scheduled))
    schedule = pruners[0].schedule
    assert (schedule.begin, schedule.every, schedule.end) == (16, 1, 82)
    assert schedule.rise == pytest.approx(0.015, abs=1e-4)
    assert seen[14] == 0
    assert seen[15] == pytest.approx(0.75 / 67)
    assert seen[80] < seen[81] == 0.75


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_the_shortest_training_still_meets_its_sparsity(steps: int) -> None:
    assert sum(run("sparsity=75%", steps).plan.counts.values()) == 48


@pytest.mark.parametrize("hard", [0.85, 1.0])
def test_masks_are_hard_when_asked(pruners: list[PDP], hard: float) -> None:
    masks: list[Any] = []
    run(
        "sparsity=75%", 40, Differentiable(hard=hard),
        on_step=lambda progress: masks.append("0.weight" in pruners[-1].state_dict()["hard"]),
    )  # fmt: skip
    assert masks == [step >= 34 and hard < 1 for step in range(1, 41)]


def test_the_temperature_reaches_the_masks(pruners: list[PDP]) -> None:
    for scale, tau in (("threshold", 0.25), ("absolute", 0.003)):
        run("sparsity=50%", 4, Differentiable(temperature=tau, scale=scale, cap=7.0))
        heat = pruners[-1]._softener.temperature
        assert (heat.value, heat.relative, heat.cap) == (tau, scale == "threshold", 7.0)


def test_every_four_inputs_keep_two() -> None:
    made = run("2:4", 12)
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in made.masks.values())
    assert set(made.masks) == {"0.weight", "3.weight"}


def test_channels_are_cut_out_and_the_report_says_so() -> None:
    made = run("sparsity=50%", 40, Differentiable(granularity="channel"), test=batches(), name="small")
    assert (made.model[0].out_features, made.model[1].num_features, made.model[3].in_features) == (8, 8, 8)
    assert (made.report.form, made.report.model) == ("cut", "small")
    assert made.report.proof is not None
    assert made.report.after.params == 8 * 8 + 8 + 16 + 8 * 4 + 4
    assert made.report.after.quality["accuracy"] > made.report.before.quality["accuracy"]
    assert made.report.stages["pruned in training"]["accuracy"] == made.report.after.quality["accuracy"]
    assert made.plan.recipe.granularity == "channel"
    assert set(made.report.seconds) == {"training", "cutting"}


def test_a_cut_may_take_the_place_of_the_model() -> None:
    model = small()
    made = pdp(
        model, INPUTS, "sparsity=50%", recover=sec.FineTune(steps=8), data=batches(), inplace=True, measure=False,
        options=Differentiable(granularity="channel"),
    )  # fmt: skip
    assert made.model is model
    assert model[0].out_features == 8
    assert model.train()(torch.ones(2, 8)).shape == (2, 4)


def test_only_the_scope_is_pruned() -> None:
    assert set(run("sparsity=75%", 6, scope="0").masks) == {"0.weight"}
    assert set(run("sparsity=75%", 6, ignore="0").masks) == {"3.weight"}
    with pytest.raises(OptionError, match="pattern 'nowhere'"):
        run("sparsity=50%", 6, Differentiable(granularity="channel"), scope="nowhere")


@pytest.mark.parametrize("budget", ["macs<=50%", "sparsity=90%,macs<=50%", "latency<=50%", "2:4,sparsity=50%"])
def test_other_budgets_are_refused(budget: str) -> None:
    with pytest.raises(BudgetError, match=r"PDP needs a budget such as 'sparsity=90%' or '2:4', got '"):
        run(budget, 4)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(OptionError, match=r"begin, end and hard must follow each other, got 0\.9, 0\.83 and 1\.0"):
        Differentiable(begin=0.9)
    with pytest.raises(OptionError, match=r"hard must follow each other, got 0\.16, 0\.83 and 0\.5; granularity must"):
        Differentiable(hard=0.5, granularity="head")
    with pytest.raises(OptionError, match=r"allocation 'erk' weighs shapes of weights, which channels have not"):
        Differentiable(granularity="channel", allocation="erk")
    with pytest.raises(BudgetError, match=r"2:4 is a pattern of single weights, so it needs granularity='weight'"):
        run("2:4", 4, Differentiable(granularity="channel"))
    with pytest.raises(OptionError, match=r"prunes while it trains: pass recover="):
        pdp(small(), INPUTS, "sparsity=50%")
