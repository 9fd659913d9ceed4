"""The face: from a model and a budget to a smaller model, and what is refused on the way."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import secateurs as sec
from secateurs import planning, pruning
from secateurs.core import catalogue
from secateurs.core.errors import BudgetError, DataError, FileError, ModelError, OptionError, PlanError
from secateurs.graph.plan import ModelPlan
from secateurs.measure.params import parameters
from secateurs.methods.weights.gradual_magnitude import Gradual

X = torch.linspace(-2, 2, 24).view(3, 8)


def net(seed: int = 0) -> nn.Sequential:
    """8 → 16 → 4: a hidden unit costs 8 + 4 MACs and 8 + 1 + 2 + 4 parameters, and 4 parameters stay anyway."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, 8, generator=generator) for _ in range(count)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def prune(model: nn.Module, budget: str = "macs<=50%", **options: Any) -> sec.Pruned:
    return sec.prune(model, options.pop("inputs", X), budget, **{"measure": False, **options})


def state(model: nn.Module) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def outputs(model: nn.Module, inputs: Tensor = X) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(inputs)


# -- what happens, and what is told ------------------------------------------------------------------------------------


def test_stages_are_told_in_order() -> None:
    stages: list[str] = []
    steps: list[int] = []
    made = prune(
        net(), data=batches(), test=batches(), recover=sec.FineTune(epochs=2), name="small net",
        on_stage=stages.append, on_step=lambda progress: steps.append(progress.step),
    )  # fmt: skip
    assert stages == ["planning", "cutting", "testing", "recalibrating", "recovering", "measuring"]
    assert steps == list(range(1, 9))
    assert list(made.report.stages) == ["one-shot", "batch-norm recalibrated", "recovered"]
    assert set(made.report.seconds) >= {"planning", "cutting", "testing", "recalibrating", "recovering"}
    assert (made.report.model, made.report.form, made.report.budget) == ("small net", "cut", "macs<=50%")
    assert made.report.history is not None
    assert len(made.report.history.values) == 2


def test_only_the_stages_asked_for() -> None:
    stages: list[str] = []
    report = prune(net(), on_stage=stages.append).report
    assert stages == ["planning", "cutting", "measuring"]
    assert (dict(report.stages), report.history, report.speedup, report.model) == ({}, None, None, "Sequential")


def test_the_result_is_smaller_and_proven() -> None:
    model = net()
    before = state(model)
    made = prune(model)
    assert made.plan.counts == {"0": 8}
    assert (made.model[0].weight.shape, made.model[3].weight.shape) == ((8, 8), (4, 8))
    assert (made.report.before.macs, made.report.after.macs) == (3 * 192, 3 * 96)
    assert (made.report.before.params, made.report.after.params) == (244, 124)
    assert made.report.proof is not None
    assert made.report.proof < 1e-5
    assert made.masks == {}
    assert state(model) == before
    torch.testing.assert_close(outputs(made.model), outputs(made.plan.mask(model)))


def test_time_is_measured_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def compare(models: dict[str, nn.Module], inputs: Any) -> dict[str, Any]:
        asked.append([type(model).__name__ for model in models.values()])
        whole = SimpleNamespace(median=2.0, p10=1.0, p90=3.0, threads=1, batch=3, device="cpu", speedup=None)
        return {"before": whole, "after": SimpleNamespace(**{**vars(whole), "median": 1.0, "speedup": whole})}

    monkeypatch.setattr("secateurs.summary.compare", compare)
    monkeypatch.setattr("secateurs.summary.layer_times", lambda model, inputs: {"0": 0.5})
    report = prune(net(), measure=True).report
    assert asked == [["Sequential", "Sequential"]]
    assert report.speedup is not None
    assert (report.speedup.median, report.before.latency.median, report.after.latency.median) == (2.0, 2.0, 1.0)
    assert [row.seconds_before for row in report.layers if row.name == "0"] == [0.5]


