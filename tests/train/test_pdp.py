"""PDP in a training loop: counts, ramp, resuming, and what is left of it in the end."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateurs as sec
from secateurs.core.errors import BudgetError, ModelError, OptionError, PlanError
from secateurs.core.state import read_state, write_state
from secateurs.train import PDP, GradualMagnitude
from secateurs.train.pdp import Ramp, keep_at
from secateurs.train.soft import border, soft_mask
from tests.train.test_pruner import same


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 4))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), 0.02)


def step(model: nn.Module, optimizer: Optimizer, pruner: Any = None) -> None:
    inputs, target = torch.randn(16, 8), torch.randint(0, 4, (16,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), target).backward()
    optimizer.step()
    if pruner is not None:
        pruner.step()


def channels(model: nn.Module) -> Any:
    return sec.plan(model, torch.ones(2, 8), "sparsity=50%", allocation="uniform")


TIMES: dict[str, Any] = {"begin": 4, "every": 2, "rise": 0.25}
PRUNERS: dict[str, Callable[[nn.Module, Optimizer], PDP]] = {
    "weights": lambda m, o: PDP(m, o, **TIMES, sparsity=0.8),
    "absolute": lambda m, o: PDP(m, o, **TIMES, sparsity=0.8, temperature=1e-3, relative=False),
    "uniform": lambda m, o: PDP(m, o, **TIMES, sparsity=0.8, allocation="uniform"),
    "from the start": lambda m, o: PDP(m, o, **{**TIMES, "begin": 0}, sparsity=0.8),
    "2:4": lambda m, o: PDP(m, o, **TIMES, pattern="2:4"),
    "rows": lambda m, o: PDP(m, o, **TIMES, sparsity=0.5, block=(1, -1)),
    "blocks": lambda m, o: PDP(m, o, **TIMES, sparsity=0.5, block=(2, 2)),
    "channels": lambda m, o: PDP(m, o, **TIMES, sparsity=0.5, groups=channels(m).groups),
    "hard early": lambda m, o: PDP(m, o, **TIMES, sparsity=0.8, until=12),
}


def trained(name: str, steps: int = 16, make: Callable[[nn.Module], Optimizer] = sgd) -> Any:
    model = net()
    optimizer = make(model)
    pruner = PRUNERS[name](model, optimizer)
    for _ in range(steps):
        step(model, optimizer, pruner)
    return model, optimizer, pruner


# -- the ramp and the counts -------------------------------------------------------------------------------------------


def test_the_ramp_of_the_paper() -> None:
    ramp = Ramp(0.8, begin=160, every=10, rise=0.015)
    share = [ramp.share(160 + 10 * epoch) for epoch in range(70)]
    assert share[0] == pytest.approx(0.015)
    assert share[65] == pytest.approx(0.99)
    assert share[66] == share[69] == 1.0
    assert ramp.end == 160 + 660
    assert [t for t in range(200) if ramp.due(t)] == [160, 170, 180, 190]
    assert ramp.due(820)
    assert not ramp.due(830)
    assert (ramp(0), ramp(159), ramp(169), ramp(820)) == (0.0, 0.0, pytest.approx(0.012), 0.8)


def test_a_rise_of_one_is_no_ramp() -> None:
    ramp = Ramp(0.8, begin=7, every=5, rise=1)
    assert ([t for t in range(30) if ramp.due(t)], ramp.end, ramp(6), ramp(7)) == ([7], 7, 0.0, 0.8)


def test_impossible_ramps_are_refused_with_all_their_faults() -> None:
    with pytest.raises(OptionError, match=r"final .* got 1; begin .* got -1; every .* got 0; rise .* got 0"):
        Ramp(1, -1, 0, 0)


def test_the_hard_mask_keeps_the_floor_of_what_is_asked() -> None:
    """All N from 2 to 50 and r from 1% to 99%, by the sigmoid at 1/2; a threshold needs one weight on either side."""
    for size in range(2, 51):
        weights = torch.arange(1, size + 1, dtype=torch.float64)
        for percent in range(1, 100):
            keep = keep_at(size, size, percent / 100)
            assert keep == math.floor((1 - Fraction(percent, 100)) * size)
            t = border(weights[None], keep)
            stay = soft_mask(weights.square(), t, torch.tensor(1e-2, dtype=torch.float64)) >= 0.5
            assert int(stay.sum()) == min(max(keep, 1), size - 1)


def test_global_shares_are_exact_where_the_published_rule_is_not() -> None:
    """Of ten weights at 75%: 8 go (half to even), 7 by the code's threshold; at 80% both take 8."""
    for sparsity, ours, theirs in ((0.75, 8, 7), (0.8, 8, 8)):
        model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(1, 4, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[9.0, 1], [2, 3], [10, 4]]))
            model[1].weight.copy_(torch.tensor([[5.0], [6], [7], [8]]))
        ranked = sorted((w.item() for p in model.parameters() for w in p.flatten()), reverse=True)
        threshold = ranked[int((1 - sparsity) * 10)]
        assert sum(w < threshold for w in ranked) == theirs
        pruner = PDP(model, sgd(model), begin=0, every=1, rise=1, sparsity=sparsity, floor=0)
        masks = pruner.finalize()
        assert 10 - sum(int(mask.sum()) for mask in masks.values()) == ours
        assert masks["0.weight"].tolist() == [[True, False], [False, False], [True, False]]


