"""ZipLM: levels by a table of times, a search for the loss, a proven cut that takes as little as was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from benchmarks.families import FAMILIES
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.graph.infer import infer
from secateurs.methods.language._database import Database, build, consumers_of
from secateurs.methods.language._tables import levels_of
from secateurs.methods.language.ziplm import ZipLM, predicted_speedup, ziplm
from tests.methods.contract import batches, small

FEW = ZipLM(starts=4, failures=4)


def seconds_of(model: nn.Module) -> float:
    """A second for each thousand parameters, and a tenth for the call."""
    return 0.1 + sum(p.numel() for p in model.parameters()) / 1000


def counted(whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
    """A clock that counts parameters, so that parts add up exactly."""
    return seconds_of(whole), seconds_of(smaller)


def tokens(number: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, 100, (4, 16), generator=generator)} for _ in range(number)]


def labelled(number: int = 3) -> list[dict[str, Tensor]]:
    return [batch | {"labels": batch["input_ids"]} for batch in tokens(number)]


def family(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return FAMILIES[name]()


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_families_are_cut_to_the_predicted_time_run_and_come_back(name: str, tmp_path: Path) -> None:
    model, x = family(name)
    data = tokens() if name == "BERT" else labelled()
    made = ziplm(model, x, "speedup>=1.3x", data=data, timer=counted, options=FEW, measure=False)
    assert {group.kind for group in made.plan.groups} == {"channel", "head"}
    assert made.report.proof is not None
    assert made.report.proof < 1e-4
    took = counted(model, made.model, x)
    known = made.plan.recipe.criterion_options
    assert [known["whole"], known["predicted"]] == pytest.approx(took)
    assert predicted_speedup(made.plan) == pytest.approx(took[0] / took[1])
    assert took[0] / took[1] >= 1.3
    back = sec.load(made.save(tmp_path / "saved")).model.eval()
    with torch.no_grad():
        assert torch.equal(back(**x).logits, made.model.eval()(**x).logits)
    if name != "BERT":
        ids = x["input_ids"][:, :5]
        cached, fresh = (
            it.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use)
            for it, use in ((made.model, True), (back, False))
        )
        assert torch.equal(cached, fresh)


def test_query_groups_go_together() -> None:
    model, x = family("Llama")
    made = ziplm(model, x, "speedup>=1.3x", data=tokens(), timer=counted, options=FEW, measure=False)
    attention = made.model.model.layers[0].self_attn
    count = made.plan.counts["model.layers.0.self_attn.q_proj"]
    assert attention.k_proj.out_features == count * model.config.head_dim
    assert attention.q_proj.out_features == attention.o_proj.in_features == 2 * attention.k_proj.out_features


def test_what_consumes_the_units_has_moved_to_make_up_for_them() -> None:
    model, x = family("GPT-2")
    made = ziplm(model, x, "macs<=70%", data=tokens(), options=FEW, measure=False)
    plain = made.plan.cut(model)
    outputs = [it.eval()(**tokens()[0]).logits.detach() for it in (model, made.model, plain)]
    assert (outputs[0] - outputs[1]).norm() < (outputs[0] - outputs[2]).norm()
    assert made.plan.cost("macs") <= 0.7


def test_the_search_is_never_worse_than_the_priors_alone() -> None:
    model, x = family("Llama")

    def loss(options: ZipLM) -> float:
        made = ziplm(model, x, "macs<=70%", data=labelled(), options=options, measure=False)
        return float(made.plan.recipe.criterion_options["calibration_loss"])

    assert loss(ZipLM(starts=20, failures=20)) < loss(ZipLM(starts=0, failures=0))


def test_each_prior_is_least_for_the_levels_that_it_chose(tmp_path: Path) -> None:
    model, x = family("Llama")
    made = {
        power: ziplm(
            model, x, "macs<=70%", data=tokens(), options=ZipLM(starts=0, failures=0, prior=prior), measure=False
        )
        for power, prior in ((1, "error"), (2, "squared error"))
    }
    structure = made[1].plan.structure
    database = Database(tmp_path, levels_of(model, structure, x), consumers_of(model, structure.groups))
    build(model, database, tokens())

    def total(counts: dict[str, int], power: int) -> float:
        errors = (database.solved[name].errors[database.counts[name].index(n)] for name, n in counts.items())
        return sum(error**power for error in errors)

    assert made[1].plan.counts != made[2].plan.counts
    for power, other in ((1, 2), (2, 1)):
        assert total(made[power].plan.counts, power) < total(made[other].plan.counts, power)


def test_modules_go_as_a_whole_where_the_model_runs_without_them() -> None:
    def emptied(name: str) -> set[str]:
        model, x = family(name)
        structure = infer(model, x, entangled=False)
        counts = levels_of(model, structure, x)
        return {group.kind for group in structure.groups if counts[group.name][-1] == 0}

    assert emptied("BERT") == {"head", "channel"}
    # Caches count tokens by the keys of a layer.
    assert emptied("Llama") == {"channel"}
    # Its code views rows of a width that may not be 0.
    assert emptied("GPT-2") == set()


def test_a_model_without_its_attention_runs_trains_and_comes_back(tmp_path: Path) -> None:
    model, x = family("BERT")

    def attention_alone(whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
        def size(model: nn.Module) -> float:
            return 0.1 + sum(p.numel() for name, p in model.named_parameters() if "self" in name)

        return size(whole), size(smaller)

    made = ziplm(model, x, "speedup>=1000x", data=tokens(), timer=attention_alone, options=FEW, measure=False)
    assert {made.plan.counts[group.name] for group in made.plan.groups if group.kind == "head"} == {0}
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.01)
    made.model.train()(**tokens()[0]).logits.square().mean().backward()
    optimizer.step()
    back = sec.load(made.save(tmp_path / "saved")).model.eval()
    with torch.no_grad():
        assert torch.equal(back(**x).logits, made.model.eval()(**x).logits)


def test_attention_of_pytorch_itself() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 16)
    made = ziplm(model, x, "speedup>=1.3x", data=[x, x + 1], timer=counted, options=FEW, measure=False)
    assert {group.kind for group in made.plan.groups} == {"channel", "head"}
    assert predicted_speedup(made.plan) >= 1.3


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["sparsity=50%", "macs<=50%,params<=50%", "2:4", "tokens<=50%"])
def test_other_budgets_are_refused(budget: str) -> None:
    with pytest.raises(BudgetError, match="one limit of latency, speedup, macs, params, bytes, memory"):
        ziplm(small(), torch.ones(2, 8), budget, data=batches())


@pytest.mark.parametrize("budget", ["speedup>=100x", "latency<=1%", "latency<=100ms", "params<=10", "bytes<=1%"])
def test_what_cannot_be_reached_names_what_can(budget: str) -> None:
    given: dict[str, Any] = {"data": batches(), "timer": counted, "options": FEW, "measure": False}
    with pytest.raises(BudgetError, match=r"is unreachable: with all modules at their cheapest levels .* left") as seen:
        ziplm(small(), torch.ones(2, 8), budget, **given)
    assert seen.value.nearest is not None
    made = ziplm(small(), torch.ones(2, 8), seen.value.nearest, **given)
    assert made.plan.counts == {"0": 1}


def test_modules_that_do_not_get_faster_have_no_nearest() -> None:
    with pytest.raises(BudgetError, match=r"1e\+03 ms of 1e\+03 ms are left\.$"):
        ziplm(small(), torch.ones(2, 8), "speedup>=2x", data=batches(), timer=lambda *_: (1.0, 1.0))


def test_a_speedup_of_one_changes_nothing() -> None:
    model = small().eval()
    made = ziplm(model, torch.ones(2, 8), "speedup>=1x", data=batches(), timer=counted, recalibrate=False)
    assert made.plan.counts == {"0": 16}
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), model.parameters(), strict=True))


def test_a_shape_that_is_slower_than_a_wider_one_is_not_taken() -> None:
    def clock(whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
        """Odd widths take long."""
        return seconds_of(whole), seconds_of(smaller) + 5 * (smaller[0].out_features % 2)

    made = ziplm(small(), torch.ones(2, 8), "speedup>=1.1x", data=batches(), timer=clock, options=FEW, measure=False)
    assert made.plan.counts["0"] % 2 == 0


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_prune_finds_it_by_name_and_reports_what_was_measured() -> None:
    made = sec.prune(
        small(), torch.ones(2, 8), "speedup>=1.2x", method="ziplm", data=batches(), test=batches(), timer=counted
    )
    assert made.report.budget == "speedup>=1.2x"
    assert made.report.after.latency is not None
    assert set(made.report.seconds) >= {"planning", "timing", "solving", "searching", "cutting", "testing"}
    assert made.report.recipe["criterion_options"]["predicted"] < made.report.recipe["criterion_options"]["whole"]
    assert made.report.predicted_speedup == predicted_speedup(made.plan) >= 1.2
    assert made.report.to_dict()["speedup"] is not None
    assert f"{made.report.predicted_speedup:.2f}× predicted" in made.report.to_text()


def test_a_limit_on_something_else_predicts_no_speed() -> None:
    made = ziplm(small(), torch.ones(2, 8), "params<=90%", data=batches(), options=FEW, measure=False)
    assert made.report.predicted_speedup is None


def test_other_decisions_are_refused() -> None:
    for more in ({"budgets": ["macs<=20%"]}, {"sensitivities": [0.5]}):
        with pytest.raises(OptionError, match="ziplm makes one decision"):
            ziplm(small(), torch.ones(2, 8), "macs<=50%", data=batches(), test=batches(), **more)


def test_data_are_needed_and_units_too() -> None:
    with pytest.raises(DataError, match="calibration data"):
        ziplm(small(), torch.ones(2, 8), "macs<=50%")
    with pytest.raises(ModelError, match="no channel or head of a block of Linear can go"):
        ziplm(nn.Linear(8, 4), torch.ones(2, 8), "macs<=50%", data=batches())


def test_scope_and_ignore_choose_modules() -> None:
    model, x = family("Llama")
    given: dict[str, Any] = {"data": tokens(), "options": FEW, "measure": False}
    made = ziplm(model, x, "params<=90%", scope="*.mlp.*", ignore="model.layers.1.*", **given)
    assert set(made.plan.counts) == {"model.layers.0.mlp.gate_proj"}


def test_a_killed_search_begins_again_and_a_found_one_does_not(tmp_path: Path) -> None:
    calls: list[int] = []

    def timer(whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
        calls.append(1)
        return counted(whole, smaller, inputs)

    given: dict[str, Any] = {"data": batches(), "timer": timer, "options": FEW, "measure": False}
    first = ziplm(small(), torch.ones(2, 8), "speedup>=1.2x", checkpoint=tmp_path, **given)
    measured = len(calls)
    again = ziplm(small(), torch.ones(2, 8), "speedup>=1.2x", checkpoint=tmp_path, **given)
    assert len(calls) == measured > 0
    assert again.plan.same_as(first.plan)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        ziplm(small(), torch.ones(2, 8), "speedup>=1.2x", checkpoint=tmp_path, **{**given, "options": ZipLM(starts=1)})