def test_inplace_changes_the_model_that_others_hold() -> None:
    model, inner = nn.Sequential(net()), net()
    inner.load_state_dict(model[0].state_dict())
    held = model[0]
    made = prune(held, inplace=True)
    assert made.model is held
    assert model[0][0].out_features == 8
    assert state(made.model) == state(prune(inner).model)
    assert outputs(model).shape == (3, 4)


def test_inplace_with_zeros_and_with_a_method() -> None:
    for options in ({"granularity": "weight"}, {"method": "global-magnitude"}):
        model = net()
        made = prune(model, "sparsity=75%", inplace=True, **options)
        assert made.model is model
        assert sum(int((model[i].weight != 0).sum()) for i in (0, 3)) == 48


def test_quality_is_measured_and_decides_nothing() -> None:
    model, test = net(), batches()
    made = prune(model, data=batches(), test=test)

    def accuracy(tested: nn.Module) -> float:
        return float(torch.cat([(outputs(tested, x).argmax(1) == y).float() for x, y in test]).mean())

    assert made.report.before.quality["accuracy"] == pytest.approx(accuracy(model))
    assert made.report.after.quality["accuracy"] == pytest.approx(accuracy(made.model))
    assert set(made.report.after.quality) == {"accuracy", "nll", "ece"}
    assert state(made.model) == state(prune(net(), data=batches()).model)


def test_other_decisions_are_tested_from_the_same_scores() -> None:
    model, stages = net(), []
    made = prune(
        model, data=batches(), test=batches(), sensitivities=(0.0, 0.5), budgets=("macs<=75%", "macs<=50%"),
        on_stage=stages.append,
    )  # fmt: skip
    assert stages[-3:] == ["sweeping", "recalibrating", "measuring"]
    before, after = made.report.before.quality["accuracy"], made.report.stages["one-shot"]["accuracy"]
    # One group: with half of its channels gone it is the decision itself, before any repair.
    assert made.report.sensitivity == {"0": ((0.0, before), (0.5, after))}
    assert [(point.budget, point.macs_left) for point in made.report.front] == [("macs<=75%", 0.75), ("macs<=50%", 0.5)]
    assert made.report.front[1].quality == made.report.after.quality["accuracy"]
    assert state(made.model) == state(prune(model, data=batches()).model)


def test_other_decisions_need_test_data_and_one_scoring() -> None:
    with pytest.raises(OptionError, match=r"sensitivities= and budgets= are measured on test data: pass test="):
        prune(net(), budgets=("macs<=75%",))
    training = {"data": batches(), "recover": sec.FineTune(epochs=1)}
    with pytest.raises(OptionError, match=r"makes one decision: leave out sensitivities= and budgets="):
        prune(net(), "sparsity=75%", method="gradual-magnitude", sensitivities=(0.5,), **training)


# -- repair ------------------------------------------------------------------------------------------------------------


def test_batch_norm_is_measured_again_on_the_pruned_model() -> None:
    model = net().train()
    model[3].eval()
    made = prune(model, data=batches())
    hidden = torch.cat([F.linear(x, made.model[0].weight, made.model[0].bias) for x, _ in batches()]).detach()
    torch.testing.assert_close(made.model[1].running_mean, hidden.mean(0))
    assert [m.training for m in made.model] == [True, True, True, False]
    assert not made.model[1].running_mean.equal(prune(model, data=batches(), recalibrate=False).model[1].running_mean)
    assert state(prune(model, data=batches(), recalibrate=False).model) == state(prune(model).model)


def test_zeros_stay_zero_in_fine_tuning_and_the_rest_learns() -> None:
    options = {"granularity": "weight", "data": batches(), "recalibrate": False}
    before = prune(net(), "sparsity=75%", **options)
    after = prune(net(), "sparsity=75%", recover=sec.FineTune(epochs=3, lr=0.1, weight_decay=0.01), **options)
    for name, mask in before.masks.items():
        weight = after.model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert not weight.equal(before.model.get_parameter(name))
        assert not weight._post_accumulate_grad_hooks
    assert after.report.form == "mask"
    assert after.report.history.values[-1]["loss"] < after.report.history.values[0]["loss"]


