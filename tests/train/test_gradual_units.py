"""Units that go a few at a time: counts, averages, masks that never reopen, and runs that resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError, PlanError
from secateurs.core.schedule import Cubic, Linear, OneShot
from secateurs.core.units import ChannelGroup, Group
from secateurs.graph.infer import infer
from secateurs.train import GradualUnits
from secateurs.train.gradual_units import gone_at

INPUTS = torch.linspace(-1, 1, 24).view(4, 6)
SIZE = 10
Scores = Callable[[], Mapping[str, Tensor]]


def net() -> nn.Sequential:
    """6 → 10 → 3 with a batch norm and a sigmoid, which is not zero at zero."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, SIZE), nn.BatchNorm1d(SIZE), nn.Sigmoid(), nn.Linear(SIZE, 3))


def groups_of(model: nn.Module) -> tuple[ChannelGroup, ...]:
    return infer(model, INPUTS, entangled=False).groups


def half(scores: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: len(values) // 2 for name, values in scores.items()}


def magnitudes(model: nn.Module) -> Scores:
    return lambda: {"0": model[0].weight.detach().abs().sum(1)}


def fixed(values: Tensor) -> Scores:
    return lambda: {"0": values}


RAMP = Cubic(final=0.5, begin=2, end=14, every=3)


def pruned(
    model: nn.Module, score: Scores | None = None, *, lr: float = 0.1, optimizer: Any = None, **options: Any
) -> tuple[GradualUnits, Any]:
    made = optimizer or torch.optim.Adam(model.parameters(), lr)
    settings: dict[str, Any] = {"schedule": RAMP, "counts": half, **options}
    schedule, counts = settings.pop("schedule"), settings.pop("counts")
    pruner = GradualUnits(model, made, groups_of(model), schedule, score or magnitudes(model), counts, **settings)
    return pruner, made


def train(model: nn.Module, pruner: GradualUnits, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        optimizer.step()
        pruner.step()


def test_the_curve_of_the_specification_and_its_shortfall() -> None:
    curve = Cubic(final=0.5, begin=100, end=900, every=10)
    found = [round(curve(t), 7) for t in (100, 110, 300, 500, 700, 900)]
    assert found == [0, 0.0185166, 0.2890625, 0.4375, 0.4921875, 0.5]
    # Released: only where s < 0.5, so that the last removal is at step 890.
    last = max(t for t in range(0, 1000, 10) if 0 < curve(t) < 0.5)
    assert last == 890
    assert round(curve(last), 6) == 0.499999
    assert (int(32 * curve(last)), int(11008 * curve(last))) == (15, 5503)
    # Here: the end of the curve is a step of removal.
    due = [t for t in range(1001) if curve.due(t)]
    assert due[-1] == 900
    assert [gone_at(16, curve(t) / 0.5) for t in (890, 900)] == [15, 16]
    assert gone_at(5504, curve(900) / 0.5) == 5504


@given(st.integers(0, 500), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_ever_more_has_gone_and_never_more_than_shall(gone: int, shares: list[float]) -> None:
    found = [gone_at(gone, share) for share in sorted(shares)]
    assert found == sorted(found)
    assert all(0 <= n <= gone for n in found)
    assert gone_at(gone, 1.0) == gone


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_constant_score_is_averaged_from_zero(steps: int) -> None:
    values = torch.arange(1.0, SIZE + 1)
    model = net()
    pruner, optimizer = pruned(model, fixed(values), schedule=Cubic(final=0.5, begin=20, end=30, every=5))
    train(model, pruner, optimizer, steps)
    torch.testing.assert_close(pruner.scores["0"], (1 - 0.9**steps) * values)
    assert pruner.observed == steps
    if steps == 10:
        assert pruner.scores["0"][0].item() == pytest.approx(0.6513, abs=5e-5)


def test_what_has_gone_stays_away_and_every_count_is_met() -> None:
    model, history = net(), []
    generator = torch.Generator().manual_seed(1)
    # Other scores each time: what went would be wanted back.
    pruner, optimizer = pruned(model, lambda: {"0": torch.rand(SIZE, generator=generator)}, decay=0.0)
    for _ in range(20):
        train(model, pruner, optimizer, 1)
        history.append(pruner.kept["0"])
    assert all(not bool((later & ~before).any()) for before, later in pairwise(history))
    share = {t: RAMP(t) / 0.5 for t in range(1, 21)}
    due = [t for t in range(1, 21) if RAMP.due(t)]
    gone = 0
    for t in range(1, 21):
        gone = int(5 * share[t] + 1e-9) if t in due else gone
        assert int((~history[t - 1]).sum()) == gone
    assert gone == 5
    assert pruner.sparsity == 0.5


def test_a_unit_of_score_zero_does_not_bring_back_what_has_gone() -> None:
    values = torch.tensor([0.0] * 8 + [1.0, 2.0])
    model = net()
    pruner, optimizer = pruned(model, fixed(values))
    train(model, pruner, optimizer, 5)
    first = pruner.kept["0"]
    assert first.tolist() == [True] * 6 + [False] * 2 + [True] * 2
    train(model, pruner, optimizer, 10)
    assert not bool((pruner.kept["0"] & ~first).any())
    # Earlier indices stay among equals.
    assert pruner.finalize()["0"].tolist() == [True] * 3 + [False] * 5 + [True] * 2


def test_the_lowest_average_goes() -> None:
    values = torch.tensor([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 10])
    model = net()
    pruner, optimizer = pruned(model, fixed(values))
    train(model, pruner, optimizer, 20)
    assert pruner.finalize()["0"].tolist() == (values > 5).tolist()


@pytest.mark.parametrize("frozen", [False, True])
def test_removed_units_are_zero_in_all_that_carries_them_trained_or_not(frozen: bool) -> None:
    model = net()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "3.weight")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    pruner, _ = pruned(model, optimizer=optimizer, debug=True)
    train(model, pruner, optimizer, 20)
    gone = ~pruner.finalize()["0"]
    assert int(gone.sum()) == 5
    for parameter in (model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[3].weight.T):
        assert not bool(parameter[gone].any())
    assert all(bool((parameter[~gone] != 0).all()) for parameter in (model[0].weight, model[3].weight.T))
    assert not any(m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_scores_are_taken_from_the_gradients_that_the_optimizer_sees() -> None:
    model, seen = net(), []

    def score() -> dict[str, Tensor]:
        assert model[0].weight.grad is not None
        seen.append((model[0].weight.detach().clone(), model[0].weight.grad.clone()))
        return {"0": torch.ones(SIZE)}

    pruner, optimizer = pruned(model, score, optimizer=torch.optim.SGD(model.parameters(), 0.5))
    model(INPUTS).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before, gradient = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    optimizer.step()
    pruner.step()
    assert torch.equal(seen[0][0], before)
    assert torch.equal(seen[0][1], gradient)


def test_a_score_that_is_none_is_left_out_counted_and_told() -> None:
    calls = iter(range(100))

    def score() -> dict[str, Tensor]:
        values = torch.ones(SIZE)
        if next(calls) in (1, 3):
            values[4] = torch.nan if pruner.skipped else torch.inf
        return {"0": values}

    model = net()
    pruner, optimizer = pruned(model, score)
    train(model, pruner, optimizer, 5)
    assert (pruner.observed, pruner.skipped) == (3, 2)
    torch.testing.assert_close(pruner.scores["0"][pruner.kept["0"]].max(), torch.tensor(1 - 0.9**3))
    train(model, pruner, optimizer, 10)
    with pytest.warns(UserWarning, match=r"scores were not finite at 2 of 15 steps and were left out"):
        pruner.finalize()


def test_nothing_goes_by_scores_that_are_all_broken() -> None:
    model = net()
    pruner, optimizer = pruned(model, fixed(torch.full((SIZE,), torch.nan)))
    with pytest.raises(ModelError, match="the scores of all 5 steps so far are not finite: lower the learning rate"):
        train(model, pruner, optimizer, 5)


def test_counts_are_asked_once_with_the_first_average() -> None:
    asked: list[Tensor] = []

    def counts(scores: Mapping[str, Tensor]) -> dict[str, int]:
        asked.append(scores["0"])
        return {"0": 3}

    model = net()
    pruner, optimizer = pruned(model, fixed(torch.ones(SIZE)), counts=counts)
    train(model, pruner, optimizer, 20)
    assert len(asked) == 1
    torch.testing.assert_close(asked[0], torch.full((SIZE,), 1 - 0.9**5))
    assert int(pruner.finalize()["0"].sum()) == 3


@pytest.mark.parametrize("stop", [1, 4, 9, 15])
def test_a_stopped_run_goes_on_to_the_same_bits(stop: int) -> None:
    whole = net()
    pruner, optimizer = pruned(whole)
    train(whole, pruner, optimizer, 20)
    first = net()
    before, one = pruned(first)
    train(first, before, one, stop)
    second = net()
    after, two = pruned(second)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(one.state_dict())
    after.load_state_dict(before.state_dict())
    train(second, after, two, 20 - stop)
    assert torch.equal(after.finalize()["0"], pruner.finalize()["0"])
    assert torch.equal(after.scores["0"], pruner.scores["0"])
    assert (after.observed, after.steps) == (pruner.observed, pruner.steps) == (20, 20)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_target_of_nothing_removes_nothing() -> None:
    model = net()
    pruner, optimizer = pruned(model, schedule=Cubic(final=0.0, begin=1, end=5, every=2), counts=lambda s: {"0": SIZE})
    train(model, pruner, optimizer, 6)
    assert pruner.scheduled == 0
    assert bool(pruner.finalize()["0"].all())


def test_an_early_end_is_told_and_the_end_is_the_end() -> None:
    model = net()
    pruner, optimizer = pruned(model)
    train(model, pruner, optimizer, 6)
    with pytest.warns(
        UserWarning, match=r"training ended at step 6, before step 14 of the schedule: sparsity is 0\.[12]"
    ):
        kept = pruner.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pruner.finalize()["0"], kept["0"])
    with pytest.raises(OptionError, match="has been finalized"):
        pruner.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1\.0"),
        ({"schedule": OneShot(0.5)}, "50% would go at step 0, when no unit has a score: begin later"),
        ({"schedule": Linear(final=0.5, begin=0, end=9, initial=0.25)}, "25% would go at step 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pruned(net(), **options)


def test_an_optimizer_of_another_model_is_refused_and_leaves_no_hook() -> None:
    other = torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(OptionError, match="holds no parameter that carries units; build it from those of this very"):
        pruned(net(), optimizer=other)
    assert not other._optimizer_step_pre_hooks


def test_the_state_of_other_units_is_refused() -> None:
    pruner, _ = pruned(net())
    state = pruner.state_dict()
    for wrong in ({}, {**state, "kept": {"0": torch.ones(3, dtype=torch.bool)}}):
        with pytest.raises(PlanError, match="of other units than this pruner's"):
            pruner.load_state_dict(wrong)


def test_a_model_without_the_members_of_a_group_is_none_of_its_business() -> None:
    model = net()
    group: Group = groups_of(model)[0]
    assert {"1.running_mean"} & set(group.tensors)
    pruner, _ = pruned(model)
    assert "1.running_mean" not in pruner._masks