def test_shares_are_taken_once_at_the_end_of_the_dense_start() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = PRUNERS["weights"](model, optimizer)
    for _ in range(3):
        step(model, optimizer, pruner)
        assert pruner.sparsity == 0
    step(model, optimizer)
    flat = {name: model.get_parameter(name).detach().abs().flatten() for name in ("0.weight", "4.weight")}
    pruner.step()
    threshold = torch.cat(list(flat.values())).topk(48).values[-1]
    wanted = {name: int((values >= threshold).sum()) for name, values in flat.items()}
    for _ in range(12):
        step(model, optimizer, pruner)
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == wanted
    assert sum(wanted.values()) == 48


def test_counts_follow_the_ramp() -> None:
    """160 and 80 weights at 80%, uniform: 32 and 16 stay in the end; a quarter of the rest goes every 2 steps."""
    model = net()
    optimizer = sgd(model)
    pruner = PRUNERS["uniform"](model, optimizer)
    seen = []
    for _ in range(12):
        step(model, optimizer, pruner)
        seen.append([int(mask.sum()) for mask in pruner.masks.values()])
    stairs = [[128, 64], [96, 48], [64, 32], [32, 16]]
    assert seen == [[160, 80]] * 3 + [stair for stair in stairs for _ in range(2)] + [stairs[-1]]
    assert (pruner.scheduled, pruner.sparsity, pruner.steps) == (0.8, pytest.approx(0.8), 12)


def test_sparsity_zero_is_the_dense_training_bit_for_bit() -> None:
    model, twin = net(), net()
    pairs = [(model, sgd(model)), (twin, sgd(twin))]
    pruner = PDP(*pairs[0], **TIMES, sparsity=0)
    for (m, optimizer), mine in zip(pairs, (pruner, None), strict=True):
        torch.manual_seed(0)
        for _ in range(12):
            step(m, optimizer, mine)
    assert all(bool(mask.all()) for mask in pruner.finalize().values())
    assert same(model.state_dict(), twin.state_dict())