def test_the_unpruned_model_teaches() -> None:
    teacher = net()
    before = state(teacher)
    alone = prune(teacher, data=batches(), recover=sec.FineTune(epochs=10, lr=0.05))
    taught = prune(teacher, data=batches(), recover=sec.FineTune(epochs=10, lr=0.05, distill=True))
    assert state(teacher) == before

    def distance(made: sec.Pruned) -> float:
        x = torch.cat([x for x, _ in batches()])
        logits = (outputs(model, x).log_softmax(1) for model in (made.model, teacher))
        return float(F.kl_div(*logits, log_target=True, reduction="batchmean"))

    assert distance(taught) < 0.5 * distance(alone)


def test_training_may_have_data_of_its_own() -> None:
    other = [(x.flip(0), y.flip(0)) for x, y in batches(2)]
    own = prune(net(), data=batches(), recalibrate=False, recover=sec.FineTune(epochs=1, data=other))
    assert own.report.history == prune(net(), recover=sec.FineTune(epochs=1, data=other)).report.history
    assert own.report.history != prune(net(), data=batches(), recover=sec.FineTune(epochs=1)).report.history
    with pytest.raises(DataError, match="pass 0 over the training data has no batch"):
        prune(net(), data=batches(), recover=sec.FineTune(epochs=1, data=[]))


def test_the_length_of_a_training() -> None:
    assert sec.FineTune(steps=7).total_steps([]) == 7
    assert sec.FineTune(epochs=3).total_steps(batches(4)) == 12
    assert sec.FineTune(epochs=3).total_steps(lambda epoch: (b for b in batches(4))) == 12
    for given in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(OptionError, match="FineTune needs epochs or steps, and not both"):
            sec.FineTune(**given)


# -- data --------------------------------------------------------------------------------------------------------------


