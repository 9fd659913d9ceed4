"""What every method of the catalogue promises: its smallest case, and the checks that its record calls for.

`CASES` has one entry a method; `checks_of` picks checks by declared unit, time and needs. A method gets all of them by
existing, and one without a case breaks the collection of `test_contract.py`.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.budget import units_kept
from secateurs.core.catalogue import Method, Unit, When
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.graph.plan import ModelPlan
from secateurs.methods.channels.rethinking_value import Protocol
from secateurs.methods.channels.spa_obspa import Spa
from secateurs.methods.language.alps import Alps
from secateurs.methods.language.ast import Ast
from secateurs.methods.language.cfsp import Cfsp
from secateurs.methods.language.compresso import Compresso
from secateurs.methods.language.d_pruner import DPruner
from secateurs.methods.language.dsnot import DSnoT
from secateurs.methods.language.exact_obs import ExactOBS
from secateurs.methods.language.flap import Flap
from secateurs.methods.language.l_admm import LAdmm
from secateurs.methods.language.loraprune import LoraPrune
from secateurs.methods.language.pat import Pat
from secateurs.methods.language.perp import Perp
from secateurs.methods.language.ria import Ria
from secateurs.methods.language.sparsegpt import SparseGPT
from secateurs.methods.language.wanda import Wanda
from secateurs.methods.language.ziplm import ZipLM
from secateurs.methods.parameters import rules_of
from secateurs.methods.weights.global_magnitude import Global
from secateurs.methods.weights.gradual_magnitude import Gradual
from secateurs.methods.weights.granet import Neuroregeneration
from secateurs.methods.weights.pdp import Differentiable
from secateurs.methods.weights.pq_index_sap import Sap
from secateurs.methods.weights.random_pruning import Random
from secateurs.methods.weights.three_regime import Grid
from tests.criteria.models import account, unruly

__all__ = ["CASES", "Case", "Check", "batches", "case_of", "checks_of", "small"]

NEEDS = {"data", "labels", "gradients", "training", "builder"}
# Units that can be cut out of a model; the others leave zeros.
COUPLED = {"channel", "head", "layer", "neuron"}
INPUTS = torch.linspace(-2, 2, 40).view(5, 8)


@dataclass(frozen=True)
class Case:
    """The smallest case of a method on `small()`.

    Args:
        budget: that it meets.
        infeasible: a budget that it must refuse with the options below.
        options: its hyperparameters.
        trainings: how many its recovery makes, one after the other.
    """

    budget: str
    infeasible: str
    options: Any = None
    trainings: int = 1


CASES = {
    "alps": Case("sparsity=75%", "macs<=50%", Alps(iterations=30)),
    "cfsp": Case("sparsity=50%", "macs<=1%", Cfsp(compensation=True)),
    # The fine-tuning that finds the importance, and then the recovery.
    "d-pruner": Case("sparsity=75%", "macs<=50%", DPruner(epochs=3), trainings=2),
    "ast": Case("sparsity=75%", "macs<=50%", Ast(score="wanda", every=2, booster="fold", run=4)),
    "dsnot": Case("sparsity=75%", "macs<=50%", DSnoT()),
    "exact-obs": Case("sparsity=75%", "macs<=50%", ExactOBS()),
    "flap": Case("macs<=50%", "macs<=1%", Flap()),
    "l-admm": Case("sparsity=75%", "macs<=50%", LAdmm()),
    "loraprune": Case("sparsity=50%", "sparsity=95%", LoraPrune(rank=4, every=3)),
    "ria": Case("sparsity=75%", "macs<=50%", Ria(update="admm")),
    "sparsegpt": Case("sparsity=75%", "macs<=50%", SparseGPT()),
    "wanda": Case("sparsity=75%", "macs<=50%", Wanda(update="least-squares")),
    # Floors of 3 weights in both layers; a sparsity of 98% leaves 4.
    # So high a rate that twelve steps are enough for gates to close.
    "compresso": Case("sparsity=50%", "params<=2%", Compresso(rank=4, gate_lr=1.0)),
    "global-magnitude": Case("sparsity=75%", "sparsity=98%", Global(minimum=2)),
    "gradual-magnitude": Case("sparsity=75%", "macs<=50%", Gradual(updates=3)),
    "granet": Case("sparsity=75%", "macs<=50%", Neuroregeneration(updates=6)),
    # The index takes about a tenth in the first round, the second and last one the rest.
    "pq-index-sap": Case("sparsity=75%", "macs<=50%", Sap(rounds=2), trainings=3),
    "pat": Case("sparsity=50%", "macs<=1%", Pat(rank=4, operator=0.25)),
    "perp": Case("sparsity=50%", "sparsity=99.5%", Perp(rank=4)),
    "pdp": Case("sparsity=50%", "sparsity=95%", Differentiable(granularity="channel", stairs=3)),
    "random-pruning": Case("sparsity=75%", "sparsity=99.5%", Random("erk")),
    "rethinking-value": Case(
        "macs<=50%", "macs<=1%", Protocol(epochs=2, tune_epochs=1, tune_rates=(0.01,), seeds=(0, 1))
    ),
    "spa-obspa": Case("macs<=50%", "macs<=1%", Spa()),
    "three-regime": Case(
        "sparsity=75%",
        "sparsity=75%,macs<=1%",
        Grid(settings=(1, 2), epochs=2, retrain_epochs=1, copies=2, seeds=(0, 1)),
    ),
    "ziplm": Case("macs<=50%", "macs<=1%", ZipLM(starts=3, failures=3)),
}

Check = Callable[[Method, Case, Path], None]


def case_of(method: Method) -> Case:
    """The method's entry in `CASES`.

    Raises:
        LookupError: it has none.
    """
    if method.name not in CASES:
        raise LookupError(f"method {method.name!r} has no case in tests/methods/contract.py: add one line to CASES.")
    return CASES[method.name]


def checks_of(method: Method) -> Iterator[Check]:
    """The checks that a method's record calls for."""
    yield record_is_complete
    if parameters_of(method) is not None:
        yield hyperparameters_refuse_nonsense
    yield broken_weights_are_refused
    yield infeasible_budget_is_refused
    yield empty_data_is_refused if "data" in method.needs else data_is_not_read
    if "builder" in method.needs:
        # It trains networks of its own from its arguments, so there is no model to leave alone and no run to resume.
        yield same_seeds_same_verdict
        return
    yield from (asked_units_go, same_seed_same_plan, plan_survives_its_file, model_is_untouched)
    yield from (killed_run_resumes, saved_result_is_equal)
    yield mask_and_cut_agree if COUPLED & set(method.units) else zeros_are_the_masks


