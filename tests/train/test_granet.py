"""GraNet, RigL and SET in a training loop."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.core.allocate import allocate
from secateurs.core.errors import BudgetError, ModelError, OptionError
from secateurs.core.state import flatten, read_state, write_state
from secateurs.train import SET, GradualMagnitude, GraNet, Pruner, RigL

NAMES = ("0.weight", "2.weight")


def net(seed: int = 3, widths: tuple[int, int, int] = (12, 20, 4)) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:]))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 12, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x[part]), y[part])


def train(model: nn.Module, optimizer: Optimizer, pruner: Pruner, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        pruner.step()


def masks_of(pruner: Pruner) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in pruner.masks.items()}


def kept(pruner: Pruner) -> list[int]:
    return [int(mask.sum()) for mask in pruner.masks.values()]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what it is --------------------------------------------------------------------------------------------------------


def test_the_total_follows_the_curve_exactly_from_a_sparse_start() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GraNet(model, optimizer, until=40, end=20, every=5, sparsity=0.9, debug=True)
    assert sum(kept(pruner)) == 160
    for step in range(1, 46):
        train(model, optimizer, pruner, 1, step)
        last = min(step - step % 5, 20)
        assert sum(kept(pruner)) == round(320 * (1 - (0.9 - 0.4 * (1 - last / 20) ** 3)))
    assert sum(kept(pruner)) == 32


def test_the_start_is_erk_with_exact_counts_and_follows_the_seed() -> None:
    wanted = allocate("erk", {"0.weight": 240, "2.weight": 80}, 64, shapes={"0.weight": (20, 12), "2.weight": (4, 20)})
    models = [net(), net(), net()]
    seeds = (1, 1, 2)
    made = [RigL(m, sgd(m), until=9, sparsity=0.8, seed=seed) for m, seed in zip(models, seeds, strict=True)]
    assert [kept(pruner) for pruner in made] == [[wanted[name] for name in NAMES]] * 3
    assert equal(masks_of(made[0]), masks_of(made[1]))
    assert not equal(masks_of(made[0]), masks_of(made[2]))


def test_a_dense_start_is_dense() -> None:
    model = net()
    pruner = GraNet(model, sgd(model), until=40, every=5, initial=0)
    assert pruner.sparsity == 0
    assert all(bool((model.get_parameter(name) != 0).all()) for name in NAMES)


def test_the_defaults_are_the_paper_s() -> None:
    model = net()
    pruner = GraNet(model, sgd(model), until=62_560)
    assert [t for t in range(70_000) if pruner.schedule.due(t)][:3] == [0, 1000, 2000]
    assert pruner.schedule(0) == 0.5
    assert pruner.schedule(31_280) == pruner.schedule.final == 0.9
    assert pruner.schedule(31_000) < 0.9
    rule = pruner._rule
    assert (rule.share(0), rule.share(62_560), rule.grow) == (0.5, 0.005, "gradient")


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["gradient", "random", "momentum"]),
    st.sampled_from([sgd, adam]),
    st.floats(0.1, 0.95),
    st.floats(0.05, 0.9),
    st.integers(0, 99),
)
def test_a_sparse_to_sparse_step_keeps_the_number_of_non_zeros(
    grow: str, make: Callable[[nn.Module], Optimizer], sparsity: float, share: float, seed: int
) -> None:
    """Of every tensor at every step; and what is masked is zero, in weights and in the optimizer."""
    model = net(seed)
    optimizer = make(model)
    pruner = RigL(
        model, optimizer, until=9, every=3, sparsity=sparsity, share=share, grow=grow, seed=seed, floor=2, debug=True
    )
    counts = kept(pruner)
    for step in range(1, 11):
        train(model, optimizer, pruner, 1, step)
        assert kept(pruner) == counts
        for name in NAMES:
            assert int((model.get_parameter(name) != 0).sum()) <= int(pruner.masks[name].sum())
        pruner.masks.check()


# -- its parts are settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_without_exchange_it_is_gradual_magnitude_bit_for_bit(
    make: Callable[[nn.Module], Optimizer], allocation: str
) -> None:
    ours, theirs = net(), net()
    optimizers = make(ours), make(theirs)
    curve = {"sparsity": 0.9, "begin": 4, "end": 24, "every": 5, "allocation": allocation}
    granet = GraNet(ours, optimizers[0], until=40, share=0, initial=0, **curve)
    gradual = GradualMagnitude(theirs, optimizers[1], **curve)
    for step in range(45):
        train(ours, optimizers[0], granet, 1, step)
        train(theirs, optimizers[1], gradual, 1, step)
        assert equal(ours.state_dict(), theirs.state_dict())
    assert equal(masks_of(granet), masks_of(gradual))


def test_at_constant_sparsity_it_is_rigl_bit_for_bit() -> None:
    ours, theirs = net(), net()
    optimizers = sgd(ours), sgd(theirs)
    granet = GraNet(
        ours, optimizers[0], until=30, every=5, sparsity=0.8, initial=0.8, share=0.3, last_share=0.0, seed=4
    )
    rigl = RigL(theirs, optimizers[1], until=30, every=5, sparsity=0.8, seed=4)
    before = masks_of(rigl)
    train(ours, optimizers[0], granet, 35)
    train(theirs, optimizers[1], rigl, 35)
    assert equal(ours.state_dict(), theirs.state_dict())
    assert not equal(masks_of(rigl), before)


def test_set_is_rigl_with_random_growth_and_needs_no_optimizer() -> None:
    def trained(make: Callable[[nn.Module, Optimizer], Pruner]) -> dict[str, Tensor]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pruner = make(model, optimizer)
        train(model, optimizer, pruner, 12)
        return masks_of(pruner)

    common: dict[str, Any] = {"until": 10, "every": 2, "sparsity": 0.8}
    unwatched = trained(lambda model, optimizer: SET(model, **common))
    assert equal(unwatched, trained(lambda model, optimizer: SET(model, optimizer, **common)))
    rigl = {"grow": "random", "start": "er", "last_share": 0.3}
    assert equal(unwatched, trained(lambda model, optimizer: RigL(model, optimizer, **common, **rigl)))
    assert not equal(unwatched, trained(lambda model, optimizer: RigL(model, optimizer, start="er", **common)))


def test_the_share_of_set_never_falls_and_that_of_rigl_does() -> None:
    def moved(make: Callable[..., Pruner]) -> list[int]:
        model = net(widths=(12, 200, 4))
        optimizer = sgd(model)
        pruner = make(model, optimizer, until=50, every=10, sparsity=0.5)
        counts = []
        for step in range(0, 50, 10):
            before = masks_of(pruner)["0.weight"]
            train(model, optimizer, pruner, 10, step)
            counts.append(int((before & ~pruner.masks["0.weight"]).sum()))
        return counts

    assert max(moved(SET)) < 1.7 * min(moved(SET))
    rigl = moved(RigL)
    assert rigl[0] > 3 * rigl[3]
    assert rigl[4] == 0


# -- dense gradients ---------------------------------------------------------------------------------------------------


def dense_twin(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Gradients of the whole batch in a model without masks' hooks."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = None
        parameter._post_accumulate_grad_hooks = None
    loss(twin, step).backward()
    return {name: twin.get_parameter(name).grad for name in NAMES}


def largest_outside(gradient: Tensor, taken: Tensor, count: int) -> Tensor:
    flat, mask = gradient.flatten(), taken.flatten().clone()
    order = sorted((~mask).nonzero().flatten().tolist(), key=lambda i: -abs(flat[i]))
    mask[order[:count]] = True
    return mask.view_as(taken)


@pytest.mark.parametrize("how", ["plain", "accumulated", "in place", "closure", "scaled", "clipped"])
@pytest.mark.parametrize("make", [sgd, adam])
def test_what_grows_had_the_largest_gradient_of_the_step(how: str, make: Callable[[nn.Module], Optimizer]) -> None:
    model = net()
    optimizer = make(model)
    pruner = RigL(model, optimizer, until=8, every=4, sparsity=0.7, share=0.4, last_share=0.4, start="uniform")
    train(model, optimizer, pruner, 3)
    gradients, before = dense_twin(model, 3), masks_of(pruner)
    optimizer.zero_grad(set_to_none=how != "in place")
    if how == "accumulated":
        for part in (slice(0, 8), slice(8, 16)):
            (loss(model, 3, part) / 2).backward()
    elif how != "closure":
        (loss(model, 3) * (1024 if how == "scaled" else 1)).backward()
    if how == "scaled":
        for parameter in model.parameters():
            parameter.grad.div_(1024)
    if how == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, 3)
        value.backward()
        return value

    optimizer.step(closure) if how == "closure" else optimizer.step()
    trained = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    pruner.step()
    for name in NAMES:
        live = int(before[name].sum())
        going = math.ceil(0.4 * live)
        stays = torch.zeros_like(before[name]).flatten()
        stays[trained[name].flatten().abs().topk(live - going).indices] = True
        stays = stays.view_as(before[name])
        assert torch.equal(pruner.masks[name], largest_outside(gradients[name], stays, going))
        assert torch.equal(model.get_parameter(name) != 0, stays)


def test_gradients_are_dense_at_the_steps_that_look_at_them_and_at_no_other() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = RigL(model, optimizer, until=8, every=4, sparsity=0.7)
    for step in range(1, 14):
        optimizer.zero_grad()
        loss(model, step).backward()
        hidden = [bool(model.get_parameter(name).grad[~pruner.masks[name]].any()) for name in NAMES]
        assert hidden == [step == 4] * 2, "the share is 0 at step 8"
        optimizer.step()
        assert not any(bool(model.get_parameter(name).grad[~pruner.masks[name]].any()) for name in NAMES)
        pruner.step()
        assert pruner.state_dict()["rule"] == {"seen": {}, "owed": {}}


def test_the_weights_of_a_step_do_not_depend_on_whether_its_gradient_was_looked_at() -> None:
    ours, theirs = net(), net()
    optimizers = adam(ours), adam(theirs)
    rigl = RigL(ours, optimizers[0], until=8, every=4, sparsity=0.7)
    still = RigL(theirs, optimizers[1], until=8, every=4, sparsity=0.7, share=0, last_share=0)
    train(ours, optimizers[0], rigl, 3)
    train(theirs, optimizers[1], still, 3)
    for model, optimizer in ((ours, optimizers[0]), (theirs, optimizers[1])):
        optimizer.zero_grad()
        loss(model, 3).backward()
        optimizer.step()
    assert equal(ours.state_dict(), theirs.state_dict())


def test_a_step_that_was_skipped_leaves_nothing_behind() -> None:
    """As a GradScaler does after an overflow: gradients are thrown away and the optimizer does not step."""
    ours, theirs = net(), net()
    optimizers = sgd(ours), sgd(theirs)
    pruners = [RigL(m, o, until=8, every=4, sparsity=0.7) for m, o in zip((ours, theirs), optimizers, strict=True)]
    train(ours, optimizers[0], pruners[0], 3)
    train(theirs, optimizers[1], pruners[1], 3)
    optimizers[0].zero_grad()
    (loss(ours, 77) * torch.inf).backward()
    pruners[0].step()
    assert pruners[0].steps == 3
    train(ours, optimizers[0], pruners[0], 6, 3)
    train(theirs, optimizers[1], pruners[1], 6, 3)
    assert equal(masks_of(pruners[0]), masks_of(pruners[1]))
    assert equal(ours.state_dict(), theirs.state_dict())


def test_a_grad_scaler_s_overflow_is_no_step() -> None:
    """Calls 1 and 2 overflow where the exchange of step 2 is due: it falls on the first step that is taken."""
    model = net()
    optimizer = sgd(model)
    pruner = RigL(model, optimizer, until=8, every=2, sparsity=0.7, start="uniform", debug=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    counts, skipped, calls = kept(pruner), 0, 0
    while pruner.steps < 8:
        before = masks_of(pruner)
        optimizer.zero_grad()
        scaler.scale(loss(model, calls) * (torch.inf if calls in (1, 2) else 1)).backward()
        taken = pruner.steps
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        calls += 1
        skipped += pruner.steps == taken
        assert equal(before, masks_of(pruner)) == (pruner.steps == taken or pruner.steps not in (2, 4, 6))
    assert kept(pruner) == counts
    assert skipped == 2


def test_under_autocast_counts_stay_and_training_goes_on() -> None:
    model = net()
    optimizer = adam(model)
    pruner = GraNet(model, optimizer, until=20, every=4, sparsity=0.8, debug=True)
    for step in range(24):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, step)
        value.backward()
        optimizer.step()
        pruner.step()
    assert sum(kept(pruner)) == 64


def test_bfloat16_weights() -> None:
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = RigL(model, optimizer, until=8, every=2, sparsity=0.8)
    counts = kept(pruner)
    for step in range(10):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
        pruner.step()
    assert kept(pruner) == counts


def test_two_optimizers_share_the_masks() -> None:
    """Each steps one layer; the gradient of both is taken when the first of them steps."""
    for order in ((0, 1), (1, 0)):
        model = net()
        optimizers = [torch.optim.SGD(model[i].parameters(), 0.1, momentum=0.9) for i in (0, 2)]
        pruner = RigL(model, optimizers[0], until=8, every=2, sparsity=0.7, start="uniform", debug=True)
        pruner.masks.watch(optimizers[1])
        before, counts = masks_of(pruner), kept(pruner)
        for step in range(8):
            model.zero_grad()
            loss(model, step).backward()
            for index in order:
                optimizers[index].step()
            pruner.step()
            pruner.masks.check()
        assert kept(pruner) == counts
        assert all(not torch.equal(pruner.masks[name], before[name]) for name in NAMES)


def test_a_weight_without_a_gradient_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(12, 4), "idle": nn.Linear(12, 4)})
    optimizer = sgd(model)
    pruner = RigL(model, optimizer, until=8, every=2, sparsity=0.7)
    for step in range(2):
        optimizer.zero_grad()
        loss(model["used"], step).backward()
        if step == 0:
            optimizer.step()
            pruner.step()
    with pytest.raises(ModelError, match=r"idle.weight had no gradient at step 2, .* leave it out with ignore="):
        optimizer.step()


# -- what grows starts anew --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("grow", ["gradient", "random", "momentum"])
def test_what_grows_starts_at_zero_with_a_fresh_optimizer_state(
    make: Callable[[nn.Module], Optimizer], grow: str
) -> None:
    """Also where it was dropped in the same update: at 30% sparsity and half exchanged, some must come back at once."""
    model = net()
    optimizer = make(model)
    pruner = RigL(model, optimizer, until=20, every=4, sparsity=0.3, share=0.5, grow=grow)
    train(model, optimizer, pruner, 3)
    optimizer.zero_grad()
    loss(model, 3).backward()
    optimizer.step()
    trained, before = copy.deepcopy(model.state_dict()), masks_of(pruner)
    pruner.step()
    returned = 0
    for name in NAMES:
        weight, mask = model.get_parameter(name), pruner.masks[name]
        stays = weight != 0
        live = int(before[name].sum())
        if live == mask.numel():
            continue
        assert int(stays.sum()) == live - math.ceil(pruner._rule.share(4) * live)
        assert torch.equal(weight[stays], trained[name][stays])
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert not value[~stays].any()
                assert value[stays].any()
        returned += int((before[name] & mask & ~stays).sum())
    assert returned


@pytest.mark.parametrize("make", [sgd, adam])
def test_what_grew_learns(make: Callable[[nn.Module], Optimizer]) -> None:
    model = net()
    optimizer = make(model)
    pruner = RigL(model, optimizer, until=4, every=4, sparsity=0.7, share=0.5, last_share=0.5)
    before = masks_of(pruner)
    train(model, optimizer, pruner, 6)
    for name in NAMES:
        fresh = pruner.masks[name] & ~before[name]
        assert fresh.any()
        assert (model.get_parameter(name)[fresh] != 0).all()


def test_momentum_looks_at_every_step() -> None:
    """The last gradient alone would grow other weights than the mean of all of them."""

    def grown(grow: str) -> dict[str, Tensor]:
        model = net()
        optimizer = sgd(model)
        pruner = RigL(model, optimizer, until=12, every=10, sparsity=0.8, share=0.5, last_share=0.5, grow=grow)
        train(model, optimizer, pruner, 10)
        return masks_of(pruner)

    found = [grown(grow) for grow in ("gradient", "momentum", "random")]
    assert all(not equal(a, b) for a, b in itertools.combinations(found, 2))


# -- stopping and going on ---------------------------------------------------------------------------------------------

PRUNERS: dict[str, Callable[[nn.Module, Optimizer], Pruner]] = {
    "sparse": lambda m, o: GraNet(m, o, until=19, every=3, sparsity=0.8),
    "dense": lambda m, o: GraNet(m, o, until=19, every=3, sparsity=0.8, initial=0, begin=2, end=14),
    "blocks": lambda m, o: GraNet(m, o, until=19, every=3, sparsity=0.8, block=(2, 2)),
    "momentum": lambda m, o: GraNet(m, o, until=19, every=3, sparsity=0.8, grow="momentum"),
    "rigl": lambda m, o: RigL(m, o, until=19, every=3, sparsity=0.8),
    "set": lambda m, o: SET(m, o, until=19, every=3, sparsity=0.8, seed=2),
}


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("name", PRUNERS)
def test_resumed_equals_uninterrupted_bit_for_bit(
    name: str, make: Callable[[nn.Module], Optimizer], tmp_path: Path
) -> None:
    """Stopped after each of the steps 8 to 10, of which 9 is one with an exchange."""
    for stop in (8, 9, 10):
        whole, resumed = (built(name, make) for _ in range(2))
        train(*whole, stop)
        states = {str(i): part.state_dict() for i, part in enumerate(whole)}
        write_state(tmp_path / "state", states)
        stored = read_state(tmp_path / "state")
        for i, part in enumerate(resumed):
            part.load_state_dict(stored[str(i)])
        for parts in (whole, resumed):
            train(*parts, 22 - stop, first=stop)
        for one, other in zip(whole, resumed, strict=True):
            flat = [flatten(part.state_dict()) for part in (one, other)]
            assert equal(flat[0][0], flat[1][0])
            assert flat[0][1] == flat[1][1]
        assert sum(kept(whole[2])) == 64 or name == "blocks"


def built(name: str, make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, Optimizer, Pruner]:
    model = net()
    optimizer = make(model)
    return model, optimizer, PRUNERS[name](model, optimizer)


def test_finalize_bakes_the_masks_and_removes_the_hooks() -> None:
    model, optimizer, pruner = built("sparse", sgd)
    train(model, optimizer, pruner, 21)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = pruner.finalize()
    assert all(torch.equal(model.get_parameter(name) != 0, masks[name]) for name in NAMES)
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks
    loss(model, 1).backward()
    assert bool(model[0].weight.grad[~masks["0.weight"]].any())


def test_ending_before_the_last_exchange_warns() -> None:
    model, optimizer, pruner = built("sparse", sgd)
    train(model, optimizer, pruner, 12)
    with pytest.warns(UserWarning, match="training ended at step 12, before step 19 of the schedule"):
        pruner.finalize()


# -- allocations, blocks, refusals -------------------------------------------------------------------------------------


def test_the_code_s_uniform_variant() -> None:
    """1000 weights, 100 of them the classifier's, at 90%: it keeps 20, the others 80 of 900, a sparsity of 0.911111."""
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((12, 25, 20, 5, 20))))
    optimizer = sgd(model)
    pruner = GraNet(
        model, optimizer, until=4, every=1, end=2, initial=0, allocation="uniform+", dense_first=False, debug=True
    )
    train(model, optimizer, pruner, 4)
    counts = kept(pruner)
    assert counts[3] == 20
    assert sum(counts) == 100
    assert 1 - sum(counts[:3]) / 900 == pytest.approx(0.911111, abs=1e-6)


