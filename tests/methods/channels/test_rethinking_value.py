"""Rethinking the value of pruning: the arms, their lengths and their starts, and the paper's surgery."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.budget import Limit
from secateurs.core.errors import BudgetError, DataError
from secateurs.core.select import top
from secateurs.measure.macs import paper_flops
from secateurs.measure.params import parameters
from secateurs.methods.channels import rethinking_value as module
from secateurs.methods.channels.rethinking_value import Arm, Protocol, Verdict, rethinking_value
from secateurs.recover import fine_tune, scratch_epochs
from secateurs.recover.finetune import History
from tests.measure.test_paper_flops import NETS, RESNET56_B, CifarResNet, kept_widths
from tests.methods.contract import INPUTS, batches, small

SHORT = Protocol(epochs=4, tune_epochs=2, tune_rates=(0.001, 0.01), seeds=(0,))


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def compare(budget: str = "macs<=50%", options: Protocol = SHORT, **changes: Any) -> Verdict:
    arguments = {"data": batches(), "test": batches(), "options": options, **changes}
    return rethinking_value(changes.pop("build", build), INPUTS, budget, **arguments)


@dataclass(frozen=True)
class Training:
    """A training that was asked for: its settings, and the weights that it starts from."""

    epochs: int
    lr: float
    schedule: str
    masked: bool
    start: dict[str, Tensor]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """The trainings that are asked for; none is done."""
    asked: list[Training] = []

    def noted(model: nn.Module, data: Any, **how: Any) -> History:
        start = copy.deepcopy(dict(model.named_parameters()))
        asked.append(Training(how["epochs"], how["lr"], how["schedule"], bool(how["masks"]), start))
        return History()

    monkeypatch.setattr(module, "fine_tune", noted)
    return asked


# -- arms --------------------------------------------------------------------------------------------------------------


def test_arms_of_a_cut(trainings: list[Training]) -> None:
    verdict = compare()
    names = ["dense", "pruned", "fine-tune at 0.001", "fine-tune at 0.01", "scratch-E", "scratch-B"]
    assert [arm.name for arm in verdict.arms] == names
    # Half of the MACs go, so that Scratch-B has twice the epochs.
    assert [(t.epochs, t.lr, t.schedule, t.masked) for t in trainings] == [
        (4, 0.1, "step", False),
        (2, 0.001, "constant", False),
        (2, 0.01, "constant", False),
        (4, 0.1, "step", False),
        (8, 0.1, "step", False),
    ]
    dense, tuned, _, scratch, _ = (t.start["0.weight"] for t in trainings)
    assert (tuned.shape, scratch.shape) == ((8, 8), (8, 8))
    assert {tuple(row) for row in tuned.tolist()} <= {tuple(row) for row in dense.tolist()}
    assert not {tuple(row) for row in scratch.tolist()} & {tuple(row) for row in dense.tolist()}


def test_arms_of_masks_have_the_lottery_as_well(trainings: list[Training], monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(model: nn.Module, data: Any, **how: Any) -> History:
        noted = stub(model, data, **how)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        return noted

    stub = module.fine_tune
    monkeypatch.setattr(module, "fine_tune", moved)
    verdict = compare("sparsity=75%", granularity="weight", allocation="global", criterion_options={})
    assert verdict.arms[-1].name == "lottery"
    dense, tuned, _, scratch, _, ticket = trainings
    assert [t.masked for t in trainings] == [False, True, True, True, True, True]
    keep = {name: tuned.start[name] != 0 for name in ("0.weight", "3.weight")}
    assert sum(int(mask.sum()) for mask in keep.values()) == 48
    for name, mask in keep.items():
        # The ticket has the weights before training, fine-tuning those after it, scratch others.
        assert torch.equal(ticket.start[name], dense.start[name] * mask)
        assert torch.equal(tuned.start[name], 2 * dense.start[name] * mask)
        assert torch.equal(scratch.start[name] != 0, mask)
        assert not (scratch.start[name] == dense.start[name])[mask].any()
    assert trainings[4].epochs == 4 * 4


def test_the_compute_of_scratch_b_is_capped(trainings: list[Training]) -> None:
    compare("macs<=20%", Protocol(epochs=10, tune_epochs=1, tune_rates=(0.1,), cap=2.5, seeds=(0,)), floor=1)
    assert [t.epochs for t in trainings] == [10, 1, 10, 25]


def test_at_equal_cost_both_scratch_arms_are_one() -> None:
    for options in ({}, {"granularity": "weight", "criterion_options": {}}):
        verdict = compare("sparsity=0%", **options)
        assert verdict["scratch-E"].accuracies == verdict["scratch-B"].accuracies
        assert verdict["pruned"] == Arm("pruned", verdict["dense"].accuracies)


def test_zeros_stay_in_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum and weight decay over 100 steps bring no masked entry back."""
    seen: list[nn.Module] = []
    evaluate = module.evaluate

    def noted(model: nn.Module, *arguments: Any) -> dict[str, float]:
        seen.append(copy.deepcopy(model))
        return evaluate(model, *arguments)

    monkeypatch.setattr(module, "evaluate", noted)
    how = Protocol(epochs=25, tune_epochs=25, tune_rates=(0.05,), weight_decay=5e-4, cap=1, seeds=(0,))
    compare("sparsity=75%", how, granularity="weight", criterion_options={})
    dense, pruned, *arms = seen
    assert len(arms) == 4
    for name in ("0.weight", "3.weight"):
        keep = pruned.get_parameter(name) != 0
        assert not torch.equal(keep, dense.get_parameter(name) != 0)
        for arm in arms:
            assert torch.equal(arm.get_parameter(name) != 0, keep)
            assert not torch.equal(arm.get_parameter(name), pruned.get_parameter(name))