def small() -> nn.Module:
    """8 → 16 → 4 with a batch norm, the same each time: 128 and 64 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Four labelled batches of eight, the same each time."""
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(8, 8, generator=generator) for _ in range(4)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def run(method: Method, case: Case, model: nn.Module | None = None, budget: str | None = None, **changes: Any) -> Any:
    """What the method returns for its case."""
    arguments: dict[str, Any] = {"data": batches(), "options": case.options}
    net = small() if model is None else model
    if "builder" in method.needs:
        arguments |= {"test": batches(), **changes}
        return method.run(lambda seed: copy.deepcopy(net), INPUTS, budget or case.budget, **arguments)
    if "training" in method.needs:
        arguments["recover"] = sec.FineTune(epochs=3, lr=0.05)
    return method.run(net, INPUTS, budget or case.budget, **{**arguments, "measure": False, **changes})


def parameters_of(method: Method) -> type | None:
    """The dataclass of the method's hyperparameters: the type of its argument `options`."""
    found = get_args(get_type_hints(method.run).get("options"))
    return next((part for part in found if is_dataclass(part)), None)


def state_of(model: nn.Module) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


class Untouchable:
    """Batches that nobody may look at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("data was read by a method that declares no need of it")


# -- for every method --------------------------------------------------------------------------------------------------


def record_is_complete(method: Method, case: Case, folder: Path) -> None:
    module = importlib.import_module(method.run.__module__)
    page = " ".join((module.__doc__ or "").split())
    assert method.name == method.run.__module__.rpartition(".")[2].replace("_", "-")
    assert method.title in page
    assert all(part in page for part in ("Unit:", "When:", "Defaults."))
    assert re.fullmatch(r"\d{4}\.\d{4,5}|", method.arxiv)
    assert method.arxiv in page
    assert method.units
    assert set(method.units) <= set(get_args(Unit))
    assert method.when
    assert set(method.when) <= set(get_args(When))
    assert set(method.needs) <= NEEDS
    assert method.summary.endswith(".")
    assert method.how
    assert method.claim.endswith(".")
    written = json.loads(json.dumps(method.to_dict()))
    assert set(written) == {field.name for field in fields(Method)} | {"summary"}
    where, _, name = written["run"].rpartition(".")
    assert getattr(importlib.import_module(where), name) is method.run


def hyperparameters_refuse_nonsense(method: Method, case: Case, folder: Path) -> None:
    parameters = parameters_of(method)
    assert parameters is not None
    rules = rules_of(parameters)
    assert set(rules) == {field.name for field in fields(parameters)}
    parameters()
    for name, rule in rules.items():
        for wrong in rule.wrong():
            with pytest.raises(OptionError, match=rf"{parameters.__name__}: {name} "):
                parameters(**{name: wrong})


def broken_weights_are_refused(method: Method, case: Case, folder: Path) -> None:
    for value in (float("nan"), float("inf")):
        model = small()
        with torch.no_grad():
            model[3].weight[1, 2] = value
        with pytest.raises(ModelError, match=r"NaN or infinite weights in 3\.weight"):
            run(method, case, model)


def infeasible_budget_is_refused(method: Method, case: Case, folder: Path) -> None:
    with pytest.raises(BudgetError, match="sparsity lies in"):
        run(method, case, budget="sparsity=100%")
    model = small()
    before = state_of(model)
    with pytest.raises(BudgetError) as caught:
        run(method, case, model, budget=case.infeasible)
    assert state_of(model) == before
    if caught.value.nearest is not None:
        run(method, case, budget=caught.value.nearest)


def empty_data_is_refused(method: Method, case: Case, folder: Path) -> None:
    for nothing in ([], iter(())):
        with pytest.raises(DataError, match=r"empty|no batch"):
            run(method, case, data=nothing)


def data_is_not_read(method: Method, case: Case, folder: Path) -> None:
    run(method, case, data=Untouchable(), recalibrate=False)


# -- for methods that compare networks of their own --------------------------------------------------------------------


def same_seeds_same_verdict(method: Method, case: Case, folder: Path) -> None:
    first = run(method, case)
    torch.manual_seed(99)
    assert run(method, case) == first


# -- for methods that prune a model ------------------------------------------------------------------------------------


def asked_units_go(method: Method, case: Case, folder: Path) -> None:
    made = run(method, case)
    for limit in made.plan.recipe.budget.limits:
        if limit.metric == "sparsity":
            total = sum(group.size for group in made.plan.groups)
            assert sum(made.plan.counts.values()) == units_kept(limit.value, total)
        else:
            assert made.plan.cost(limit.cost, limit.relative) <= limit.value


def same_seed_same_plan(method: Method, case: Case, folder: Path) -> None:
    first = run(method, case, seed=5)
    torch.manual_seed(99)
    again = run(method, case, seed=5)
    assert first.plan.same_as(again.plan)
    assert state_of(first.model) == state_of(again.model)


def plan_survives_its_file(method: Method, case: Case, folder: Path) -> None:
    plan = run(method, case).plan
    back = ModelPlan.load(plan.save(folder / "plan.safetensors"))
    assert back.same_as(plan)
    assert all(torch.equal(back.scores[name], scores) for name, scores in plan.scores.items())
    assert (back.recipe, back.groups) == (plan.recipe, plan.groups)
    assert (back.fingerprint, back.digest, str(back)) == (plan.fingerprint, plan.digest, str(plan))
    model = small()
    assert state_of(back.mask(model)) == state_of(plan.mask(model))


def model_is_untouched(method: Method, case: Case, folder: Path) -> None:
    model = unruly(small())
    before = account(model)
    run(method, case, model, recover=sec.FineTune(epochs=1, lr=0.05), test=batches())
    assert account(model) == before


class _Killed(Exception):
    pass


def killed_run_resumes(method: Method, case: Case, folder: Path) -> None:
    steps: list[int] = []

    def dies_in_the_second_pass(progress: Any) -> None:
        if progress.step == 6:
            raise _Killed

    recover = sec.FineTune(epochs=3, lr=0.05)
    whole = run(method, case, recover=recover)
    with pytest.raises(_Killed):
        run(method, case, recover=recover, checkpoint=folder, on_step=dies_in_the_second_pass)
    resumed = run(
        method, case, recover=recover, checkpoint=folder, on_step=lambda progress: steps.append(progress.step)
    )
    assert steps == [*range(5, 13), *[*range(1, 13)] * (case.trainings - 1)]
    assert state_of(resumed.model) == state_of(whole.model)
    assert resumed.plan.same_as(whole.plan)
    assert resumed.report.history == whole.report.history
    changed = small()
    with torch.no_grad():
        changed[0].bias += 1
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        run(method, case, changed, recover=recover, checkpoint=folder)


def saved_result_is_equal(method: Method, case: Case, folder: Path) -> None:
    made = run(method, case)
    back = sec.load(made.save(folder / "saved"))
    assert torch.equal(back.model.eval()(INPUTS), made.model.eval()(INPUTS))
    assert state_of(back.model) == state_of(made.model)
    assert back.plan.same_as(made.plan)
    assert {name: mask.tolist() for name, mask in back.masks.items()} == {
        name: mask.tolist() for name, mask in made.masks.items()
    }
    assert back.report.to_dict() == made.report.to_dict()


def zeros_are_the_masks(method: Method, case: Case, folder: Path) -> None:
    made = run(method, case)
    assert made.masks
    assert any(not mask.all() for mask in made.masks.values())
    for name, mask in made.masks.items():
        assert torch.equal(made.model.get_parameter(name) != 0, mask)
    decided = made.plan.masks(made.model)
    assert set(decided) == set(made.masks)
    assert all(torch.equal(decided[name], mask) for name, mask in made.masks.items())
    untouched = [p for n, p in made.model.named_parameters() if n not in made.masks and p.dim() > 1]
    assert all(bool((p != 0).all()) for p in untouched)


def mask_and_cut_agree(method: Method, case: Case, folder: Path) -> None:
    made, model = run(method, case), small()
    cut, masked = made.plan.cut(model), made.plan.mask(model)
    torch.testing.assert_close(cut.eval()(INPUTS), masked.eval()(INPUTS))
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert [p.shape for p in made.model.parameters()] == [p.shape for p in cut.parameters()]
    assert not made.masks
