"""Masks hold: under any optimizer, precision, accumulation, device move; and violations are seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.core.errors import ModelError, OptionError, PlanError
from secateurs.train.masking import Masks, pack, unpack

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.1, t0=2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
}
KEEP = torch.tensor([[True, False, True], [False, True, True]])


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3), torch.randint(0, 2, (8,))


def backward(model: nn.Module) -> None:
    inputs, target = batch()
    nn.functional.cross_entropy(model(inputs), target).backward()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def state_of_removed(optimizer: Optimizer, weight: nn.Parameter) -> list[Tensor]:
    values = optimizer.state[weight].values()
    return [v[~KEEP] for v in values if isinstance(v, Tensor) and v.shape == weight.shape]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "masks first"])
def test_masks_hold_under_every_optimizer(name: str, before: bool) -> None:
    model = net()
    if before:
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer)
        masks = Masks(model, {"0.weight": KEEP}, debug=True).watch(optimizer)
    else:
        masks = Masks(model, {"0.weight": KEEP}, debug=True)
        optimizer = OPTIMIZERS[name](model.parameters())
        masks.watch(optimizer)
    free = model[0].weight.detach().clone()
    for _ in range(10):
        train(model, optimizer, 1)
        assert model[0].weight[~KEEP].abs().sum() == 0
        assert all(not state.any() for state in state_of_removed(optimizer, model[0].weight))
    assert (model[0].weight != free)[KEEP].all()
    assert masks.steps == 10


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_without_masks_the_same_entries_move(name: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[~KEEP] = 0
    train(model, OPTIMIZERS[name](model.parameters()))
    assert (model[0].weight[~KEEP] != 0).all()


def test_momentum_and_weight_decay_leave_zero_for_100_steps() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, 3)
    Masks(model, {"0.weight": KEEP}).watch(optimizer)
    for _ in range(100):
        train(model, optimizer, 1)
        assert torch.equal(model[0].weight[~KEEP], torch.zeros(2))


def test_a_masked_step_is_the_step_of_a_network_without_these_weights() -> None:
    """The twin has one weight fewer per row, written as its own parameter."""
    model = nn.Linear(3, 1, bias=False)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    twin = nn.Parameter(model.weight.detach()[:, :2].clone())
    Masks(model, {"weight": torch.tensor([[True, True, False]])}).watch(
        ours := torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1)
    )
    theirs = torch.optim.Adam([twin], 0.1, weight_decay=0.1)
    for _ in range(20):
        for optimizer, output in ((ours, model(x)), (theirs, x[:, :2] @ twin.T)):
            optimizer.zero_grad()
            (output - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight[:, :2], twin)


def test_gradient_accumulation() -> None:
    model = net()
    Masks(model, {"0.weight": KEEP})
    twin = copy.deepcopy(model)
    data = [batch() for _ in range(3)]
    for each in (model, twin):
        for inputs, target in data:
            nn.functional.cross_entropy(each(inputs), target).backward()
    assert not model[0].weight.grad[~KEEP].any()
    assert twin[0].weight.grad[~KEEP].all()
    assert torch.equal(model[0].weight.grad[KEEP], twin[0].weight.grad[KEEP])


def test_autocast_and_gradient_scaler() -> None:
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    masks = Masks(model, {"0.weight": KEEP}, debug=True).watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(5):
        optimizer.zero_grad()
        inputs, target = batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert masks.steps == 5
    assert not model[0].weight[~KEEP].any()


def test_a_skipped_step_is_not_counted_and_infinity_under_a_mask_is_no_overflow() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = Masks(model, {"weight": torch.tensor([[True, False]])}).watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for inputs, counted in (([1.0, torch.inf], 1), ([torch.inf, 1.0], 1), ([1.0, 1.0], 2)):
        optimizer.zero_grad()
        # The loss is not a number for some of them; the gradient is `inputs` all the same.
        scaler.scale((model.weight * torch.tensor([inputs])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert masks.steps == counted
        assert torch.isfinite(model.weight).all()


def test_infinite_gradients_under_a_mask_become_zero_not_nan() -> None:
    model = nn.Linear(2, 1, bias=False)
    Masks(model, {"weight": torch.tensor([[True, False]])})
    (model.weight * torch.tensor([[1.0, torch.inf]])).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 0.0]]


def test_a_listener_gets_the_accumulated_gradient_of_the_steps_it_wants() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = Masks(model, {"weight": torch.tensor([[True, False]])}, debug=True).watch(optimizer)
    heard: list[tuple[int, list[list[float]]]] = []
    masks.listen(lambda step: step == 2, lambda g: heard.append((masks.steps + 1, g["weight"].tolist())))
    for step in range(3):
        for inputs in ([[1.0, 2.0]], [[10.0, 20.0]]):
            (model.weight * torch.tensor(inputs)).sum().backward()
        assert model.weight.grad.tolist() == [[11.0, 22.0 if step == 1 else 0.0]]
        optimizer.step()
        assert model.weight.grad.tolist() == [[11.0, 0.0]]
        optimizer.zero_grad()
    assert heard == [(2, [[11.0, 22.0]])]
    masks.remove()


def test_closures_are_allowed_unless_values_are_remembered() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        backward(model)
        return 0.0

    with Masks(model, {"0.weight": KEEP}).watch(optimizer):
        optimizer.step(closure)
        assert not model[0].weight[~KEEP].any()
    with (
        Masks(model, {"0.weight": KEEP}, revive="value").watch(optimizer),
        pytest.raises(OptionError, match=r"without a closure"),
    ):
        optimizer.step(closure)


def test_lbfgs_is_refused() -> None:
    model = net()
    with pytest.raises(OptionError, match=r"LBFGS.*use SGD or Adam"):
        Masks(model, {"0.weight": KEEP}).watch(torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(OptionError, match=r"holds none of the masked parameters"):
        Masks(net(), {"0.weight": KEEP}).watch(torch.optim.SGD(net().parameters(), 0.1))


def test_two_optimizers_and_a_wrapped_one() -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = net()
    first = torch.optim.SGD([model[0].weight], 0.1, momentum=0.9)
    second = torch.optim.Adam([model[2].weight], 0.1)
    masks = Masks(model, {"0.weight": KEEP, "2.weight": torch.eye(2).bool()})
    masks.watch(Wrapper(first)).watch(second)  # type: ignore[arg-type]
    for _ in range(3):
        model.zero_grad()
        backward(model)
        first.step()
        second.step()
    assert masks.steps == 3
    assert not model[0].weight[~KEEP].any()
    assert not model[2].weight[~torch.eye(2).bool()].any()


def test_tied_parameters_share_one_mask_and_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    eye = torch.eye(2).bool()
    masks = Masks(model, {"1.weight": eye})
    assert list(masks) == ["0.weight"]
    assert masks["1.weight"] is masks["0.weight"]
    assert "1.weight" in masks
    assert masks.sparsity == 0.5
    Masks(model, {"0.weight": eye, "1.weight": eye})
    with pytest.raises(OptionError, match=r"1.weight is tied to 0.weight but has another mask"):
        Masks(model, {"0.weight": eye, "1.weight": ~eye})


def test_masks_broadcast_and_vectors_are_allowed() -> None:
    model = net()
    masks = Masks(model, {"0.weight": torch.tensor([[True], [False]]), "0.bias": torch.tensor([True, False])})
    assert masks["0.weight"].tolist() == [[True] * 3, [False] * 3]
    assert model[0].bias[1] == 0
    assert masks.sparsities() == {"0.weight": 0.5, "0.bias": 0.5}
    backward(model)
    assert model[0].bias.grad[1] == 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0.wight": KEEP}, "unknown parameter '0.wight'; the nearest are 0.weight"),
        ({"0.weight": KEEP.float()}, "needs a bool mask"),
        ({"0.weight": KEEP.T}, r"a mask of shape \[3, 2\] does not broadcast to 0.weight \[2, 3\]"),
        ({"0.weight": KEEP[None]}, "does not broadcast"),
    ],
)
def test_wrong_masks_are_refused_before_anything_changes(masks: dict[str, Tensor], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=message):
        Masks(model, {"0.bias": torch.tensor([False, False]), **masks})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_unknown_fate_and_unknown_parameter_in_set() -> None:
    with pytest.raises(OptionError, match=r"revive must be never, value, one-step or straight-through, got 'maybe'"):
        Masks(net(), {}, revive="maybe")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"unknown masked parameter '2.weight'"):
        Masks(net(), {"0.weight": KEEP}).set({"2.weight": torch.eye(2).bool()})
    with pytest.raises(KeyError):
        Masks(net(), {"0.weight": KEEP})["2.weight"]


def test_hooks_survive_a_move_of_the_model_and_masks_follow() -> None:
    model = net()
    masks = Masks(model, {"0.weight": KEEP})
    model.double()
    inputs, target = batch()
    nn.functional.cross_entropy(model(inputs.double()), target).backward()
    assert model[0].weight.grad.dtype == torch.float64
    assert not model[0].weight.grad[~KEEP].any()
    model.to("meta")
    assert masks["0.weight"].device.type == "meta"


def test_replaced_parameters_and_unfrozen_ones_are_gated_again() -> None:
    model = net().requires_grad_(False)
    masks = Masks(model, {"0.weight": KEEP})
    model.requires_grad_(True)
    model[0].weight = nn.Parameter(torch.randn(2, 3))
    masks.apply()
    backward(model)
    assert not model[0].weight.grad[~KEEP].any()
    assert model[0].weight.grad[KEEP].all()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    Masks(embedding, {"weight": torch.eye(3, 2).bool()})
    with pytest.raises(ModelError, match=r"gradient of weight is sparse"):
        embedding(torch.tensor([0])).sum().backward()


def test_leaving_the_context_removes_all_hooks_also_on_error() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ZeroDivisionError), Masks(model, {"0.weight": KEEP}).watch(optimizer):
        raise ZeroDivisionError
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 1)
    assert model[0].weight[~KEEP].all()


# -- debug -------------------------------------------------------------------------------------------------------------


def touch_weight(model: nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        model[0].weight[0, 1] = 5


def touch_gradient(model: nn.Module, optimizer: Optimizer) -> None:
    model[0].weight.grad[0, 1] = 5


def touch_state(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state[model[0].weight]["momentum_buffer"][0, 1] = 5


@pytest.mark.parametrize(
    ("violate", "what"),
    [(touch_weight, "weight"), (touch_gradient, "gradient"), (touch_state, "optimizer state 'momentum_buffer'")],
)
def test_debug_sees_a_violation(violate: Callable[[nn.Module, Optimizer], None], what: str) -> None:
    for debug in (True, False):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        Masks(model, {"0.weight": KEEP}, debug=debug).watch(optimizer)
        train(model, optimizer, 2)
        violate(model, optimizer)
        if debug:
            with pytest.raises(ModelError, match=f"1 masked entries of the {what} of 0.weight are not zero"):
                optimizer.step()
        else:
            optimizer.step()
            assert not model[0].weight[~KEEP].any()


# -- what returns ------------------------------------------------------------------------------------------------------


def test_never_revived_entries_come_back_as_zero_with_empty_state() -> None:
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    masks = Masks(model, {"0.weight": torch.ones_like(KEEP)}).watch(optimizer)
    train(model, optimizer)
    masks.set({"0.weight": KEEP})
    masks.set({"0.weight": torch.ones_like(KEEP)})
    assert not model[0].weight[~KEEP].any()
    assert all(not state.any() for state in state_of_removed(optimizer, model[0].weight))
    train(model, optimizer, 1)
    assert model[0].weight[~KEEP].all()


def test_values_wait_and_are_moved_by_weight_decay() -> None:
    """Twin: dense weights beside, whose gradient is masked and whose forward is W·M."""
    model = nn.Linear(3, 2, bias=False)
    dense = model.weight.detach().clone().requires_grad_()
    masks = Masks(model, {"weight": torch.ones_like(KEEP)}, revive="value")
    ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.SGD([dense], 0.1, momentum=0.9, weight_decay=0.1)
    masks.watch(ours)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    keep = torch.ones_like(KEEP)
    for step in range(12):
        for optimizer, output in ((ours, model(x)), (theirs, x @ (dense * keep).T)):
            optimizer.zero_grad()
            (output - y).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(model.weight, dense.detach() * keep)
        with masks.revealed():
            torch.testing.assert_close(model.weight.detach(), dense.detach())
        assert torch.equal(model.weight == 0, ~keep)
        if step == 3:
            keep = KEEP
            masks.set({"weight": KEEP})
    masks.set({"weight": torch.ones_like(KEEP)})
    torch.testing.assert_close(model.weight, dense)


def test_one_step_values_are_zero_minus_one_step() -> None:
    model = nn.Linear(3, 2, bias=False)
    masks = Masks(model, {"weight": KEEP}, revive="one-step")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.watch(optimizer)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        gradient = model.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.weight == 0, ~KEEP)
        with masks.revealed():
            torch.testing.assert_close(model.weight.detach()[~KEEP], -0.1 * gradient[~KEEP])


# -- as data -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_packing_round_trip(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack(bits, mask.shape), mask)


def test_packed_bits_are_lowest_first() -> None:
    assert pack(torch.tensor([True, False, True, False, False, False, False, False, True])).tolist() == [5, 1]


def test_unpacking_refuses_another_size() -> None:
    with pytest.raises(PlanError, match=r"2 bytes hold no mask of shape \[2, 2\], which needs 1"):
        unpack(torch.zeros(2, dtype=torch.uint8), (2, 2))


@pytest.mark.parametrize("revive", ["never", "value", "one-step"])
def test_state_goes_through_safetensors(revive: str) -> None:
    def built() -> tuple[nn.Module, Optimizer, Masks]:
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        return model, optimizer, Masks(model, {"0.weight": torch.ones_like(KEEP)}, revive=revive).watch(optimizer)

    model, optimizer, masks = built()
    masks.set({"0.weight": KEEP})
    train(model, optimizer)
    other, its_optimizer, its_masks = built()
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_masks.load_state_dict(load(save(masks.state_dict())))
    assert torch.equal(its_masks["0.weight"], KEEP)
    for m, o in ((model, optimizer), (other, its_optimizer)):
        torch.manual_seed(7)
        train(m, o)
    masks.set({"0.weight": torch.ones_like(KEEP)})
    its_masks.set({"0.weight": torch.ones_like(KEEP)})
    assert torch.equal(model[0].weight, other[0].weight)


def test_state_of_another_model_is_refused() -> None:
    state = Masks(net(), {"0.weight": KEEP}).state_dict()
    with pytest.raises(PlanError, match=r"different parameters: 0.weight, 2.weight differ"):
        Masks(net(), {"2.weight": torch.eye(2).bool()}).load_state_dict(state)
    with pytest.raises(PlanError, match=r"0.weight has shape \[2, 3\], the parameter \[3, 2\]"):
        Masks(nn.Sequential(nn.Linear(2, 3)), {"0.weight": KEEP.T}).load_state_dict(state)
    with pytest.raises(PlanError, match=r"no remembered values of 0.weight"):
        Masks(net(), {"0.weight": KEEP}, revive="value").load_state_dict(state)
