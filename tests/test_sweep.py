"""Many decisions from one scoring."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs import planning, sweep
from secateurs.core.errors import BudgetError, OptionError
from secateurs.planning import plan
from secateurs.recover.batchnorm import recalibrate_batch_norm
from secateurs.sweep import front, sensitivity

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)
    )
    # Weights that tell the inputs apart: no class wins everywhere.
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


# What the unpruned network says is right.
LABELS = net().eval()(X).argmax(1)
TEST = [(X[:20], LABELS[:20]), (X[20:], LABELS[20:])]


def accuracy(model: nn.Module) -> float:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return float(torch.cat([(model(x).argmax(1) == y).float() for x, y in TEST]).mean())


def state(model: nn.Module) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def masked(model: nn.Sequential, layer: str, scores: Tensor, count: int) -> nn.Module:
    """Units whose scores are not among the `count` largest give zero, as do the batch norm's of the same channel."""
    made = copy.deepcopy(model)
    gone = scores.argsort(descending=True)[count:]
    with torch.no_grad():
        for module in [made[int(layer)], *([made[1]] if layer == "0" else [])]:
            module.weight[gone] = 0
            module.bias[gone] = 0
    return made


def test_only_one_group_is_pruned_at_a_time() -> None:
    model = net()
    before = state(model)
    made = plan(model, X, "macs<=50%")
    curves = sensitivity(model, made, TEST, (0.0, 0.25, 0.5))
    assert set(curves) == {"0", "3"}
    for name, curve in curves.items():
        size = len(made.scores[name])
        wanted = [accuracy(masked(model, name, made.scores[name], round((1 - s) * size))) for s in (0.0, 0.25, 0.5)]
        assert [share for share, _ in curve] == [0.0, 0.25, 0.5]
        assert [value for _, value in curve] == pytest.approx(wanted)
        assert len(set(wanted)) > 1
    assert state(model) == before


def test_one_unit_always_stays() -> None:
    model = net()
    made = plan(model, X, "macs<=70%", scope="3")
    assert sensitivity(model, made, TEST, (0.99,))["3"][0][1] == pytest.approx(
        accuracy(masked(model, "3", made.scores["3"], 1))
    )


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_other_sparsities_are_refused(share: float) -> None:
    with pytest.raises(OptionError, match=r"sparsities must lie in \[0, 1\), got"):
        sensitivity(net(), plan(net(), X, "macs<=50%"), TEST, (0.5, share))


@pytest.mark.parametrize("options", [{}, {"granularity": "weight"}], ids=["cut", "mask"])
def test_each_budget_is_a_point(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = state(model)
    made = plan(model, X, "macs<=90%", **options)
    monkeypatch.setattr(planning, "score", lambda *_, **__: pytest.fail("scored again"))
    points = front(model, made, ("macs<=80%", "macs<=40%"), TEST, timed=False)
    decisions = [made.rebudget(budget) for budget in ("macs<=80%", "macs<=40%")]
    assert [(p.budget, p.macs_left, p.latency_left) for p in points] == [
        (str(d.recipe.budget), d.cost("macs"), None) for d in decisions
    ]
    assert [p.quality for p in points] == pytest.approx([accuracy(d.mask(model)) for d in decisions])
    assert points[1].macs_left <= 0.4 < points[0].macs_left <= 0.8
    assert state(model) == before


def test_statistics_are_measured_again_where_there_is_data() -> None:
    model = net()
    made = plan(model, X, "macs<=90%")
    (point,) = front(model, made, ("macs<=50%",), TEST, data=TEST, timed=False)
    smaller = made.rebudget("macs<=50%").cut(model)
    recalibrate_batch_norm(smaller, TEST)
    assert point.quality == pytest.approx(accuracy(smaller))


def test_time_is_a_share_of_the_unpruned_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = net(), []

    def compare(models: dict[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, Any]:
        assert models["before"] is model
        assert inputs["before"] is inputs["after"] is X
        widths.append(models["after"][0].out_features)
        return {"after": SimpleNamespace(speedup=SimpleNamespace(median=2.5))}

    monkeypatch.setattr(sweep, "compare", compare)
    made = plan(model, X, "macs<=90%")
    (point,) = front(model, made, ("macs<=40%",), TEST)
    assert widths == [made.rebudget("macs<=40%").counts["0"]]
    assert point.latency_left == 0.4


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    model = net()
    with pytest.raises(BudgetError, match="Nearest feasible"):
        front(model, plan(model, X, "macs<=90%"), ("macs<=80%", "macs<=0.1%"), TEST, timed=False)


def test_a_width_under_a_norm_is_tested_as_it_will_be_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3, bias=False)).eval()
    with torch.no_grad():
        # Far from 0, so that zeros among what is left move mean and variance.
        model[0].bias.add_(3)
    labels = model(X).argmax(1)
    test = [(X, labels)]
    decided = plan(model, X[:1], "sparsity=50%", granularity="width", floor=1)
    found = sensitivity(model, decided, test, (0.5,))
    smaller = decided.cut(model)
    with torch.no_grad():
        right = float((smaller(X).argmax(1) == labels).float().mean())
        zeros = float((decided.mask(model)(X).argmax(1) == labels).float().mean())
    assert found == {"0": ((0.5, pytest.approx(right)),)}
    # That zeros are something else shows that the test can fail.
    assert zeros != right