# -- patterns ----------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As Hugging Face's: its weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_pattern_runs_along_the_inputs_wherever_they_stand() -> None:
    """A layer that holds the transposed weight is pruned to the transposed mask, after the same training."""
    plain, turned = nn.Linear(8, 6, bias=False), Conv1D(8, 6)
    with torch.no_grad():
        turned.weight.copy_(plain.weight.T)
    masks = []
    for model in (plain, turned):
        optimizer = sgd(model)
        pruner = PDP(model, optimizer, begin=1, every=1, rise=0.5, pattern="2:4")
        for seed in range(5):
            inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(inputs).square().sum(1).sub(1).square().mean().backward()
            optimizer.step()
            pruner.step()
        masks.append(pruner.finalize()["weight"])
    assert torch.equal(masks[1], masks[0].T)
    assert (masks[1].T.reshape(6, 2, 4).sum(2) == 2).all()
    # Six outputs are divided by no four, eight inputs are.
    other = Conv1D(6, 8)
    with pytest.raises(OptionError, match="a number of inputs that 4 divides; weight has 6"):
        PDP(other, sgd(other), **TIMES, pattern="2:4")


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("2:8", 2, 8)])
def test_every_run_of_a_pattern_keeps_exactly_its_number(pattern: str, keep: int, of: int) -> None:
    model = net()
    optimizer = sgd(model)
    pruner = PDP(model, optimizer, **TIMES, pattern=pattern, scope="0")
    for _ in range(14):
        step(model, optimizer, pruner)
    mask = pruner.finalize()["0.weight"]
    assert (mask.view(-1, of).sum(1) == keep).all()
    assert torch.equal(model[0].weight != 0, mask)


def test_equal_magnitudes_of_a_run_go_by_index() -> None:
    layer = nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -1.0]).repeat(12).view(3, 8))
    pruner = PDP(layer, sgd(layer), begin=0, every=1, rise=1, pattern="2:4")
    assert torch.equal(layer.weight, torch.tensor([0.5, -0.5]).repeat(12).view(3, 8))
    assert pruner.finalize()["weight"].view(-1, 4).tolist() == [[True, True, False, False]] * 6


def test_a_pattern_is_reached_in_stairs() -> None:
    """1:4 takes three of each run: ⌊4 − 3·a⌋ stay at a = 1/4, 1/2, 3/4, 1."""
    model = net()
    optimizer = sgd(model)
    pruner = PDP(model, optimizer, **TIMES, pattern="1:4")
    seen = []
    for _ in range(10):
        step(model, optimizer, pruner)
        seen.append(int(pruner.masks["0.weight"].view(-1, 4).sum(1).unique()))
    assert seen == [4, 4, 4, 3, 3, 2, 2, 1, 1, 1]


def test_weights_that_a_pattern_does_not_divide_stay_dense_or_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    assert set(PDP(model, sgd(model), **TIMES, pattern="2:4").masks) == {"0.weight"}
    with pytest.raises(OptionError, match=r"number of inputs that 4 divides; 1\.weight has 6"):
        PDP(model, sgd(model), **TIMES, pattern="2:4", scope="*")


# -- in the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after", "make"), [(2, sgd), (7, adam), (7, sgd), (14, adam)])
@pytest.mark.parametrize("name", PRUNERS)
def test_resumed_equals_uninterrupted_bit_for_bit(
    name: str, after: int, make: Callable[[nn.Module], Optimizer], tmp_path: Path
) -> None:
    model, optimizer, pruner = trained(name, after, make)
    states = {"model": model, "optimizer": optimizer, "pruner": pruner}
    random = torch.get_rng_state()
    write_state(tmp_path / "state", {k: v.state_dict() for k, v in states.items()} | {"random": random})

    again = dict(zip(states, trained(name, 0, make), strict=True))
    stored = read_state(tmp_path / "state")
    for key, part in again.items():
        part.load_state_dict(stored[key])
    for parts in ((model, optimizer, pruner), again.values()):
        torch.set_rng_state(stored["random"])
        for _ in range(9):
            step(*parts)
    assert same(pruner.state_dict(), again["pruner"].state_dict())
    assert same(optimizer.state_dict(), again["optimizer"].state_dict())
    assert same(pruner.finalize(), again["pruner"].finalize())
    assert same(model.state_dict(), again["model"].state_dict())