class Counting:
    """Batches that count how often they are gone through."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(batches())


def test_data_is_read_as_often_as_needed_and_no_more() -> None:
    data = Counting()
    prune(net(), data=data, recalibrate=False)
    assert data.passes == 0
    prune(net(), data=data)
    assert data.passes == 1
    prune(net(), data=data, criterion="taylor", recalibrate=False)
    assert data.passes == 2
    prune(net(), data=data, recalibrate=False, recover=sec.FineTune(epochs=3))
    assert data.passes == 5


def test_a_generator_serves_every_stage() -> None:
    options = {"criterion": "taylor", "recover": sec.FineTune(epochs=2)}
    once = prune(net(), data=(batch for batch in batches()), **options)
    assert state(once.model) == state(prune(net(), data=batches(), **options).model)


def test_a_shuffling_loader_follows_the_seed() -> None:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)

    def made(seed: int, noise: int) -> sec.Pruned:
        model = net()
        torch.manual_seed(noise)
        return prune(model, data=loader, criterion="taylor", recover=sec.FineTune(epochs=1), seed=seed)

    first, again = made(0, 1), made(0, 2)
    assert first.plan.scores["0"].equal(again.plan.scores["0"])
    assert state(first.model) == state(again.model)
    assert state(made(0, 1).model) != state(made(1, 1).model)


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return ((x, y) for inputs, labels in batches() for x, y in zip(inputs, labels, strict=True))


def test_a_loader_without_a_length_will_do() -> None:
    loader = DataLoader(Stream(), batch_size=8)
    made, wanted = (prune(net(), data=data, criterion="taylor") for data in (loader, batches()))
    assert state(made.model) == state(wanted.model)
    assert sec.FineTune(epochs=2).total_steps(loader) == 8


@pytest.mark.parametrize("nothing", [[], (), iter(())])
def test_empty_data_is_refused(nothing: Any) -> None:
    with pytest.raises(DataError, match="the calibration data is empty: at least one batch is needed"):
        prune(net(), data=nothing)
    with pytest.raises(DataError, match="the test data is empty"):
        prune(net(), test=[])


# -- budgets -----------------------------------------------------------------------------------------------------------


def seconds_by_size(model: nn.Module, inputs: Any) -> SimpleNamespace:
    """A millisecond a parameter."""
    return SimpleNamespace(median=parameters(model) / 1000)


@pytest.mark.parametrize(
    ("budget", "kept"),
    # A unit has 15 parameters, 4 are left without any: 244 in all, 124 with 8 and 109 with 7 units.
    [("latency<=124ms", 8), ("latency<=123ms", 7), ("speedup>=2x", 7), ("latency<=50%", 7), ("latency<=1s", 16)],
)
def test_a_time_is_met_by_measuring(monkeypatch: pytest.MonkeyPatch, budget: str, kept: int) -> None:
    monkeypatch.setattr(planning, "latency", seconds_by_size)
    assert prune(net(), budget).plan.counts == {"0": kept}


def test_a_time_that_needs_measuring_is_refused_for_zeros() -> None:
    with pytest.raises(BudgetError, match=r"speedup>=2x cannot be met with weight units: zeros in a dense tensor"):
        prune(net(), "speedup>=2x", granularity="weight")
    with pytest.raises(BudgetError, match="a budget of tokens is met by token pruning"):
        prune(net(), "tokens<=25%")


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("macs<=1%", {}),
        ("params<=1%", {}),
        ("bytes<=10B", {}),
        ("sparsity=95%", {}),
        ("sparsity=50%,macs<=10%", {}),
        ("macs<=40%", {"floor": 8}),
        ("macs<=40%", {"floor": 0.5, "round_to": 4}),
        ("sparsity=99.9%", {"granularity": "weight"}),
        ("params<=1", {"granularity": "weight"}),
        ("sparsity=97%", {"granularity": "block:2x2"}),
        ("sparsity=70%", {"granularity": "weight", "allocation": "erk+", "floor": 1}),
        ("latency<=1ms", {}),
        ("speedup>=20x", {}),
    ],
)
def test_the_nearest_feasible_budget_works(
    monkeypatch: pytest.MonkeyPatch, budget: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(planning, "latency", seconds_by_size)
    with pytest.raises(BudgetError, match="Nearest feasible: '") as caught:
        prune(net(), budget, **options)
    assert caught.value.nearest is not None
    assert caught.value.nearest in str(caught.value)
    assert prune(net(), caught.value.nearest, **options).plan.sparsity > 0


def test_few_units_are_warned_about() -> None:
    """Under a twentieth of the group, and under a quarter of what the whole keeps: 2 of 128 beside a dense layer."""
    options = {"granularity": "weight", "allocation": "given", "measure": False}
    shares = {"0.weight": 0.02, "3.weight": 1.0}
    few = prune(net(), "sparsity=65.5%", allocation_options={"densities": shares}, scope=list(shares), **options)
    kept = few.plan.counts["0.weight"]
    assert few.report.warnings == (f"0.weight keeps {kept} of 128 units; give floor=, or ask for less.",)
    assert f"warning: 0.weight keeps {kept} of 128 units" in str(few.plan)
    # Everything at 3% is a sparse network, not a collapsing layer.
    assert prune(net(), "sparsity=97%", granularity="weight", allocation="uniform").report.warnings == ()


def test_another_budget_is_decided_without_scoring_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    plan = sec.plan(model, X, "macs<=50%", data=batches(), criterion="taylor")
    wanted = sec.plan(model, X, "macs<=30%", data=batches(), criterion="taylor")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(planning, "score", refuse)
    again = plan.rebudget("macs<=30%")
    assert isinstance(again, ModelPlan)
    assert again.same_as(wanted)
    assert again.recipe == wanted.recipe
    assert not again.same_as(plan)
    assert plan.recipe.budget == sec.Budget.parse("macs<=50%")
    torch.testing.assert_close(outputs(again.cut(model)), outputs(wanted.cut(model)), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="scored again"):
        sec.plan(model, X, "macs<=30%", data=batches(), criterion="taylor")


def test_a_time_is_rebudgeted_with_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "latency", seconds_by_size)
    model = net()
    plan = sec.plan(model, X, "macs<=75%")
    with pytest.raises(OptionError, match=r"latency<=124ms needs measurements"):
        plan.rebudget("latency<=124ms")
    assert plan.structure is not None
    measure = planning.timer(model, plan.structure, plan.scores, X)
    assert plan.rebudget("latency<=124ms", measure).counts == {"0": 8}


# -- units -------------------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Convolutions with 3, 8 and 8 inputs, and a classifier with 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).mean((2, 3)))


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4)])
def test_of_each_group_of_inputs_the_largest_stay(keep: int, of: int) -> None:
    model = Pixels()
    made = sec.prune(model, torch.randn(2, 3, 7, 7), f"{keep}:{of}", measure=False)
    assert set(made.masks) == {"second.weight", "last.weight"}
    for name, mask in made.masks.items():
        rows = model.get_parameter(name).detach().abs().movedim(1, -1).reshape(-1, of)
        order = rows.argsort(1, descending=True)
        wanted = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :keep], True)
        assert torch.equal(mask.movedim(1, -1).reshape(-1, of), wanted)
    assert made.model.first.weight.equal(model.first.weight)


def test_a_pattern_runs_along_the_inputs_of_a_layer_that_stores_them_first(tmp_path: Path) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight = 6, nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    made = prune(nn.Sequential(Conv1D()), "2:4")
    assert (made.model[0].weight != 0).T.reshape(-1, 4).sum(1).unique().tolist() == [2]
    back = ModelPlan.load(made.plan.save(tmp_path / "plan.safetensors"))
    assert back.groups == made.plan.groups
    assert back.rebudget("1:4").counts == {"0.weight": 12}


def test_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match=r"2:4 needs a number of inputs that 4 divides; first\.weight has 3"):
        sec.prune(Pixels(), torch.randn(2, 3, 7, 7), "2:4", measure=False, scope="first")
    with pytest.raises(BudgetError, match=r"2:4 fixes the sparsity, so it cannot be joined with macs<=50%"):
        prune(net(), "2:4,macs<=50%", granularity="weight")
    with pytest.raises(OptionError, match=r"2:4 is a pattern of single weights"):
        prune(net(), "2:4", granularity="block:2x2")


def test_blocks_go_whole() -> None:
    made = prune(net(), "sparsity=50%", granularity="block:2x4")
    # 16 and 8 blocks of 2 rows and 4 columns.
    assert sum(made.plan.counts.values()) == 12
    for mask in made.masks.values():
        tiles = mask.unfold(0, 2, 2).unfold(1, 4, 4).flatten(2)
        assert torch.equal(tiles.all(-1), tiles.any(-1))
    kept = sum(int(mask.sum()) for mask in made.masks.values())
    assert kept == 96
    assert made.report.after.nonzero == made.report.before.nonzero - 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "chanel"}, r"unknown granularity 'chanel'; the nearest are channel"),
        ({"granularity": "block:2"}, r"unknown granularity 'block:2'; the nearest are block:ROWSxCOLUMNS"),
        ({"criterion": "magnitud"}, r"unknown criterion 'magnitud'; the nearest are magnitude"),
        ({"allocation": "unifrom"}, r"unknown allocation 'unifrom'; the nearest are uniform"),
        ({"allocation": "erk"}, r"allocation 'erk' weighs the shapes of weight tensors, and a channel spans several"),
        ({"scope": "layer0"}, r"unknown pattern 'layer0'; the nearest are 0"),
        ({"ignore": "nothing*"}, r"unknown pattern 'nothing\*'"),
        ({"granularity": "weight", "scope": "9"}, r"unknown weight pattern '9'"),
        ({"criterion_options": {"power": 2}}, r"criterion 'magnitude' has no option power"),
        ({"recover": sec.FineTune(epochs=1)}, r"recover= needs training data: pass data=, or FineTune\(data=…\)"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune(net(), **options)


def test_a_criterion_without_its_data_is_refused() -> None:
    with pytest.raises(DataError, match="this needs calibration data: pass data="):
        prune(net(), criterion="taylor")


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to prune in Linear at this granularity"):
        prune(nn.Linear(8, 4))
    with pytest.raises(ModelError, match="nothing to prune in ReLU"):
        prune(nn.ReLU(), "sparsity=50%", granularity="weight")


KINDS: list[dict[str, Any]] = [
    {},
    {"granularity": "weight"},
    {"method": "global-magnitude"},
    {"method": "gradual-magnitude", "data": batches(), "recover": sec.FineTune(epochs=1)},
]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_and_named(options: dict[str, Any], value: float) -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = value
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 3\.weight: repair or reload the model"):
        prune(model, "sparsity=50%", **options)


@pytest.mark.parametrize("options", KINDS[:3])
@pytest.mark.parametrize("inputs", [torch.randn(3, 7), torch.randn(8), (X, X), {"x": X}], ids=["7", "1-D", "2", "x"])
def test_inputs_of_the_wrong_shape_are_refused(options: dict[str, Any], inputs: Any) -> None:
    with pytest.raises(ModelError, match=r"example inputs|inputs given"):
        prune(net(), "sparsity=50%", inputs=inputs, **options)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("budget", ["sparsity=100%", "sparsity=-1%", "macs=50%", "speed>2", "", "0:4"])
def test_budgets_that_cannot_be_read_are_refused(options: dict[str, Any], budget: str) -> None:
    with pytest.raises(BudgetError):
        prune(net(), budget, **options)


# -- published systems by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "spa-obspa"])
@pytest.mark.parametrize("wrap", [list, iter])
def test_example_inputs_may_come_from_the_data(method: str | None, wrap: Callable[[Any], Any]) -> None:
    wanted = prune(net(), inputs=batches()[0][0], data=batches(), method=method)
    made = sec.prune(net(), budget="macs<=50%", data=wrap(batches()), method=method, measure=False)
    assert made.plan.same_as(wanted.plan)
    assert torch.equal(made.plan.example_inputs, batches()[0][0])


def test_labels_are_no_example_inputs() -> None:
    inputs = pruning.inputs_like([{"input_ids": X, "labels": X}])
    assert list(inputs) == ["input_ids"]


def test_a_model_without_inputs_or_budget_is_refused() -> None:
    with pytest.raises(OptionError, match=r"prune needs example_inputs= to run the model on, or data="):
        sec.prune(net(), budget="macs<=50%")
    with pytest.raises(OptionError, match=r'prune needs a budget, such as budget="macs<=50%"'):
        sec.prune(net(), X)
    with pytest.raises(DataError, match="empty"):
        sec.prune(net(), budget="macs<=50%", data=[])


def test_a_method_is_asked_for_by_name() -> None:
    model = net()
    made = prune(model, "sparsity=75%", method="global-magnitude", scope="0")
    wanted = prune(model, "sparsity=75%", granularity="weight", allocation="global", scope="0")
    assert made.plan.same_as(wanted.plan)
    assert made.plan.counts == {"0.weight": 32}


def test_the_catalogue_is_opened_by_the_first_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_METHODS", {})
    monkeypatch.setattr(sec, "methods", sys.modules["secateurs.methods"], raising=False)
    for module in [name for name in sys.modules if name.startswith("secateurs.methods")]:
        monkeypatch.delitem(sys.modules, module)
    assert prune(net(), "sparsity=75%", method="random-pruning").plan.recipe.criterion == "random"


@pytest.mark.parametrize(("method", "units"), [("flap", "head and channel"), ("cfsp", "neuron")])
def test_a_pattern_is_no_budget_of_a_method_that_cuts(method: str, units: str) -> None:
    with pytest.raises(
        BudgetError, match=f"^2:4 is a pattern of single weights, and {method} removes {units} units: ask"
    ):
        prune(net(), "2:4", method=method, data=batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "global-magnitud"}, r"unknown method 'global-magnitud'; the nearest are global-magnitude"),
        (
            {"method": "rethinking-value"},
            r"rethinking-value compares trainings of a fresh network: call secateurs\.methods\.channels\.rethinking",
        ),
        (
            {"method": "random-pruning", "criterion": "taylor", "floor": 3},
            r"method 'random-pruning' leaves no choice of criterion, floor; its hyperparameters are given as options=…",
        ),
        (
            {"method": "gradual-magnitude", "options": {"until": 0.5}},
            r"the hyperparameters of gradual-magnitude are a Gradual of secateurs\.methods\.weights\.gradual_magn.*, "
            r"such as options=Gradual\(\); got \{'until': 0\.5\}\.",
        ),
        ({"method": "global-magnitude", "options": Gradual()}, r"of global-magnitude are a Global of .*got Gradual\("),
        ({"method": "gradual-magnitude", "round_to": 8}, r"leaves no choice of round_to"),
        ({"method": "gradual-magnitude"}, r"this method prunes while it trains: pass recover=FineTune"),
        (
            {"method": "gradual-magnitude", "recover": sec.FineTune(epochs=1)},
            r"recover= needs training data: pass data=, or FineTune\(data=…\)",
        ),
    ],
)
def test_what_a_method_does_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune(net(), "sparsity=50%", **options)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_result_comes_back(tmp_path: Path) -> None:
    model = net()
    made = prune(model, data=batches(), recover=sec.FineTune(epochs=1))
    assert made.save(tmp_path / "smaller") == tmp_path / "smaller"
    back = sec.load(tmp_path / "smaller")
    assert state(back.model) == state(made.model)
    assert outputs(back.model).equal(outputs(made.model))
    assert back.model[0].out_features == 8
    assert (back.masks, back.report.to_dict()) == ({}, made.report.to_dict())
    # The stored plan alone makes the same cut of the original, bit for bit.
    assert state(back.plan.cut(model)) == state(prune(model).model)
    assert "8 of 16 channels go" in str(back.plan)
    assert (tmp_path / "smaller" / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_masks_come_back(tmp_path: Path) -> None:
    made = prune(net(), "sparsity=75%", granularity="weight")
    back = sec.load(made.save(tmp_path / "sparse"))
    assert {n: m.tolist() for n, m in back.masks.items()} == {n: m.tolist() for n, m in made.masks.items()}


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "plan.safetensors", "report.json"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    folder = prune(net()).save(tmp_path / "smaller")
    file = folder / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FileError, match=rf"{name} is truncated"):
        sec.load(folder)
    file.unlink()
    with pytest.raises(FileError, match=rf"{name} is missing"):
        sec.load(folder)


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no saved model"):
        sec.load(tmp_path / "nowhere")


def wider() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 4))


@pytest.mark.parametrize(
    ("options", "apply", "message"),
    [
        ({}, ModelPlan.cut, r"another model: 0\.weight has shape \[17, 8\], the plan expects \[16, 8\]"),
        ({}, ModelPlan.mask, r"another model: 0\.weight has shape \[17, 8\], the plan expects \[16, 8\]"),
        ({"granularity": "weight"}, ModelPlan.mask, r"0\.weight has shape \[17, 8\], the plan expects \[16, 8\]"),
    ],
)
def test_the_plan_of_another_model_is_refused(
    options: dict[str, Any], apply: Callable[[ModelPlan, nn.Module], nn.Module], message: str
) -> None:
    plan = sec.plan(net(), X, "sparsity=50%", **options)
    with pytest.raises(PlanError, match=message):
        apply(plan, wider())
    with pytest.raises(PlanError, match="this plan is for another model"):
        apply(plan, nn.Linear(8, 4))
    assert apply(plan, net(7)) is not None
    with pytest.raises(PlanError, match="made from other weights of the same shapes"):
        plan.check(net(7), values=True)


def test_zeros_cannot_be_cut_out() -> None:
    plan = sec.plan(net(), X, "sparsity=50%", granularity="weight")
    with pytest.raises(PlanError, match=r"weight units are entries of a tensor and cannot be cut out of it; use plan"):
        plan.cut(net())


# -- runs that are stopped and go on -----------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill(stage: str) -> Callable[[str], None]:
    def on_stage(told: str) -> None:
        if told == stage:
            raise Killed

    return on_stage


OPTIONS: dict[str, Any] = {"data": batches(), "criterion": "taylor", "recover": sec.FineTune(epochs=2, lr=0.05)}


@pytest.mark.parametrize("stage", ["planning", "cutting", "recalibrating", "recovering", "measuring"])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, stage: str) -> None:
    whole = prune(net(), **OPTIONS)
    with pytest.raises(Killed):
        prune(net(), checkpoint=tmp_path, on_stage=kill(stage), **OPTIONS)
    resumed = prune(net(), checkpoint=tmp_path, **OPTIONS)
    assert state(resumed.model) == state(whole.model)
    assert resumed.plan.same_as(whole.plan)
    assert resumed.report.history == whole.report.history


def test_a_stored_plan_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prune(net(), checkpoint=tmp_path, **OPTIONS)
    monkeypatch.setattr(pruning, "make_plan", lambda *_, **__: pytest.fail("planned again"))
    steps: list[int] = []
    again = prune(net(), checkpoint=tmp_path, on_step=lambda progress: steps.append(progress.step), **OPTIONS)
    assert steps == []
    assert state(again.model) == state(first.model)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "macs<=40%"},
        {"model": net(1)},
        {"seed": 1},
        {"criterion": "magnitude"},
        {"ignore": "3"},
        {"floor": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"data": batches(), "criterion": "taylor"}
    prune(net(), checkpoint=tmp_path, **options)
    with pytest.raises(OptionError, match="holds a run of another model, budget or options; give another folder, or"):
        prune(**{"model": net(), "checkpoint": tmp_path, **options, **change})


@pytest.mark.parametrize(
    "change",
    [{"budget": "sparsity=50%"}, {"model": net(1)}, {"seed": 1}, {"options": Gradual(end=0.5)}, {"scope": "0"}],
    ids=lambda change: next(iter(change)),
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run = {
        "budget": "sparsity=75%",
        "method": "gradual-magnitude",
        "data": batches(),
        "recover": sec.FineTune(epochs=1),
    }
    prune(net(), checkpoint=tmp_path, **run)
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        prune(**{"model": net(), "checkpoint": tmp_path, **run, **change})
    with pytest.raises(FileError, match="is the checkpoint of another training"):
        prune(net(), checkpoint=tmp_path, **{**run, "recover": sec.FineTune(epochs=2)})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plan.safetensors", {}),
        ("recovery/training.safetensors", {}),
        ("run.safetensors", {"method": "gradual-magnitude"}),
        ("training.safetensors", {"method": "gradual-magnitude"}),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    run = {"budget": "sparsity=75%", "data": batches(), "recover": sec.FineTune(epochs=1), **options}
    prune(net(), checkpoint=tmp_path, **run)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FileError, match=rf"{name} cannot be read"):
        prune(net(), checkpoint=tmp_path, **run)


# -- what users try ----------------------------------------------------------------------------------------------------


def test_an_option_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'criteron'; the nearest are criterion"):
        prune(net(), criteron="taylor")


@pytest.mark.parametrize("recover", [True, 5, "yes"])
def test_recovery_is_a_recipe(recover: Any) -> None:
    with pytest.raises(OptionError, match=rf"takes a FineTune, such as sec\.FineTune\(epochs=10\), got {recover!r}\."):
        prune(net(), recover=recover, data=batches())


def test_of_a_wrapped_model_the_one_inside_is_pruned_and_saved(tmp_path: Path) -> None:
    model = net()
    expected = state(prune(model).model)
    cut = prune(torch.compile(nn.DataParallel(model)))
    assert type(cut.model) is nn.Sequential
    assert state(cut.model) == expected
    cut.save(tmp_path / "smaller")
    assert state(sec.load(tmp_path / "smaller").model) == expected
    wrapped = nn.DataParallel(model)
    prune(wrapped, inplace=True)
    assert state(wrapped.module) == expected


def test_a_checkpoint_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("")
    with pytest.raises(OptionError, match=r"checkpoint= is a folder, and .*run is a file; give another\."):
        prune(net(), checkpoint=file)
