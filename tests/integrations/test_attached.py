"""What both callbacks share: hooks on the optimizer, closures, shards, and a building that changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import secateurs as sec
from secateurs.core.errors import ModelError, OptionError, PlanError
from secateurs.integrations.attached import Attached, untouched
from tests.support.loops import BUILDS, STEPS, adam, batches, net, plain_run, zeros


class Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def backward(model: nn.Module, number: int) -> torch.Tensor:
    x, y = batches()[number]
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def run(model: nn.Module, optimizer: Optimizer, steps: Iterator[int] | range) -> None:
    for number in steps:
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("positional", [True, False])
def test_a_closure_is_run_before_the_step(name: str, positional: bool) -> None:
    model = net()
    optimizer = adam(model)
    attached = Attached(BUILDS[name], model, optimizer)
    calls: list[int] = []
    for number in range(STEPS):

        def closure(number: int = number) -> torch.Tensor:
            calls.append(number)
            optimizer.zero_grad()
            return backward(model, number)

        with torch.no_grad():
            optimizer.step(closure) if positional else optimizer.step(closure=closure)
    attached.finalize()
    assert calls == list(range(STEPS))
    for ours, theirs in zip(model.parameters(), plain_run(name).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_pruner_that_watches_no_optimizer_counts_its_steps() -> None:
    model = net()
    optimizer = adam(model)
    attached = Attached(lambda m, _: sec.GradualMagnitude(m, None, sparsity=0.5, end=4, every=1), model, optimizer)
    run(model, optimizer, range(3))
    assert attached.pruner.steps == 3
    run(model, optimizer, range(3, 5))
    assert zeros(model) == 120


def test_wrappers_are_taken_off() -> None:
    model = net()
    optimizer = adam(model)
    attached = Attached(BUILDS["gradual"], model, Wrapper(Wrapper(optimizer)))  # type: ignore[arg-type]
    run(model, optimizer, range(3))
    assert attached.pruner.steps == 3


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(OptionError, match=r"a pruner needs an optimizer of torch, got a object"):
        Attached(BUILDS["gradual"], net(), object())  # type: ignore[arg-type]


class FlatParameter(nn.Parameter):
    """What FSDP calls its own, and a test can make on one device."""


def test_shards_are_refused_by_name() -> None:
    flat, zero = net(), net()
    flat[0].weight = FlatParameter(torch.ones(160))
    zero[2].weight.ds_id = 1  # type: ignore[attr-defined]
    for model, name in ((flat, "0.weight"), (zero, "2.weight")):
        with pytest.raises(OptionError, match=rf"{name} is only a shard of a parameter .*train on one device"):
            Attached(BUILDS["gradual"], model, adam(model))


@pytest.mark.parametrize("name", BUILDS)
def test_going_on_changes_neither_weights_nor_optimizer_nor_random_state(name: str) -> None:
    model = net()
    optimizer = adam(model)
    attached = Attached(BUILDS[name], model, optimizer)
    run(model, optimizer, range(5))
    parts = (attached.state_dict(), model.state_dict(), optimizer.state_dict())
    state, weights, slots = copy.deepcopy(parts)

    def noisy(m: nn.Module, o: Optimizer) -> Any:
        torch.rand(3)
        return BUILDS[name](m, o)

    again = net(8)
    other = adam(again)
    again.load_state_dict(weights)
    other.load_state_dict(slots)
    before = torch.get_rng_state()
    resumed = Attached(noisy, again, other, state)
    assert torch.equal(torch.get_rng_state(), before)
    run(model, optimizer, range(5, STEPS))
    run(again, other, range(5, STEPS))
    for one in (attached, resumed):
        one.finalize()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert zeros(again) == 180


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = net()
    optimizer = adam(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PlanError, match=r"of another criterion than this pruner's"):
            Attached(BUILDS["gradual"], model, optimizer, {"step": 1, "soft": None})
    for ours, before in zip(model.parameters(), net().parameters(), strict=True):
        assert torch.equal(ours, before)
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_what_the_build_refuses_leaves_no_hooks() -> None:
    model = net()
    optimizer = adam(model)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 0.weight"):
        Attached(BUILDS["gradual"], model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("name", BUILDS)
def test_the_sparsity_is_that_of_now(name: str) -> None:
    model = net()
    optimizer = adam(model)
    attached = Attached(BUILDS[name], model, optimizer)
    for number in range(STEPS):
        run(model, optimizer, range(number, number + 1))
        assert attached.sparsity == attached.pruner.sparsity
    attached.finalize()
    assert attached.sparsity == attached.pruner.sparsity == 0.75


def test_finalizing_twice_keeps_the_first_state() -> None:
    model = net()
    optimizer = adam(model)
    attached = Attached(BUILDS["pdp"], model, optimizer)
    run(model, optimizer, range(STEPS))
    attached.finalize()
    stored = attached.state_dict()
    assert attached.finalized
    assert stored["soft"] is not None
    attached.finalize()
    assert attached.state_dict() is stored


def test_untouched_puts_back_in_place_though_the_body_raises() -> None:
    tensor = torch.arange(3.0)
    address = tensor.data_ptr()

    def break_off() -> None:
        with untouched([tensor]):
            tensor.fill_(7.0)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        break_off()
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert tensor.data_ptr() == address
