"""The pruner: counts optimizer steps, resumes exactly, refuses broken weights, says when it ended early."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.core.errors import ModelError, OptionError, PlanError
from secateurs.core.schedule import Cubic
from secateurs.core.state import read_state, write_state
from secateurs.train import GlobalMagnitude, GradualMagnitude, Moment, Pruner, RandomSparse, prunable_weights


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 4))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def step(model: nn.Module, optimizer: Optimizer, pruner: Pruner | None = None) -> None:
    inputs, target = torch.randn(16, 6), torch.randint(0, 4, (16,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), target).backward()
    optimizer.step()
    if pruner is not None:
        pruner.step()


PRUNERS: dict[str, Callable[[nn.Module, Optimizer], Pruner]] = {
    "gradual": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, begin=2, end=18, every=4),
    "from the start": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, initial=0.3, end=18, every=4),
    "value": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, revive="value"),
    "one step": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, revive="one-step"),
    "straight": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, revive="straight-through"),
    "erk": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, allocation="erk"),
    "blocks": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, block=(2, 2)),
    "first order": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, criterion="first-order"),
    "second order": lambda m, o: GradualMagnitude(m, o, sparsity=0.8, end=18, every=4, criterion="second-order"),
    "global": lambda m, o: GlobalMagnitude(m, o, sparsity=0.8, end=18, every=4, floor=5),
    "global at once": lambda m, o: GlobalMagnitude(m, o, sparsity=0.8, begin=6, floor=5),
    "random": lambda m, o: RandomSparse(m, o, sparsity=0.8, seed=5),
}


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize("name", PRUNERS)
def test_resumed_equals_uninterrupted_bit_for_bit(
    name: str, make_optimizer: Callable[[nn.Module], Optimizer], tmp_path: Path
) -> None:
    def built() -> tuple[nn.Module, Optimizer, Pruner]:
        model = net()
        optimizer = make_optimizer(model)
        return model, optimizer, PRUNERS[name](model, optimizer)

    model, optimizer, pruner = built()
    for _ in range(9):
        step(model, optimizer, pruner)
    states = {"model": model, "optimizer": optimizer, "pruner": pruner}
    random = torch.get_rng_state()
    write_state(tmp_path / "state", {k: v.state_dict() for k, v in states.items()} | {"random": random})

    again = dict(zip(states, built(), strict=True))
    stored = read_state(tmp_path / "state")
    for key, part in again.items():
        part.load_state_dict(stored[key])
    for parts in ((model, optimizer, pruner), again.values()):
        torch.set_rng_state(stored["random"])
        for _ in range(12):
            step(*parts)

    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert same(model.state_dict(), again["model"].state_dict())
    assert same(optimizer.state_dict(), again["optimizer"].state_dict())
    assert same(pruner.state_dict(), again["pruner"].state_dict())
    assert torch.equal(model[0].weight == 0, ~pruner.masks["0.weight"])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_same_sees_a_difference() -> None:
    assert not same({"a": [torch.ones(2), 1]}, {"a": [torch.zeros(2), 1]})
    assert not same({"a": 1}, {"a": 2})


@pytest.mark.parametrize("name", PRUNERS)
def test_masked_weights_are_zero_after_every_step(name: str) -> None:
    model = net()
    optimizer = sgd(model)
    pruner = PRUNERS[name](model, optimizer)
    for _ in range(20):
        step(model, optimizer, pruner)
        for weight in ("0.weight", "4.weight"):
            assert torch.equal(model.get_parameter(weight) == 0, ~pruner.masks[weight])


def test_counts_optimizer_steps_not_calls() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.5, end=4, every=2)
    for call in range(12):
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 4, (16,))).backward()
        if call % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        pruner.step()
        assert pruner.steps == (call + 1) // 3
    assert pruner.sparsity == 0.5


def test_an_update_due_between_two_calls_is_not_lost() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.5, end=4, every=4)
    for _ in range(6):
        step(model, optimizer)
    pruner.step()
    assert (pruner.steps, pruner.sparsity) == (6, 0.5)


def test_without_an_optimizer_every_call_is_a_step() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GlobalMagnitude(model, None, sparsity=0.5)
    step(model, optimizer, pruner)
    assert pruner.steps == 1
    assert torch.equal(model[0].weight == 0, ~pruner.masks["0.weight"])


def test_scheduled_and_realised_sparsity() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.9, end=100, every=10)
    seen = []
    for _ in range(12):
        step(model, optimizer, pruner)
        seen.append((pruner.scheduled, pruner.sparsity))
    curve = Cubic(final=0.9, begin=0, end=100)
    assert [s for s, _ in seen] == [curve(t) for t in range(1, 13)]
    assert [r for _, r in seen[:9]] == [0.0] * 9
    assert seen[11][1] == seen[9][1] == pytest.approx(curve(10), abs=0.01)


def test_finalize_bakes_the_masks_and_removes_the_hooks() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.5, end=2, every=1)
    for _ in range(2):
        step(model, optimizer, pruner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = pruner.finalize()
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert same(pruner.finalize(), masks)
    with pytest.raises(OptionError, match=r"has been finalized"):
        pruner.step()


@pytest.mark.parametrize("revive", ["value", "one-step"])
def test_finalize_drops_what_was_remembered(revive: str) -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.5, end=2, every=1, revive=revive)
    for _ in range(3):
        step(model, optimizer, pruner)
    masks = pruner.finalize()
    assert torch.equal(model[0].weight != 0, masks["0.weight"])


def test_ending_early_warns_with_both_sparsities() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.9, begin=2, end=1000, every=500)
    for _ in range(3):
        step(model, optimizer, pruner)
    with pytest.warns(UserWarning, match=r"training ended at step 3, before step 1000 of the schedule, after 1 "):
        pruner.finalize()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("revive", ["never", "value", "one-step"])
def test_broken_weights_are_named_and_masks_stay(value: float, revive: str) -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.5, initial=0.2, end=2, every=1, revive=revive)
    before = pruner.masks["4.weight"].clone()
    with torch.no_grad():
        model[4].weight[before] = value
    optimizer.step()
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 4.weight at step 1"):
        pruner.step()
    assert torch.equal(pruner.masks["4.weight"], before)


def test_an_update_that_fails_at_the_start_leaves_no_hooks() -> None:
    model = net()
    optimizer = sgd(model)
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"4.weight at step 0"):
        GlobalMagnitude(model, optimizer, sparsity=0.5)
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert model[0].weight.all()


def test_debug_sees_a_weight_written_after_the_optimizer_step() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GradualMagnitude(model, optimizer, sparsity=0.5, initial=0.4, end=10, debug=True)
    for _ in range(3):
        step(model, optimizer, pruner)
    step(model, optimizer)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(ModelError, match=r"masked entries of the weight of 0.weight are not zero"):
        pruner.step()


def test_an_emptied_tensor_is_named() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"no weight is left in 1.weight"):
        GlobalMagnitude(model, sparsity=0.9, floor=0)


def test_a_state_of_another_pruner_is_refused() -> None:
    model = net()
    first = GradualMagnitude(model, None, end=2, criterion="first-order")
    with pytest.raises(PlanError, match=r"of another criterion"):
        GradualMagnitude(model, None, end=2).load_state_dict(first.state_dict())


class Regrow:
    """A rule that is no ranking at all: every update shifts the masks by one place."""

    def init(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"calls": {"all": torch.zeros(1)}}

    def update(self, moment: Moment, state: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], Any]:
        calls = int(state["calls"]["all"])
        masks = {n: (torch.arange(w.numel()).view_as(w) + calls) % 2 == 0 for n, w in moment.weights.items()}
        return masks, {"calls": {"all": state["calls"]["all"] + 1}}


def test_the_loop_takes_rules_that_regrow() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    optimizer = adam(model)
    weights = prunable_weights(model, "0")
    pruner = Pruner(model, optimizer, Cubic(final=0.5, begin=0, end=8, every=2), Regrow(), weights, debug=True)
    before = copy.deepcopy(dict(pruner.masks))
    for _ in range(2):
        step(model, optimizer, pruner)
    assert torch.equal(pruner.masks["0.weight"], ~before["0.weight"])
    assert not model[0].weight.any(), "what returns starts at zero, what goes is zero"
    step(model, optimizer, pruner)
    moving = pruner.masks["0.weight"] & (model[0].weight.grad != 0)
    assert moving.any()
    assert (model[0].weight[moving] != 0).all()
