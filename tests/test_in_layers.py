"""Pruning layer by layer: budgets, allocation, what is kept of a killed run, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.in_layers import LayerSolver, Subject, prune_in_layers
from secateurs.report.page import render
from secateurs.solvers import Solved


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def magnitude(subject: Subject) -> Solved:
    mask = subject.comparison.keep(subject.weight.abs())
    return Solved(subject.weight * mask, mask)


SOLVER = LayerSolver("by-size", magnitude)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def data() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(3)
    ]


def run(model: nn.Module, data: Any, budget: str = "sparsity=50%", **options: Any) -> sec.Pruned:
    return prune_in_layers(model, torch.ones(1, 8), budget, SOLVER, data=data, measure=False, **options)


def test_exactly_the_share_of_each_layer_goes_and_the_rest_stays(model: Net, data: list[Any]) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = run(model, data, "sparsity=75%")
    for name, parameter in made.model.named_parameters():
        if name in made.masks:
            assert int(made.masks[name].sum()) == parameter.numel() // 4
            assert torch.equal(parameter, before[name] * made.masks[name])
        else:
            assert torch.equal(parameter, before[name])
    assert sorted(made.masks) == [f"blocks.{i}.{n}.weight" for i in range(3) for n in ("down", "up")]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert made.plan.sparsity == 0.75


def test_a_pattern_holds_in_every_group(model: Net, data: list[Any]) -> None:
    made = run(model, data, "2:4")
    for mask in made.masks.values():
        assert mask.view(-1, 4).sum(1).unique().tolist() == [2]


def test_an_allocation_says_how_much_of_which_layer(model: Net, data: list[Any]) -> None:
    given = {f"blocks.{i}.{n}": share for i, share in enumerate((0.25, 0.5, 0.75)) for n in ("up", "down")}
    made = run(model, data, allocation="given", allocation_options={"densities": given})
    assert {name: float(mask.float().mean()) for name, mask in made.masks.items()} == {
        f"{name}.weight": share for name, share in given.items()
    }


def test_the_report_has_the_error_of_each_layer(model: Net, data: list[Any]) -> None:
    made = run(model, data)
    found = {layer.name: layer.error for layer in made.report.layers}
    with torch.no_grad():
        x = model.embed(torch.cat([batch[0] for batch in data])).double()
        weight, pruned = (m.blocks[0].up.weight.double() for m in (model, made.model))
        expected = (x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()
    assert found["blocks.0.up"] == pytest.approx(float(expected), rel=1e-4)
    assert found["head"] is None
    assert "output error" in made.report.to_text()
    assert "Output error" in render(made.report)
    assert "Output error" not in render(sec.prune(model, data[0][0], "sparsity=50%", granularity="weight").report)


def test_blocks_with_more_outliers_keep_more(model: Net, data: list[Any]) -> None:
    with torch.no_grad():
        model.blocks[1].up.weight[:4, :4] *= 50
    made = run(model, data, allocation="owl", allocation_options={"spread": 0.2})
    kept = {name: float(mask.float().mean()) for name, mask in made.masks.items()}
    assert kept["blocks.1.up.weight"] == kept["blocks.1.down.weight"]
    assert kept["blocks.1.up.weight"] > kept["blocks.0.up.weight"]
    assert sum(kept.values()) / 6 == pytest.approx(0.5, abs=1 / 128)
    given = {name.removesuffix(".weight"): 1.0 if "1" in name else 0.0 for name in kept}
    again = run(model, data, allocation="owl", allocation_options={"spread": 0.2, "outliers": given})
    assert float(again.masks["blocks.1.up.weight"].float().mean()) == pytest.approx(0.5 + 0.4 * 2 / 3, abs=1 / 64)


def test_a_pattern_leaves_no_choice_of_shares(model: Net, data: list[Any]) -> None:
    with pytest.raises(OptionError, match="2:4 leaves as much of each layer: leave allocation='owl' out"):
        run(model, data, "2:4", allocation="owl")


def test_a_stack_that_nothing_multiplies_stays_dense_and_is_named(model: Net, data: list[Any]) -> None:
    model.blocks[0].experts = nn.Parameter(torch.ones(4, 8, 8))
    with pytest.warns(UserWarning, match=r"blocks\.0\.experts is multiplied in no way that can be followed and stays"):
        made = run(model, data)
    assert "blocks.0.experts" not in made.masks


def test_scope_and_ignore_choose_layers(model: Net, data: list[Any]) -> None:
    assert sorted(run(model, data, scope="*.up").masks) == [f"blocks.{i}.up.weight" for i in range(3)]
    assert sorted(run(model, data, ignore="blocks.1.*").masks) == [
        f"blocks.{i}.{n}.weight" for i in (0, 2) for n in ("down", "up")
    ]


def test_quality_is_measured_before_and_after_and_repair_follows(model: Net, data: list[Any]) -> None:
    made = run(model, data, test=data, recover=sec.FineTune(steps=2, lr=0.01))
    assert list(made.report.stages) == ["one-shot", "recovered"]
    assert all(bool((p[~made.masks[n]] == 0).all()) for n, p in made.model.named_parameters() if n in made.masks)


def test_the_caller_s_model_can_take_the_place(model: Net, data: list[Any]) -> None:
    made = run(model, data, inplace=True)
    assert made.model is model
    assert float((model.blocks[0].up.weight == 0).float().mean()) == 0.5


class Mixed(nn.Module):
    """The inner layer is one of four, stacked in one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.matrices = nn.Linear(width, width), nn.Parameter(torch.randn(4, width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.up(x).chunk(4)
        return x + torch.cat([part @ self.matrices[number].T for number, part in enumerate(parts)])


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_a_killed_run_over_stacked_experts_goes_on_to_the_same_bits(
    model: Net, data: list[Any], tmp_path: Path, propagate: Any
) -> None:
    model.blocks = nn.ModuleList(Mixed(8) for _ in range(3))
    whole = run(model, data, propagate=propagate)

    def stop(done: Any) -> None:
        if done.name == "blocks.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, propagate=propagate, checkpoint=tmp_path, on_block=stop)
    made = run(model, data, propagate=propagate, checkpoint=tmp_path)
    assert [float(mask.float().mean()) for mask in made.masks.values()] == [0.5] * 6
    assert whole.masks.keys() == made.masks.keys()
    assert all(torch.equal(whole.masks[name], mask) for name, mask in made.masks.items())
    assert all(map(torch.equal, whole.model.parameters(), made.model.parameters()))
    errors = {layer.name: layer.error for layer in made.report.layers}
    assert errors == {layer.name: layer.error for layer in whole.report.layers}
    assert errors["blocks.0"] > 0


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_a_killed_run_goes_on_to_the_same_bits(model: Net, data: list[Any], tmp_path: Path, propagate: Any) -> None:
    whole = run(model, data, propagate=propagate)
    calls: list[str] = []

    def counted(subject: Subject) -> Solved:
        calls.append(subject.where)
        return magnitude(subject)

    def stop(done: Any) -> None:
        assert done.detail == f"block {done.number} of 3"
        if done.name == "blocks.1":
            raise KeyboardInterrupt

    solver = LayerSolver("by-size", counted)
    options: dict[str, Any] = {"data": data, "measure": False, "propagate": propagate, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        prune_in_layers(model, torch.ones(1, 8), "sparsity=50%", solver, on_block=stop, **options)
    assert [name.split(".")[1] for name in calls] == ["0", "0", "1", "1"]
    made = prune_in_layers(model, torch.ones(1, 8), "sparsity=50%", solver, **options)
    assert [name.split(".")[1] for name in calls] == ["0", "0", "1", "1", "2", "2"]
    assert all(
        torch.equal(one, other) for one, other in zip(whole.model.parameters(), made.model.parameters(), strict=True)
    )
    assert all(torch.equal(whole.masks[name], made.masks[name]) for name in whole.masks)
    assert made.plan.same_as(whole.plan)


def test_a_folder_of_another_run_is_refused(model: Net, data: list[Any], tmp_path: Path) -> None:
    run(model, data, checkpoint=tmp_path)
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        run(model, data, "sparsity=60%", checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("budget", "options", "error", "text"),
    [
        ("macs<=50%", {}, BudgetError, "needs a budget such as sparsity=50% or 2:4"),
        ("sparsity=50%", {"sensitivities": (0.5,)}, OptionError, "by-size makes one decision"),
        ("sparsity=50%", {"scope": "head"}, ModelError, "no block of Net has a layer to solve"),
        ("sparsity=50%", {"data": []}, DataError, "empty"),
        ("sparsity=50%", {"data": None}, DataError, "pass data="),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: Net, data: list[Any], budget: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    options = {"data": data, "measure": False} | options
    with pytest.raises(error, match=text):
        prune_in_layers(model, torch.ones(1, 8), budget, SOLVER, **options)


def test_weights_that_are_not_loaded_are_refused_by_name(model: Net, data: list[Any]) -> None:
    model.blocks[1].up.to("meta")
    with pytest.raises(ModelError, match=r"^'blocks\.1\.up\.weight' is on the meta device.*`secateurs stream`\.$"):
        run(model, data)


def test_weights_that_are_no_numbers_are_refused_by_name(model: Net, data: list[Any]) -> None:
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"blocks\.1\.up"):
        run(model, data)