@pytest.mark.parametrize("name", PRUNERS)
def test_nothing_is_left_but_zeros(name: str) -> None:
    keys, parameters = list(net().state_dict()), [(n, p.shape) for n, p in net().named_parameters()]
    model, optimizer, pruner = trained(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = pruner.finalize()
    assert list(model.state_dict()) == keys
    assert [(n, p.shape) for n, p in model.named_parameters()] == parameters
    for n, mask in masks.items():
        assert not model.get_parameter(n)[~mask].any()
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert same(pruner.finalize(), masks)
    with pytest.raises(OptionError, match="has been finalized"):
        pruner.step()


def test_what_stays_are_the_weights_and_not_their_soft_values() -> None:
    model, _, pruner = trained("weights")
    soft = model[0].weight.detach().clone()
    raw = pruner.state_dict()["soft"]["raw"]["0.weight"]
    mask = pruner.finalize()["0.weight"]
    assert torch.equal(model[0].weight[mask], raw[mask])
    assert not torch.equal(soft[mask], raw[mask])
    assert bool((soft.abs() <= raw.abs()).all())


@pytest.mark.parametrize("name", ["weights", "2:4", "channels"])
def test_hardened_is_what_finalize_makes_and_training_goes_on(name: str) -> None:
    model, _, pruner = trained(name)
    before = copy.deepcopy(model.state_dict())
    with pruner.hardened():
        inside = copy.deepcopy(model.state_dict())
    assert same(model.state_dict(), before)
    with pytest.raises(KeyError), pruner.hardened():
        raise KeyError
    assert same(model.state_dict(), before)
    pruner.finalize()
    assert same(model.state_dict(), inside)
    assert not same(inside, before)
    with pruner.hardened():
        assert same(model.state_dict(), inside)


def test_weights_return_after_the_ramp_where_frozen_masks_do_not() -> None:
    def returned(make: Callable[[nn.Module, Optimizer], Any]) -> int:
        model = net()
        optimizer = sgd(model)
        pruner, found = make(model, optimizer), 0
        for t in range(40):
            before = {name: mask.clone() for name, mask in pruner.masks.items()}
            step(model, optimizer, pruner)
            if t > 12:
                found += sum(int((pruner.masks[name] & ~mask).sum()) for name, mask in before.items())
        return found

    assert returned(PRUNERS["weights"]) > 0
    assert returned(lambda m, o: GradualMagnitude(m, o, sparsity=0.8, begin=4, end=10, every=2)) == 0


def test_masks_that_became_hard_stay() -> None:
    model, optimizer, pruner = trained("hard early", 12)
    masks = pruner.masks
    assert not model[0].weight._backward_hooks
    for _ in range(8):
        step(model, optimizer, pruner)
        assert same(pruner.masks, masks)
        assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert pruner.sparsity == pytest.approx(0.8)
    assert same(pruner.finalize(), dict(masks))


def test_accumulated_batches_are_one_step() -> None:
    """Four quarters of a batch, no dropout and no batch norm: the same training as with the batch at once."""

    def run(parts: int) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        optimizer = sgd(model)
        pruner = PRUNERS["weights"](model, optimizer)
        for t in range(12):
            generator = torch.Generator().manual_seed(t)
            inputs = torch.randn(16, 8, generator=generator, dtype=torch.float64)
            target = torch.randint(0, 4, (16,), generator=generator)
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
                pruner.step()
            optimizer.step()
            pruner.step()
        return {name: value.clone() for name, value in model.state_dict().items()}, pruner.steps

    (whole, steps), (parts, counted) = run(1), run(4)
    assert steps == counted == 12
    assert all(torch.allclose(value, parts[name], rtol=1e-6, atol=1e-9) for name, value in whole.items())


def test_mixed_precision_with_a_scaler_that_skips() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = PRUNERS["weights"](model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 4, (16,)))
        scaler.scale(loss).backward()
        if t in (5, 9):
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    assert pruner.steps == 13
    assert pruner.sparsity == pytest.approx(0.8)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_gradients_of_a_scaled_loss_are_unscaled_before_the_chain_rule() -> None:
    """Channels get their gradients at the step: with a scaler the same as without."""

    def run(scale: float) -> Tensor:
        torch.manual_seed(0)
        model = net().eval()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        PDP(model, optimizer, begin=0, every=1, rise=1, sparsity=0.5, groups=channels(model).groups)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.linspace(-1, 1, 32).view(4, 8)).square().sum()).backward()
        scaler.step(optimizer)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.allclose(run(1.0), run(1024.0), rtol=1e-5)