def test_each_seed_has_a_network_of_its_own(trainings: list[Training]) -> None:
    seeds: list[int] = []
    told: list[str] = []

    def counting(seed: int) -> nn.Module:
        seeds.append(seed)
        return build(seed)

    how = Protocol(epochs=2, tune_epochs=1, tune_rates=(0.1,), seeds=(3, 5))
    verdict = rethinking_value(
        counting, INPUTS, "macs<=50%", data=batches(), test=batches(), options=how, on_arm=lambda a: told.append(a.name)
    )
    # The first one is planned once before anything is trained.
    assert seeds == [3, 3, 5]
    assert told == [arm.name for arm in verdict.arms]
    assert all(len(arm.accuracies) == 2 for arm in verdict.arms)
    assert torch.equal(trainings[0].start["0.weight"], build(3)[0].weight)
    assert torch.equal(trainings[4].start["0.weight"], build(5)[0].weight)


def test_nothing_is_trained_for_what_cannot_be_done(trainings: list[Training]) -> None:
    with pytest.raises(BudgetError, match=r"macs<=1% cannot be met"):
        compare("macs<=1%")
    with pytest.raises(DataError, match="the test data is empty"):
        compare(test=[])
    with pytest.raises(DataError, match="the calibration data is empty"):
        compare(data=lambda epoch: [])
    assert trainings == []


def test_filters_go_by_their_l1_norm(monkeypatch: pytest.MonkeyPatch, trainings: list[Training]) -> None:
    decided: list[sec.Plan] = []
    plan = module.plan

    def noted(*arguments: Any, **options: Any) -> sec.Plan:
        decided.append(plan(*arguments, **options))
        return decided[-1]

    monkeypatch.setattr(module, "plan", noted)
    compare("sparsity=50%")
    # The planned network is the trained one, and here training changes nothing.
    norms = build(0)[0].weight.detach().abs().sum(1)
    assert torch.equal(decided[-1].keep["0"], top(norms, 8))


def test_criteria_see_the_training_data() -> None:
    assert len(compare(criterion="taylor", criterion_options={}).arms) == 6


# -- the verdict -------------------------------------------------------------------------------------------------------


def verdict(tuned: tuple[float, ...], scratch: tuple[float, ...]) -> Verdict:
    return Verdict(
        (Arm("dense", (0.99,)), Arm("pruned", (0.1,)), Arm("fine-tune at 0.1", tuned), Arm("scratch-E", (0.5,)),
         Arm("scratch-B", scratch), Arm("lottery", (1.0,)))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tuned", "scratch", "worth_it"),
    [
        ((0.9, 0.9), (0.8, 0.8), True),
        ((0.8, 0.8), (0.9, 0.9), False),
        ((0.9, 0.9), (0.9, 0.9), False),
        # 0.1 apart; deviations of 0.0707 and 0.0849 are 0.110 together.
        ((0.95, 0.85), (0.86, 0.74), False),
        # The same deviations, 0.12 apart.
        ((0.97, 0.87), (0.86, 0.74), True),
    ],
)
def test_inherited_weights_pay_if_they_win_by_more_than_the_noise(
    tuned: tuple[float, ...], scratch: tuple[float, ...], worth_it: bool
) -> None:
    assert verdict(tuned, scratch).worth_it == worth_it


