"""Every method of the catalogue keeps the contract, and each check of the contract can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import secateurs as sec
from secateurs.core.catalogue import Method, catalogue, get_method, method
from secateurs.core.errors import OptionError
from secateurs.methods.channels.rethinking_value import Arm, Verdict
from secateurs.pruning import Pruned
from tests.methods import contract
from tests.methods.contract import CASES, Case, Check, case_of, checks_of, small

ALL = [
    pytest.param(record, check, id=f"{record.name}-{check.__name__}")
    for record in catalogue()
    for check in checks_of(record)
    if case_of(record)
]


@pytest.mark.parametrize(("record", "check"), ALL)
def test_contract(record: Method, check: Check, tmp_path: Path) -> None:
    check(record, case_of(record), tmp_path)


def test_every_case_is_of_a_method() -> None:
    assert set(CASES) == {record.name for record in catalogue()}


def test_a_method_without_a_case_breaks_the_collection() -> None:
    with pytest.raises(LookupError, match=r"method 'unheard-of' has no case in tests/methods/contract\.py: add"):
        case_of(replace(get_method("random-pruning"), name="unheard-of"))


def test_names_are_given_once_and_found() -> None:
    with pytest.raises(OptionError, match=r"method 'random-pruning' is already in the catalogue, by secateurs\.meth"):
        method(replace(get_method("global-magnitude"), name="random-pruning"))
    with pytest.raises(OptionError, match="unknown method 'gradual'; the nearest are gradual-magnitude"):
        get_method("gradual")


# -- the checks themselves ---------------------------------------------------------------------------------------------

CASE = Case("sparsity=50%", "sparsity=99.5%")


def channels(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    """A method that cuts: not in the catalogue, so that the checks for coupled units are seen at work."""
    common.pop("options")
    return sec.prune(model, inputs, budget, floor=1, **common)


CHANNELS = Method("channels", "", "", ("channel",), ("after training",), "", channels)


@pytest.mark.parametrize("check", [c for c in checks_of(CHANNELS) if c is not contract.record_is_complete])
def test_a_method_that_cuts_keeps_the_contract(check: Check, tmp_path: Path) -> None:
    check(CHANNELS, CASE, tmp_path)


def broken(**changes: Any) -> Method:
    return replace(get_method("random-pruning"), **changes)


def prune(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    common.pop("options")
    return sec.prune(model, inputs, budget, granularity="weight", **common)


def reads(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    list(common["data"])
    return prune(model, inputs, budget, **common)


def removes_one_too_few(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    made = prune(model, inputs, budget, **common)
    mask = made.plan.keep["0.weight"]
    mask[int((~mask).nonzero()[0])] = True
    return made


def forgets_its_seed(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    return prune(model, inputs, budget, criterion="random", **{**common, "seed": int(torch.randint(10**6, ()))})


def moves_the_model(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    made = prune(model, inputs, budget, **common)
    with torch.no_grad():
        model[0].bias += 1
    return made


def leaves_a_hook(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    model[0].register_forward_hook(lambda module, args, output: None)
    return prune(model, inputs, budget, **common)


def trains_on_another_seed_each_time(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    made = prune(model, inputs, budget, **common)
    with torch.no_grad():
        made.model[0].bias += torch.rand(())
    return made


def begins_anew(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    return prune(model, inputs, budget, **{**common, "checkpoint": None})


def zeroes_more(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    made = prune(model, inputs, budget, **common)
    with torch.no_grad():
        made.model[0].weight[0] = 0
    return made


def repairs_anything(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    for parameter in model.parameters():
        parameter.data.nan_to_num_(0, 0, 0)
    return prune(model, inputs, budget, **common)


def takes_any_budget(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    return prune(model, inputs, "sparsity=50%" if "99" in budget else budget, **common)


def takes_no_data(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    return prune(model, inputs, budget, **{**common, "data": None})


def saves_another(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    made = prune(model, inputs, budget, **common)

    class Careless(Pruned):
        def save(self, folder: Any) -> Path:
            return Pruned(small(), self.plan, self.report, self.masks).save(folder)

    return Careless(made.model, made.plan, made.report, made.masks)


def forgets_its_scores(model: Any, inputs: Any, budget: Any, **common: Any) -> Pruned:
    made = prune(model, inputs, budget, **common)
    return replace(made, plan=replace(made.plan, scores=_Drifting(made.plan.scores)))


class _Drifting(dict[str, torch.Tensor]):
    """Scores that are others each time they are asked for."""

    def items(self) -> Any:
        return [(name, scores + torch.rand(())) for name, scores in super().items()]


def draws(build: Any, inputs: Any, budget: Any, **common: Any) -> Verdict:
    return Verdict((Arm("dense", (float(torch.rand(())),)),))


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (broken(name="random"), contract.record_is_complete),
        (broken(claim=""), contract.record_is_complete),
        (broken(when=("on Sundays",)), contract.record_is_complete),
        (broken(units=()), contract.record_is_complete),
        (broken(needs=("luck",)), contract.record_is_complete),
        (broken(run=reads), contract.data_is_not_read),
        (broken(run=removes_one_too_few), contract.asked_units_go),
        (broken(run=forgets_its_seed), contract.same_seed_same_plan),
        (broken(run=trains_on_another_seed_each_time), contract.same_seed_same_plan),
        (broken(run=forgets_its_scores), contract.plan_survives_its_file),
        (broken(run=moves_the_model), contract.model_is_untouched),
        (broken(run=leaves_a_hook), contract.model_is_untouched),
        (broken(run=begins_anew), contract.killed_run_resumes),
        (broken(run=trains_on_another_seed_each_time), contract.killed_run_resumes),
        (broken(run=zeroes_more), contract.zeros_are_the_masks),
        (broken(run=prune), contract.mask_and_cut_agree),
        (broken(run=saves_another), contract.saved_result_is_equal),
        (broken(run=draws, needs=("builder",)), contract.same_seeds_same_verdict),
        (broken(run=repairs_anything), contract.broken_weights_are_refused),
        (broken(run=takes_any_budget), contract.infeasible_budget_is_refused),
        (broken(run=takes_no_data), contract.empty_data_is_refused),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.run.__name__,
)
def test_each_check_can_fail(faulty: Method, check: Check, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, sec.SecateursError)):
        check(faulty, CASE, tmp_path)


@dataclass(frozen=True)
class Credulous:
    """Hyperparameters of which one has no rule."""

    strength: float = 1.0


def credulous(model: Any, inputs: Any, budget: Any, *, options: Credulous | None = None) -> None:
    """Takes anything."""


def test_a_parameter_without_a_rule_is_seen(tmp_path: Path) -> None:
    record = broken(run=credulous)
    assert contract.hyperparameters_refuse_nonsense in set(checks_of(record))
    with pytest.raises(AssertionError):
        contract.hyperparameters_refuse_nonsense(record, CASE, tmp_path)


def chosen(**changes: Any) -> Iterator[str]:
    return (check.__name__ for check in checks_of(broken(**changes)))


def test_checks_follow_the_record() -> None:
    assert {"data_is_not_read", "zeros_are_the_masks"} <= set(chosen())
    assert "empty_data_is_refused" in chosen(needs=("data",))
    assert "mask_and_cut_agree" in chosen(units=("channel",))
    assert "killed_run_resumes" not in chosen(needs=("builder",))