class Recurrent(nn.Module):
    """A recurrent layer keeps references to its weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(torch.stack((x, -x), 1))[0][:, -1])


def test_layers_that_hold_their_weights_themselves() -> None:
    for model in (Recurrent(), nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 4))):
        optimizer = adam(model)
        pruner = PDP(model, optimizer, begin=0, every=1, rise=1, sparsity=0.75)
        before = {name: w.clone() for name, w in pruner.state_dict()["soft"]["raw"].items()}
        step(model, optimizer, pruner)
        after = pruner.state_dict()["soft"]["raw"]
        masks = pruner.masks
        learnt = [name for name in masks if name in before and not torch.equal(before[name], after[name])]
        assert set(learnt) == set(before)
        pruner.finalize()
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_a_tied_weight_is_soft_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    pruner = PDP(model, sgd(model), begin=0, every=1, rise=1, sparsity=0.5, allocation="uniform")
    t = border(before.abs().view(1, -1), 32)
    wanted = soft_mask(before.square(), t, t.square() / 10) * before
    assert torch.allclose(model[1].weight, wanted)
    assert model[1].weight is model[0].weight
    assert set(pruner.finalize()) == {"0.weight", "2.weight"}


# -- channels ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions that share their outputs' channels through a sum, and one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


def test_coupled_channels_have_one_mask_and_are_cut_to_the_hard_network() -> None:
    torch.manual_seed(1)
    model, inputs = Residual(), torch.randn(6, 1, 5, 5)
    plan = sec.plan(model, inputs, "sparsity=50%", allocation="uniform")
    optimizer = adam(model)
    pruner = PDP(model, optimizer, begin=2, every=2, rise=0.5, sparsity=0.5, groups=plan.groups)
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        raw = {name: value.clone() for name, value in model.state_dict().items()}
        pruner.step()
    stream = raw["stem.weight"].flatten(1).square().sum(1) + raw["outer.weight"].flatten(1).square().sum(1)
    factors = model.stem.weight.flatten(1)[:, 0] / raw["stem.weight"].flatten(1)[:, 0]
    keep = keep_at(8, 8 - next(iter(pruner.state_dict()["final"].values())), 0.5)
    t = border(stream.sqrt()[None], keep)
    assert torch.allclose(factors, soft_mask(stream, t, t.square() / 10)[0], rtol=1e-4)
    for name in ("outer.weight", "norm.weight", "norm.bias", "stem.bias"):
        shape = (-1,) + (1,) * (raw[name].dim() - 1)
        assert torch.allclose(model.get_parameter(name), raw[name] * factors.view(shape), rtol=1e-4)
    assert torch.equal(model.head.weight, raw["head.weight"]), "what reads the channels is not soft"

    for _ in range(6):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    assert pruner.sparsity == pytest.approx(0.5)
    smaller = replace(plan, keep=pruner.kept).cut(model)
    torch.testing.assert_close(smaller.eval()(inputs), model.eval()(inputs))
    assert smaller.inner.out_channels + smaller.stem.out_channels == 10


def test_a_batch_norm_passes_the_gradient_of_the_mask_on() -> None:
    """A weight before a batch norm feels nothing of its own scale, so that the norm of its row moves by the mask."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = PDP(model, optimizer, begin=0, every=1, rise=1, sparsity=0.5, groups=channels(model).groups)
    raw = pruner.state_dict()["soft"]["raw"]["0.weight"].clone()
    step(model, optimizer)
    moved = pruner.state_dict()["soft"]["raw"]["0.weight"] - raw
    radial = (moved * raw).sum(1) / raw.square().sum(1)
    assert int((radial.abs() > 1e-5).sum()) > 10


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_ending_early_warns_with_both_sparsities() -> None:
    _, _, pruner = trained("uniform", 6)
    with pytest.warns(UserWarning, match=r"ended at step 6, before step 10, .*: sparsity is 0\.4, not 0\.8; shorten"):
        pruner.finalize()