def test_an_arm_prints_mean_and_deviation() -> None:
    arm = Arm("scratch-E", (0.9, 0.8, 0.85))
    assert (arm.mean, arm.std) == (pytest.approx(0.85), pytest.approx(0.05))
    assert str(arm) == "scratch-E: 85.00 ± 5.00"
    assert Arm("dense", (0.5,)).std == 0.0
    assert str(verdict((0.9,), (0.8,))).splitlines()[-1] == "verdict: inherited weights pay"
    assert "from scratch does as well" in str(verdict((0.8,), (0.9,)))
    assert verdict((0.9,), (0.8,))["lottery"].mean == 1.0


# -- the paper's networks and surgery ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "pruned", "ratio", "epochs"),
    [(0, 1, 1.51895, 243), (2, 3, 1.11565, 178), (2, 4, 1.37914, 220), (5, 6, 1.18827, 190), (5, 7, 1.62728, 260)],
)
def test_compute_ratios_of_the_published_networks(dense: int, pruned: int, ratio: float, epochs: int) -> None:
    flops = NETS[dense][2], NETS[pruned][2]
    assert flops[0] / flops[1] == pytest.approx(ratio, abs=5e-6)
    assert scratch_epochs(160, *flops).epochs == epochs


def test_our_cut_of_resnet_56_is_the_paper_s_network_b() -> None:
    net, image = CifarResNet(kept_widths(56, (0, 0, 0))).eval(), torch.zeros(1, 3, 32, 32)
    sizes = [16] * 9 + [32] * 9 + [64] * 9
    names = [f"blocks.{place}.conv1" for place in range(27)]
    shares = {name: kept / size for name, kept, size in zip(names, RESNET56_B, sizes, strict=True)}
    limit = Limit("sparsity", "=", 1 - sum(RESNET56_B) / sum(sizes), relative=True)
    plan = sec.plan(
        net, image, sec.Budget((limit,)), scope="blocks.*.conv1", criterion_options={"members": "out"}, floor=1,
        allocation="given", allocation_options={"densities": shares},
    )  # fmt: skip
    assert list(plan.counts.values()) == [6] * 7 + [16, 16] + [32] + [22] * 6 + [32, 22] + [64] + [57] * 7 + [64]
    smaller = plan.cut(net)
    assert (parameters(smaller), paper_flops(smaller, image)) == (735_712, 183_137_866)
    for name, keep in plan.keep.items():
        norms = net.get_submodule(name).weight.detach().abs().flatten(1).sum(1)
        assert keep.all() or norms[keep].min() >= norms[~keep].max()


class Chain(nn.Module):
    """conv, batch norm, conv, linear."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.fc = nn.Conv2d(width, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.bn(self.conv1(x)).relu()).mean((2, 3)))


@torch.no_grad()
def surgery(model: Chain, keep: Tensor) -> Chain:
    """The smaller network, copied entry by entry as the paper's code does it."""
    smaller, state = Chain(int(keep.sum())), model.state_dict()
    rows = {name: value[keep] for name, value in state.items() if name.startswith(("conv1", "bn")) and value.dim()}
    smaller.load_state_dict({**state, **rows, "conv2.weight": state["conv2.weight"][:, keep]})
    return smaller.eval()


def test_zeroed_filters_and_their_norms_are_removed_filters() -> None:
    model, image = Chain().eval(), torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        for tensor in (*model.bn.parameters(), model.bn.running_mean):
            tensor.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    plan = sec.plan(model, image, "sparsity=50%", scope="conv1", criterion_options={"members": "out"})
    keep = plan.keep["conv1"]
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (zeroed.conv1.weight, zeroed.bn.weight, zeroed.bn.bias):
            tensor[~keep] = 0
        wanted, ours, theirs = zeroed(image), plan.cut(model)(image), surgery(model, keep)(image)
        assert float((theirs - wanted).abs().max()) < 1e-5
        assert float((ours - wanted).abs().max()) < 1e-5
        # Norms that keep their shift pass it on: zeroed filters alone are not removed ones.
        zeroed.bn.bias.copy_(model.bn.bias)
        assert float((zeroed(image) - wanted).abs().max()) > 1e-3


def test_masks_from_what_is_not_zero_hold_for_100_steps() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[torch.rand(16, 8) < 0.5] = 0
    masks = {"0.weight": model[0].weight != 0}
    fine_tune(model, batches(), steps=100, lr=0.1, weight_decay=5e-4, masks=masks)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
