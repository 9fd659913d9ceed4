"""Three regimes: the rule, what cells and results say, the climb, and each of the case studies on a small network."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.errors import BudgetError, DataError, OptionError
from secateurs.measure.connectivity import connect, error_on
from secateurs.methods.weights import three_regime as module
from secateurs.methods.weights.three_regime import (
    PAPER_SETTINGS,
    Cell,
    Family,
    Grid,
    Ladder,
    Sweep,
    advise_family,
    advise_ladder,
    advise_temperature,
    climb,
    regime,
    three_regime,
    train_dense,
)
from secateurs.recover import fine_tune, recalibrate_batch_norm
from secateurs.recover.copies import passes_from
from secateurs.train import SAM

X = torch.zeros(2, 4)
TINY = Grid(settings=(2, 4), epochs=4, retrain_epochs=2, copies=2, seeds=(0,), last=1, lr=0.05, retrain_lr=0.05)


def build(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 4, generator=generator) for _ in range(5)]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def cell(name: str, mc: float, cka: float, error: float = 0.1, dense: float = 0.05, training: float = 0.0) -> Cell:
    return Cell(name, "sparsity=95%", 0.05, (mc,), (cka,), (error,), (training,), (dense,))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mc", "cka", "expected"),
    [(-0.3, 0.9, "I"), (0.0, 0.95, "II-A"), (0.0, 0.995, "II-B"), (-0.02, 0.98, "II-B"), (-0.0201, 0.999, "I")],
)
def test_regimes(mc: float, cka: float, expected: str) -> None:
    assert regime(mc, cka) == expected


@given(mc=st.floats(-1, 1), cka=st.floats(0, 1), up=st.floats(0, 1), more=st.floats(0, 1))
def test_regimes_are_monotone(mc: float, cka: float, up: float, more: float) -> None:
    order = ("I", "II-A", "II-B")
    assert order.index(regime(mc + up, cka + more)) >= order.index(regime(mc, cka))


def test_the_recorded_table_of_the_paper_gets_its_regimes() -> None:
    recorded = {(-0.5, 0.90): "raise", (-0.05, 0.955): "lower", (0.0, 0.985): "keep"}
    found = {key: replace(cell("", *key), delta=0.1).advice for key in recorded}
    assert found == recorded


@pytest.mark.parametrize("wrong", [(float("nan"), 0.9), (0.0, float("inf"))])
def test_figures_must_be_finite(wrong: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="a regime needs finite figures"):
        regime(*wrong)


# -- results -----------------------------------------------------------------------------------------------------------


def test_a_cell_is_a_plain_sentence() -> None:
    assert str(cell("epochs 40", -0.032, 0.9512, 0.123, 0.031)) == (
        "epochs 40 at density 5.0%: mc -0.0320, CKA 0.9512, test error 12.30% (dense 3.10%). Regime I, poorly "
        "connected: raise the temperature of dense training (fewer epochs, smaller batches, a larger learning rate or "
        "a larger SAM radius)."
    )
    assert str(cell("m", 0, 0.999, training=0.6)).endswith(
        "The copies are wrong on 60% of their training data, so likeness says little."
    )


def test_cells_of_several_seeds_are_one() -> None:
    both = Cell.merged([cell("a", -0.1, 0.9, 0.2), cell("a", 0.0, 1.0, 0.4)])
    assert (both.mc, both.cka, both.error) == pytest.approx((-0.05, 0.95, 0.3))
    assert len(both.dense_errors) == 2


def test_a_sweep_is_normalised_at_each_load() -> None:
    hot, cold = cell("hot", 0, 0.99, 0.2), cell("cold", -0.1, 0.9, 0.25)
    other = replace(cell("hot", 0, 0.99, 0.01), budget="sparsity=50%")
    sweep = Sweep("epochs", (hot, cold, other))
    assert [sweep.normalised(c) for c in sweep.cells] == pytest.approx([0, 0.05, 0])
    lines = str(sweep).splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["dense", "training", "density"]
    assert lines[2].split() == ["cold", "5.0%", "-0.1000", "0.9000", "25.00%", "5.00%", "5.00%", "I", "raise"]
    assert json.loads(json.dumps(sweep.to_dict()))["cells"][1]["above_best"] == pytest.approx(0.05)


def test_a_family_is_ranked_and_rules_have_regrets() -> None:
    cells = [cell("torn", -0.5, 0.999, 0.3, 0.01), cell("alike", 0, 0.99, 0.1, 0.03), cell("apart", 0, 0.9, 0.15, 0.02)]
    family = Family(module.ranked(cells), {"torn": 5.0, "alike": -9.0, "apart": 1.0})
    assert [c.name for c in family.cells] == ["alike", "apart", "torn"]
    assert {rule: c.name for rule, c in family.choices.items()} == {
        "regime": "alike", "dense accuracy": "torn", "sharpness": "apart",
    }  # fmt: skip
    assert family.regrets == pytest.approx({"regime": 0, "dense accuracy": 0.2, "sharpness": 0.05})
    assert str(family).splitlines()[-1] == (
        "Prune alike. Test error above the best of the family: by regime: alike, 0.00%; by dense accuracy: torn, "
        "20.00%; by sharpness: apart, 5.00%."
    )
    assert json.loads(json.dumps(family.to_dict()))["rules"]["sharpness"]["chosen"] == "apart"


def test_of_equally_alike_models_training_error_decides_and_then_the_order() -> None:
    cells = [cell("a", 0, 0.99, training=0.2), cell("b", 0, 0.99, training=0.1), cell("c", 0, 0.99, training=0.1)]
    assert [c.name for c in module.ranked(cells)] == ["b", "c", "a"]


# -- the climb ---------------------------------------------------------------------------------------------------------

TABLE = {1: (-0.3, 0.9), 2: (-0.1, 0.9), 3: (0.0, 0.99), 4: (0.0, 0.95), 5: (0.0, 0.9)}


@pytest.mark.parametrize(("start", "way"), [(1, "123"), (5, "543"), (3, "3")])
def test_advice_is_followed_until_it_is_to_keep(start: int, way: str) -> None:
    assert "".join(c.name for c in climb(range(1, 6), start, lambda s: cell(str(s), *TABLE[s]))) == way


def test_a_climb_ends_where_it_turns_back_or_the_ladder_does() -> None:
    def between(setting: float) -> Cell:
        return cell(str(setting), *((-0.1, 0.999) if setting < 3 else (0, 0.9)))

    assert [c.name for c in climb((1, 2, 3, 4), 1, between)] == ["1", "2", "3"]
    assert Ladder("lr", (climb((1, 2, 3, 4), 1, between),)).chosen[0].name == "3"
    assert [c.name for c in climb((1, 2), 1, lambda s: cell(str(s), -1, 0))] == ["1", "2"]


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_the_sweep_goes_from_cold_to_hot_and_tells_each_cell() -> None:
    told: list[Cell] = []
    loads = ["sparsity=50%", "sparsity=80%"]
    found = three_regime(build, X, loads, data=batches(), test=batches(), options=TINY, on_cell=told.append)
    assert [(c.name, c.budget) for c in found.cells] == [(f"epochs {e}", b) for e in (4, 2) for b in loads]
    assert tuple(told) == found.cells
    assert [round(c.density, 2) for c in found.cells[:2]] == [0.5, 0.2]
    assert all(len(c.mcs) == len(c.ckas) == 1 and len(c.errors) == 2 for c in found.cells)


def test_all_pairs_of_copies_and_all_seeds_count() -> None:
    how = replace(TINY, copies=3, seeds=(0, 1), settings=(2,), retrain_epochs=1)
    (found,) = three_regime(build, X, "sparsity=50%", data=batches(), test=batches(), options=how).cells
    assert (len(found.mcs), len(found.errors), len(found.dense_errors)) == (6, 6, 2)


def test_the_same_parent_connects_better_than_two_strangers() -> None:
    how = replace(TINY, epochs=40, retrain_epochs=8)
    parents = [train_dense(build, batches(), 40, how, seed) for seed in (0, 1)]
    one = advise_temperature(parents[0], X, "sparsity=50%", data=batches(), test=batches(), options=how)
    strangers = connect(
        parents[0], *parents, error_on(batches()),
        prepare=lambda model: recalibrate_batch_norm(model, batches(), by_size=True),
    )  # fmt: skip
    assert strangers.mc < -0.05
    assert strangers.mc < one.mc


def test_one_model_is_advised_and_stays() -> None:
    model = build(0)
    before = copy.deepcopy(model)
    found = advise_temperature(model, X, "sparsity=50%", data=batches(), test=batches(), options=TINY, name="mine")
    assert (found.name, found.density) == ("mine", 0.5)
    assert equal(model, before)


def test_channels_can_be_what_goes() -> None:
    found = advise_temperature(
        build(0), X, "macs<=50%", data=batches(), test=batches(), options=TINY, granularity="channel"
    )
    assert 0.3 < found.density < 0.7


def test_a_family_of_models() -> None:
    models = {"short": train_dense(build, batches(), 2, TINY, 0), "long": train_dense(build, batches(), 4, TINY, 0)}
    common: dict[str, Any] = {"data": batches(), "test": batches(), "options": TINY}
    found = advise_family(models, X, "sparsity=80%", by_sharpness=True, **common)
    assert {c.name for c in found.cells} == set(models) == set(found.sharpness)
    assert set(found.regrets) == {"regime", "dense accuracy", "sharpness"}
    with pytest.raises(OptionError, match="at least two models, got 1"):
        advise_family({"a": build(0)}, X, "sparsity=80%", **common)


def test_a_ladder_trains_each_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[float] = []

    def spy(build: Any, data: Any, setting: float, how: Grid, seed: int) -> nn.Module:
        trained.append(setting)
        return train_dense(build, data, setting, how, seed)

    monkeypatch.setattr(module, "train_dense", spy)
    how = replace(TINY, knob="sam-rho", settings=(0.0, 0.1, 0.5))
    common: dict[str, Any] = {"data": batches(), "test": batches(), "options": how}
    found = advise_ladder(build, X, ["sparsity=50%", "sparsity=80%"], **common)
    assert len(found.climbs) == len(found.chosen) == 2
    assert found.climbs[0][0].name == found.climbs[1][0].name == "sam-rho 0.1"
    assert len(trained) == len(set(trained))
    assert found.sentence.startswith("At density 50.0%: sam-rho ")
    assert json.dumps(found.to_dict())
    with pytest.raises(OptionError, match=r"start must be one of the settings \(0\.0, 0\.1, 0\.5\), got 0\.2"):
        advise_ladder(build, X, "sparsity=50%", start=0.2, **common)


# -- dense training ----------------------------------------------------------------------------------------------------


def test_fewer_epochs_are_the_full_run_stopped_early() -> None:
    whole, stages = build(0), {}

    def keep(done: int) -> None:
        stages[done] = copy.deepcopy(whole)

    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 1e-4, "schedule": "step", "seed": 0}
    fine_tune(whole, passes_from(batches(), 0, keep), epochs=4, **options)
    for epochs in (2, 3):
        made = train_dense(build, batches(), epochs, TINY, 0)
        for value, expected in zip(made.state_dict().values(), stages[epochs].state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected)


def test_every_knob_turns_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "fine_tune", lambda model, data, **options: calls.append({"data": data, **options}))
    for knob, setting in (("lr", 0.3), ("sam-rho", 0.2), ("batch-size", 32)):
        train_dense(build, batches(), setting, replace(TINY, knob=knob, settings=(setting,)), 0)
    hot, sharp, small = calls
    assert (hot["lr"], hot["epochs"]) == (0.3, 4)
    assert (sharp["lr"], sharp["sam"]) == (0.05, SAM(0.2))
    assert (small["epochs"], small["steps"]) == (None, 20)
    assert [len(x) for x, _ in small["data"](0)] == [32, 32]


def test_hot_is_last_on_every_ladder() -> None:
    assert Grid(settings=(10, 160, 40, 40)).ladder == (160, 40, 10)
    assert Grid(knob="batch-size", settings=(16, 512)).ladder == (512, 16)
    assert Grid(knob="sam-rho", settings=(0.5, 0.1)).ladder == (0.1, 0.5)
    for knob, settings in PAPER_SETTINGS.items():
        assert Grid(knob=knob, settings=settings).ladder == settings


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"settings": (200,)}, "whole positive numbers of at most 160, got"),
        ({"settings": (1.5,)}, "settings of epochs must be whole"),
        ({"settings": (0.5,), "knob": "batch-size"}, "settings of batch-size must be whole positive numbers, got"),
        ({"settings": (0,), "knob": "lr"}, "settings of lr must be positive numbers, got"),
        ({"copies": 1}, "copies must be a whole number of at least 2"),
    ],
)
def test_settings_that_a_knob_has_not(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Grid(**wrong)


def test_bad_runs_end_before_training_or_say_where() -> None:
    never: Any = lambda *_: pytest.fail("trained")  # noqa: E731
    with pytest.raises(BudgetError):
        three_regime(build, X, ["sparsity=50%", "macs<=0.1%"], data=batches(), test=batches(), options=TINY)
    with pytest.raises(DataError, match="test data is empty"):
        three_regime(never, X, "sparsity=50%", data=batches(), test=[], options=TINY)
    dead = build(0)
    nn.init.zeros_(dead[3].weight)
    how = replace(TINY, retrain_lr=1e-30)
    with pytest.raises(DataError, match=r"the model at sparsity=50%: the outputs .* are the same for all samples, so"):
        advise_temperature(dead, X, "sparsity=50%", data=batches(), test=batches(), options=how)