def test_diverged_weights_are_named() -> None:
    model, optimizer, _ = trained("weights", 12)
    model[4].weight.grad[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 4\.weight: training diverged"):
        optimizer.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"until": 9}, r"until must be 10 or more, the end of the ramp, got 9"),
        ({"sparsity": 1.0}, r"final must lie in \[0, 1\), got 1\.0"),
        ({"temperature": 0}, r"temperature must be positive"),
        ({"pattern": "90%"}, r"cannot read budget|pattern must be one"),
        ({"pattern": "sparsity=50%"}, r"pattern must be one such as '2:4', got 'sparsity=50%'"),
        ({"pattern": "2:4", "block": (2, 2)}, r"2:4 is a pattern of single weights; leave out groups= and block="),
        ({"allocation": "erk", "groups": ()}, r"no group"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(OptionError, match=message):
        PDP(model, sgd(model), **{**TIMES, **wrong})
    assert not model[0].weight._post_accumulate_grad_hooks


def test_a_broken_model_is_refused_at_once() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[1, 2] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 4\.weight: .* or began from a broken model"):
        PDP(model, sgd(model), **TIMES)
    assert not model[0].weight._post_accumulate_grad_hooks


def test_kept_channels_are_multiples_where_a_kernel_needs_it() -> None:
    """Six of twenty channels would stay at 70%."""
    model = net()
    (group,) = channels(model).groups
    for multiple, kept in ((1, 6), (8, 8)):
        pruner = PDP(
            model, sgd(model), begin=0, every=1, rise=1, sparsity=0.7, groups=[replace(group, multiple=multiple)]
        )
        pruner.finalize()
        assert int(pruner.kept[group.name].sum()) == kept


def test_floors_beyond_what_may_stay_are_refused_before_training() -> None:
    model = net()
    with pytest.raises(BudgetError, match=r"5 of 240 units are to stay, but the floors of the groups add up to 20"):
        PDP(model, sgd(model), **TIMES, sparsity=0.98, floor=10)


def test_an_optimizer_of_another_model_leaves_no_hook() -> None:
    model = net()
    with pytest.raises(OptionError, match="the optimizer holds none of the masked parameters"):
        PDP(model, sgd(net()), **TIMES)
    assert not model[0].weight._post_accumulate_grad_hooks
    optimizer = sgd(model[0])
    with pytest.raises(OptionError, match=r"does not hold 4\.weight"):
        PDP(model, optimizer, **TIMES)
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_states_of_other_pruners_are_refused() -> None:
    pruner = trained("weights", 6)[2]
    with pytest.raises(PlanError, match=r"not of this pruner's kind and units"):
        trained("weights", 0)[2].load_state_dict(GradualMagnitude(net(), None, end=2).state_dict())
    with pytest.raises(PlanError, match=r"not of this pruner's kind and units"):
        trained("channels", 0)[2].load_state_dict(pruner.state_dict())
    with pytest.raises(PlanError, match=r"from before masks became hard; load it into a fresh pruner"):
        trained("hard early", 12)[2].load_state_dict(trained("hard early", 6)[2].state_dict())
