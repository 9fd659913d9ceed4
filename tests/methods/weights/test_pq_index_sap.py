"""SAP as a method: rounds that follow the index, end at the budget, and are lottery tickets with a fixed share."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError, OptionError
from secateurs.core.pool import Per, pools
from secateurs.core.pq import adaptive_keep
from secateurs.methods.weights import pq_index_sap as module
from secateurs.methods.weights.pq_index_sap import Sap, next_masks, pq_index_sap
from secateurs.recover.finetune import fine_tune
from secateurs.recover.tickets import Round
from tests.methods.contract import INPUTS, batches, small

Decision = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor] | None]


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """What the rule saw and said in every round: trained weights, their masks, the next masks."""
    found: list[Decision] = []
    original = module.next_masks

    def noted(weights: Any, masks: Any, *arguments: Any, **options: Any) -> Any:
        chosen = original(weights, masks, *arguments, **options)
        found.append(({name: weight.clone() for name, weight in weights.items()}, masks, chosen))
        return chosen

    monkeypatch.setattr(module, "next_masks", noted)
    return found


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], Round]]:
    """The weights with which each training begins, and the round."""
    found: list[Any] = []
    original = sec.FineTune.run

    def noted(self: sec.FineTune, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        found.append(({name: value.clone() for name, value in model.state_dict().items()}, options["masks"]))
        return original(self, model, *arguments, **options)

    monkeypatch.setattr(sec.FineTune, "run", noted)
    return found


def train(budget: str, how: Sap | None = None, model: nn.Module | None = None, **common: Any) -> sec.Pruned:
    arguments: dict[str, Any] = {"data": batches(), "measure": False, "recover": sec.FineTune(epochs=2, lr=0.05)}
    return pq_index_sap(model or small(), INPUTS, budget, options=how, **{**arguments, **common})


def left(masks: dict[str, Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


# -- one round ---------------------------------------------------------------------------------------------------------


def ones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def test_one_to_four_lose_nothing_and_equal_weights_neither() -> None:
    weights = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.full((3, 3), 0.7)}
    for how in (Sap(1.0, 2.0), Sap(gamma=0.0)):
        assert left(next_masks(weights, ones(weights), how) or {}) == [4, 9]
    assert left(next_masks(weights, ones(weights), Sap(1.0, 2.0, gamma=1e6)) or {}) == [4, 9]


def test_much_boldness_leaves_a_tenth_of_every_pool() -> None:
    weights = {"a": torch.arange(1.0, 31).view(5, 6) ** 2, "b": torch.arange(1.0, 101).view(10, 10)}
    chosen = next_masks(weights, ones(weights), Sap(gamma=1e6))
    assert chosen is not None
    assert left(chosen) == [3, 10]
    assert chosen["b"][9].all()


@pytest.mark.parametrize(("pair", "kept"), [((0.5, 1.0), 0.8472), ((1.0, 2.0), 2 / math.pi)])
def test_what_stays_of_normal_weights(pair: tuple[float, float], kept: float) -> None:
    weights = {"a": torch.randn(1000, 500, generator=torch.Generator().manual_seed(0))}
    for per in ("layer", "model"):
        chosen = next_masks(weights, ones(weights), Sap(*pair, per=per))
        assert chosen is not None
        assert left(chosen)[0] / 500_000 == pytest.approx(kept, abs=2e-3)


@pytest.mark.parametrize("per", ["model", "layer", "neuron"])
def test_each_pool_loses_by_its_own_index_of_what_is_left(per: Per) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) ** 3 for name, shape in (("a", (4, 9)), ("b", (3, 2, 8)))}
    masks = {name: torch.rand(weight.shape, generator=generator) > 0.3 for name, weight in weights.items()}
    chosen = next_masks(weights, masks, Sap(per=per))
    assert chosen is not None
    for name, rows in pools(chosen, per).items():
        values, before = pools(weights, per)[name], pools(masks, per)[name]
        alone = [int(adaptive_keep(row[alive])) for row, alive in zip(values, before, strict=True)]
        assert rows.sum(1).tolist() == alone
        assert sum(alone) < int(before.sum())


def test_a_budget_stops_the_round_that_would_go_beyond_it() -> None:
    weights = {"a": torch.arange(1.0, 101).view(10, 10)}
    free = next_masks(weights, ones(weights), Sap())
    assert free is not None
    (stay,) = left(free)
    for total in (stay - 1, stay):
        assert left(next_masks(weights, ones(weights), Sap(), total) or {}) == [stay]
    assert left(next_masks(weights, ones(weights), Sap(), stay + 1) or {}) == [stay + 1]
    assert left(next_masks(weights, ones(weights), Sap(), 10, last=True) or {}) == [10]
    assert left(next_masks(weights, ones(weights), Sap(gamma=0.0), 10) or {}) == [10]
    assert next_masks(weights, ones(weights), Sap(), 100) is None


# -- the rounds --------------------------------------------------------------------------------------------------------


def test_every_round_goes_back_and_takes_what_the_index_says(decisions: list[Decision], rounds: list[Any]) -> None:
    model = small()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    made = train("sparsity=50%", Sap(), model)
    assert len(rounds) == len(decisions) > 3
    for (state, masks), (_, same, _) in zip(rounds, decisions, strict=True):
        for name, value in first.items():
            assert torch.equal(state[name], value * masks[name] if name in masks else value)
        assert left(masks) == left(same)
    for weights, masks, chosen in decisions[:-2]:
        assert chosen is not None
        assert left(chosen) == [int(adaptive_keep(weights[name][mask])) for name, mask in masks.items()]
        assert not any(bool((chosen[name] & ~masks[name]).any()) for name in masks)
    assert decisions[-1][2] is None
    assert sum(left(made.masks)) == 96 == sum(made.plan.counts.values())
    # What is left holds the larger magnitudes.
    weights, masks, chosen = decisions[0]
    assert chosen is not None
    gone = weights["0.weight"][masks["0.weight"] & ~chosen["0.weight"]].abs()
    assert float(gone.max()) <= float(weights["0.weight"][chosen["0.weight"]].abs().min())


def test_the_result_was_trained_under_its_masks_from_the_first_weights() -> None:
    model = small()
    made = train("sparsity=50%", Sap(rounds=2), model)
    alone = small()
    fine_tune(alone, batches(), epochs=2, lr=0.05, weight_decay=5e-4, masks=made.masks)
    assert all(torch.equal(value, made.model.state_dict()[name]) for name, value in alone.state_dict().items())


def test_a_fixed_share_is_iterative_magnitude_pruning(decisions: list[Decision]) -> None:
    """Per tensor a fifth of what is left goes: 128 → 103 → 83 and 64 → 52 → 42; of 125 the budget leaves 115."""
    made = train("sparsity=40%", Sap(fixed_share=0.2))
    assert [left(masks) for _, masks, _ in decisions[:3]] == [[128, 64], [103, 52], [83, 42]]
    for weights, masks, chosen in decisions[:2]:
        assert chosen is not None
        for name, mask in masks.items():
            order = weights[name].abs().masked_fill(~mask, -1).flatten().argsort(descending=True, stable=True)
            stay = int(mask.sum()) - math.floor(0.2 * int(mask.sum()))
            assert set(order[:stay].tolist()) == set(chosen[name].flatten().nonzero().flatten().tolist())
    assert sum(left(made.masks)) == 115
    assert made.plan.recipe.allocation == "uniform"


def test_the_last_round_takes_the_rest(decisions: list[Decision]) -> None:
    made = train("sparsity=90%", Sap(rounds=2))
    assert len(decisions) == 3
    assert sum(left(decisions[1][1])) > 96
    assert sum(left(made.masks)) == 19


def test_where_the_index_takes_nothing_the_budget_is_met_at_once(decisions: list[Decision]) -> None:
    made = train("sparsity=75%", Sap(gamma=0.0))
    assert [left(masks) for _, masks, _ in decisions] == [[128, 64], [32, 16]]
    assert made.plan.counts == {"0.weight": 32, "3.weight": 16}


def test_nothing_asked_is_one_training(rounds: list[Any]) -> None:
    made = train("sparsity=0%")
    assert len(rounds) == 1
    assert made.plan.counts == {"0.weight": 128, "3.weight": 64}


def test_training_may_go_on_instead(rounds: list[Any], decisions: list[Decision]) -> None:
    train("sparsity=50%", Sap(rounds=3, rewind="none"))
    for (state, _), (trained, _, _) in zip(rounds[1:], decisions, strict=False):
        assert all(torch.equal(state[name], trained[name]) for name in trained)
    assert len(rounds) == 4


@pytest.mark.parametrize(
    ("per", "share", "rule"),
    [("model", 0, "global"), ("layer", 0, "pq-index"), ("neuron", 0, "pq-index"), ("layer", 0.3, "uniform")],
)
def test_the_plan_can_be_given_another_budget(per: Per, share: float, rule: str) -> None:
    made = train("sparsity=60%", Sap(rounds=2, per=per, fixed_share=share))
    assert made.plan.recipe.allocation == rule
    assert sum(left(made.masks)) == 77
    assert sum(made.plan.rebudget("sparsity=80%").counts.values()) == 38


class Killed(Exception):
    """What stops a run."""


@pytest.mark.parametrize("rewind", ["weights", "none"])
def test_a_run_killed_in_a_later_round_goes_on_there(rewind: Any, tmp_path: Path) -> None:
    how = Sap(rounds=3, rewind=rewind)
    steps: list[int] = []

    def killing(progress: Any) -> None:
        steps.append(progress.step)
        if len(steps) == 22:
            raise Killed

    whole = train("sparsity=60%", how)
    with pytest.raises(Killed):
        train("sparsity=60%", how, checkpoint=tmp_path, on_step=killing)
    # Two passes of four batches a round: the run ends in the second pass of the third training.
    assert steps == [*range(1, 9), *range(1, 9), *range(1, 7)]
    steps.clear()
    resumed = train("sparsity=60%", how, checkpoint=tmp_path, on_step=lambda progress: steps.append(progress.step))
    assert steps == [*range(5, 9), *range(1, 9)]
    assert resumed.plan.same_as(whole.plan)
    assert resumed.report.history == whole.report.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_only_the_scope_is_pruned() -> None:
    assert set(train("sparsity=75%", Sap(rounds=1), scope="0").masks) == {"0.weight"}
    assert set(train("sparsity=75%", Sap(rounds=1), ignore="0").masks) == {"3.weight"}


def test_the_report_has_every_round() -> None:
    made = train("sparsity=60%", Sap(rounds=3), test=batches(), name="small")
    stages = list(made.report.stages)
    assert stages[0] == "round 0, 100.0% left"
    assert stages[-1] == "round 3, 40.1% left"
    shares = [float(stage.split(", ")[1].split("%")[0]) for stage in stages]
    assert all(later < earlier for earlier, later in pairwise(shares))
    assert made.report.history is not None
    assert len(made.report.history.values) == 2 * len(stages)
    assert set(made.report.seconds) == {"training"}
    assert made.report.after.params == made.report.before.params
    assert sum(left(made.masks)) == 77


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["macs<=50%", "2:4", "sparsity=90%,macs<=50%"])
def test_budgets_other_than_a_sparsity_are_refused(budget: str) -> None:
    with pytest.raises(BudgetError, match=r"SAP needs a budget such as 'sparsity=90%', got '"):
        train(budget)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(OptionError, match=r"must follow 0 < p < q, got p = 2\.0 and q = 1\.0"):
        Sap(p=2.0)
    with pytest.raises(
        OptionError, match=r"Sap: p must be a number above 0, got 0; beta must .* got 1; per must be one"
    ):
        Sap(p=0, beta=1, per="channel")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="prunes while it trains: pass recover="):
        train("sparsity=50%", recover=None)
