"""A family of models: each target from the one before, shares of the first, one teacher, and runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateurs as sec
from secateurs.core.errors import OptionError
from secateurs.methods.family import TokenDistilled, family
from secateurs.methods.language.ziplm import ZipLM, ziplm
from secateurs.pruning import FineTune
from secateurs.recover.distill import Distillation
from tests.methods.contract import batches, small, state_of
from tests.methods.language.test_ziplm import FEW, counted, seconds_of, tokens
from tests.methods.language.test_ziplm import family as model_of

X = torch.ones(2, 8)
GIVEN: dict[str, Any] = {"data": batches(), "options": FEW, "measure": False, "timer": counted}


def made(budgets: list[str], **changes: Any) -> list[sec.Pruned]:
    return family(ziplm, small(), X, budgets, **{**GIVEN, **changes})


def test_speedups_are_of_the_first_model() -> None:
    found = made(["speedup>=1.2x", "speedup>=1.5x"])
    assert [seconds_of(small()) / seconds_of(one.model) for one in found] == pytest.approx([1.2, 1.5], abs=0.1)
    assert all(
        seconds_of(small()) / seconds_of(one.model) >= least for one, least in zip(found, (1.2, 1.5), strict=True)
    )
    assert found[1].plan.groups[0].size == found[0].plan.counts["0"]


@pytest.mark.parametrize("metric", ["macs", "params", "bytes"])
def test_shares_are_of_the_first_model(metric: str) -> None:
    whole = made([f"{metric}<=100%"])[0].plan.costs.total(metric)
    for one, share in zip(made([f"{metric}<=80%", f"{metric}<=50%"]), (0.8, 0.5), strict=True):
        assert one.plan.cost(metric, relative=False) <= share * whole
        assert one.plan.cost(metric, relative=False) > (share - 0.15) * whole


def test_the_teacher_is_always_the_first_model(monkeypatch: pytest.MonkeyPatch) -> None:
    teachers: list[nn.Module] = []
    usual = FineTune.run

    def run(self: FineTune, model: nn.Module, teacher: nn.Module, *rest: Any, **options: Any) -> Any:
        teachers.append(teacher)
        return usual(self, model, teacher, *rest, **options)

    monkeypatch.setattr(FineTune, "run", run)
    first = small()
    recover = FineTune(epochs=1, lr=0.01, distill=True)
    found = family(ziplm, first, X, ["macs<=80%", "macs<=50%"], recover=recover, **GIVEN)
    assert [teacher is first for teacher in teachers] == [True, True]
    assert all(one.report.history is not None for one in found)


def test_a_killed_family_goes_on_to_the_same_result(tmp_path: Path) -> None:
    budgets = ["speedup>=1.2x", "speedup>=1.5x"]
    recover = FineTune(epochs=2, lr=0.05)
    whole = made(budgets, recover=recover)
    steps: list[int] = []

    def dies(progress: Any) -> None:
        steps.append(progress.step)
        if len(steps) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(budgets, recover=recover, folder=tmp_path, on_step=dies)
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == ["1", "1-run", "2-run"]

    def slower(whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
        return 3 * seconds_of(whole), 3 * seconds_of(smaller)

    resumed = made(budgets, recover=recover, folder=tmp_path, timer=slower, on_step=lambda p: steps.append(p.step))
    assert steps[14:] == [5, 6, 7, 8]
    assert [state_of(one.model) for one in resumed] == [state_of(one.model) for one in whole]
    assert torch.equal(sec.load(tmp_path / "2").model(X), whole[1].model(X))
    with pytest.raises(OptionError, match="holds a run of another"):
        made(["speedup>=1.3x"], folder=tmp_path)


def test_token_distillation_adds_its_term_to_the_loss() -> None:
    model, x = model_of("BERT")
    given: dict[str, Any] = {"data": tokens(1), "options": ZipLM(starts=0, failures=0), "measure": False}

    def first_loss(recover: FineTune) -> float:
        history = family(ziplm, model, x, ["macs<=60%"], recover=recover, scope="*.layer.0.*", **given)[
            0
        ].report.history
        return history.values[0]["loss"]

    recover = TokenDistilled(steps=1, lr=1e-3)
    assert recover.distillation == Distillation(temperature=1.0, alpha=1.0, tokens=0.5)
    assert recover.schedule == "linear"
    logits_alone = TokenDistilled(steps=1, lr=1e-3, distillation=Distillation(1.0, 1.0))
    assert first_loss(recover) > first_loss(logits_alone) + 1e-5


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "one limit a budget.*got none"),
        (["macs<=50%", "params<=20%"], "all of one metric"),
        (["macs<=50%,params<=20%"], "one limit a budget"),
        (["macs<=50%", "macs<=100"], "in one unit"),
        (["sparsity=50%"], "one limit a budget"),
        (["macs<=50%", "macs<=50%"], "tighter than the one before; got macs<=50%, macs<=50%"),
        (["speedup>=2x", "speedup>=1.5x"], "tighter than the one before"),
    ],
)
def test_budgets_must_tighten_in_one_metric(budgets: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        made(budgets)