def test_a_mapping_gives_densities() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GraNet(model, optimizer, until=8, every=2, sparsity=0.75, initial=0,
                    allocation={"0.weight": 0.1, "2.weight": 0.7})  # fmt: skip
    train(model, optimizer, pruner, 8)
    assert kept(pruner) == [24, 56]


def test_blocks_come_and_go_whole() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = GraNet(model, optimizer, until=16, every=2, sparsity=0.75, block=(4, 1), floor=4, debug=True)
    before = masks_of(pruner)
    assert pruner.sparsity == 0.5
    for step in range(18):
        train(model, optimizer, pruner, 1, step)
        for name in NAMES:
            blocks = pruner.masks[name].view(-1, 4, pruner.masks[name].shape[1])
            assert torch.equal(blocks.all(1), blocks.any(1))
    assert pruner.sparsity == 0.75
    assert bool((pruner.masks["0.weight"] & ~before["0.weight"]).any())


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.LazyLinear(4))
    x, y = torch.randn(6, 3, 6, 6), torch.randint(0, 4, (6,))
    model(x)
    optimizer = sgd(model)
    pruner = GraNet(model, optimizer, until=8, every=2, sparsity=0.9, debug=True)
    total = sum(mask.numel() for mask in pruner.masks.values())
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
    assert sum(kept(pruner)) == round(total * 0.1)
    assert all(kept(pruner))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.4}, r"final 0.4 is below initial 0.5"),
        ({"end": 5, "begin": 5}, r"end must come after begin, got begin 5 and end 5"),
        ({"share": 1.0}, r"first share must lie in \[0, 1\), got 1.0"),
        ({"share": 0.1, "last_share": 0.2}, r"last share must lie between 0 and the first \(0.1\), got 0.2"),
        ({"grow": "hope"}, r"unknown way to grow 'hope'"),
        ({"until": 0}, r"it must be 1 or more, got 0"),
        ({"start": "global"}, r"ranks scores"),
        ({"allocation": "uniform", "power": 2}, r"allocation 'uniform' has no option power"),
        ({"smoothing": -1}, r"smoothing must lie in \[0, 1\), got -1"),
        ({"every": 0}, r"every must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd(model)
    with pytest.raises(OptionError, match=message):
        GraNet(model, optimizer, **{"until": 20, "every": 2, **options})
    assert equal(before, model.state_dict())
    assert not optimizer._optimizer_step_post_hooks


def test_floors_above_the_budget_are_refused_at_once() -> None:
    model = net()
    with pytest.raises(BudgetError, match=r"floors of the groups add up to 40"):
        GraNet(model, sgd(model), until=20, sparsity=0.9, floor=20)


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_gradients_need_the_optimizer(grow: str) -> None:
    with pytest.raises(OptionError, match=rf"grow='{grow}' looks at gradients, so it needs the optimizer"):
        GraNet(net(), None, until=20, grow=grow)
    assert GraNet(net(), None, until=20, share=0).sparsity == 0.5
