"""Soft masks: the formulae with their numbers, their gradients against finite differences and against autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateurs.core.errors import ModelError, OptionError, PlanError
from secateurs.core.units import WeightGroup
from secateurs.train.scope import canonical_names
from secateurs.train.soft import Entries, SoftWeights, Temperature, Units, border, soft_mask, steepness

ABSOLUTE = Temperature(0.01, relative=False)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def mask_of(weights: Tensor, threshold: float, tau: float) -> Tensor:
    return soft_mask(weights.square(), values(threshold), values(tau))


# -- the formulae ------------------------------------------------------------------------------------------------------


def test_the_mask_is_half_at_the_threshold_even_and_increasing() -> None:
    w = torch.linspace(-1, 1, 41, dtype=torch.float64)
    mask = mask_of(w, 0.3, 0.1)
    assert mask_of(values(0.3), 0.3, 0.1).item() == 0.5
    assert torch.allclose(mask, mask.flip(0), rtol=0, atol=1e-15)
    assert (mask[20:].diff() > 0).all()


def test_the_mask_is_the_softmax_of_both_squares() -> None:
    """m(w) + z(w) = 1 for z = exp(t²/τ)/(exp(w²/τ) + exp(t²/τ))."""
    w, t, tau = values(0.1, 0.2, 0.7), 0.25, 0.05
    keep, drop = (w.square() / tau).exp(), math.exp(t**2 / tau)
    mask = mask_of(w, t, tau)
    assert torch.allclose(mask, keep / (keep + drop))
    assert torch.allclose(mask + drop / (keep + drop), torch.ones(3, dtype=torch.float64))


def test_extreme_temperatures_are_a_step_and_a_half() -> None:
    w = values(0.0, 0.29, 0.31, 5.0)
    assert mask_of(w, 0.3, 1e-9).tolist() == [0, 0, 1, 1]
    assert torch.allclose(mask_of(w, 0.3, 1e9), torch.full((4,), 0.5, dtype=torch.float64))


def test_factors_of_the_gradient_by_hand() -> None:
    t = values(0.1)

    def factor(w: float, tau: float) -> float:
        return steepness(values(w).square(), t, values(tau)).item()

    assert factor(0.1, 0.01) == pytest.approx(1.0, rel=1e-12)
    assert factor(0.1, 1e-4) == pytest.approx(50.5, rel=1e-12)
    assert factor(0.0, 0.01) == pytest.approx(0.26894142, rel=1e-7)


@given(st.floats(-2, 2), st.floats(0.05, 1), st.floats(0.01, 2))
def test_the_factor_is_the_derivative_with_the_threshold_held(w: float, t: float, tau: float) -> None:
    eps = 1e-6
    up, down = (mask_of(values(v), t, tau).item() * v for v in (w + eps, w - eps))
    found = steepness(values(w).square(), values(t), values(tau)).item()
    assert found == pytest.approx((up - down) / (2 * eps), rel=1e-5, abs=1e-7)


def test_factors_stay_finite_where_nothing_is_soft() -> None:
    """Thresholds of zero, huge weights, and temperatures that overflow half precision."""
    squares = torch.tensor([0.0, 1e-30, 1.0, 1e20])
    for t, tau in ((0.0, 1e-38), (1e-3, 1e-38), (10.0, 1e-5)):
        found = steepness(squares, torch.tensor([t]), torch.tensor([tau]))
        assert found.isfinite().all()
        assert found[3] == 1


def test_four_weights_by_hand() -> None:
    w = values(4, 3, 2, 1)
    t = border(w[None], 2)
    assert t.tolist() == [[2.5]]
    mask = soft_mask(w.square(), t, values(1.0))[0]
    assert mask[1].item() == pytest.approx(0.939913, abs=1e-6)
    assert mask[2].item() == pytest.approx(0.095349, abs=1e-6)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9), st.data())
def test_the_border_lies_half_way_between_neighbours(numbers: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(numbers)))
    ranked = sorted(numbers, reverse=True)
    k = min(max(keep, 1), len(numbers) - 1)
    assert border(values(*numbers)[None], keep).item() == (ranked[k - 1] + ranked[k]) / 2


@given(st.floats(1e-3, 1e3))
def test_weights_scaled_by_c_and_tau_by_its_square_have_the_same_mask(c: float) -> None:
    w = values(0.3, -0.1, 0.7, 0.2, -0.45)
    t = border(w.abs()[None], 2)
    scaled = border((c * w).abs()[None], 2)
    there = soft_mask((c * w).square(), scaled, values(c**2 * 0.05))
    assert torch.allclose(there, soft_mask(w.square(), t, values(0.05)), rtol=1e-9)
    heat = Temperature(0.5)
    assert torch.allclose(
        soft_mask((c * w).square(), scaled, heat(scaled)), soft_mask(w.square(), t, heat(t)), rtol=1e-9
    )


def test_a_relative_temperature_and_its_cap() -> None:
    """At the threshold the factor is 1/2 + t²/(2·τ): 1.5 for τ = t²/2; a cap of 10 allows no τ below t²/19."""
    t = values(0.2)
    assert Temperature(0.5)(t).item() == pytest.approx(0.02)
    assert steepness(t.square(), t, Temperature(0.5)(t)).item() == pytest.approx(1.5)
    assert steepness(t.square(), t, Temperature(1e-5, False, cap=10)(t)).item() == pytest.approx(10)
    assert Temperature(0.1, False, cap=10)(t).item() == pytest.approx(0.1)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_impossible_temperatures_are_refused(value: float) -> None:
    with pytest.raises(OptionError, match="temperature must be positive and finite, got"):
        Temperature(value)
    with pytest.raises(OptionError, match=r"cap of the gradient's factor must be more than 0\.5, got 0\.5"):
        Temperature(cap=0.5)


# -- patterns and units ------------------------------------------------------------------------------------------------


def test_each_run_of_a_pattern_has_its_own_threshold() -> None:
    """2:4 of (4, 3, 2, 1 | 40, 30, 20, 10): 2.5 and 25; a shared one would keep the second run only."""
    entries = Entries({"w": (1, 8)}, Temperature(1.0, relative=False), of=4)
    raw = {"w": values(4, 3, 2, 1, 40, 30, 20, 10).view(1, 8)}
    rows = entries.magnitudes(raw)["w"]
    t = border(rows, 2)
    assert t.flatten().tolist() == [2.5, 25.0]
    soft = entries.soften(raw, {"w": t})["w"].view(-1)
    assert (soft[:4] / raw["w"][0, :4]).tolist() == pytest.approx([0.999942, 0.939913, 0.095349, 0.005220], abs=1e-6)


def test_runs_of_a_convolution_are_inputs_at_one_place_of_the_kernel() -> None:
    entries = Entries({"w": (2, 4, 3, 1)}, ABSOLUTE, of=4)
    weight = torch.randn(2, 4, 3, 1)
    rows = entries.magnitudes({"w": weight})["w"]
    assert rows.shape == (6, 4)
    assert torch.equal(rows[1], weight[0, :, 1, 0].abs())
    assert torch.equal(entries.flat("w", rows).view(2, 4, 3, 1), weight.abs())


def test_runs_go_along_the_axis_of_the_inputs() -> None:
    entries = Entries({"w": (4, 3), "v": (2, 8)}, ABSOLUTE, of=4, axes={"w": 0})
    raw = {"w": torch.randn(4, 3), "v": torch.randn(2, 8)}
    rows = entries.magnitudes(raw)
    assert torch.equal(rows["w"], raw["w"].T.abs())
    assert torch.equal(rows["v"], raw["v"].view(4, 4).abs())
    for name, weight in raw.items():
        assert torch.equal(entries.flat(name, rows[name]).view(weight.shape), weight.abs())
    borders = {name: border(values, 2) for name, values in rows.items()}
    turned = Entries({"w": (3, 4)}, ABSOLUTE, of=4)
    plain = turned.soften({"w": raw["w"].T}, {"w": borders["w"]})["w"]
    assert torch.equal(entries.soften(raw, borders)["w"], plain.T)


def units(model: nn.Module, name: str, block: tuple[int, int]) -> Units:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return Units((WeightGroup(name, shapes[name], block),), shapes, canonical_names(model), ABSOLUTE)


def test_a_scaled_row_changes_its_own_norm_only() -> None:
    layer = nn.Linear(5, 4)
    rows = units(layer, "weight", (1, 5))
    before = rows.magnitudes({"weight": layer.weight.detach()})["weight"]
    assert torch.allclose(before[0], layer.weight.detach().norm(dim=1))
    scaled = layer.weight.detach().clone()
    scaled[2] *= 3
    after = rows.magnitudes({"weight": scaled})["weight"]
    assert torch.equal(after[0, [0, 1, 3]], before[0, [0, 1, 3]])
    assert after[0, 2].item() == pytest.approx(3 * before[0, 2].item())


# -- in a model: the same gradients as autograd through an explicit mask -----------------------------------------------


class Explicit(nn.Module):
    """The weight of a layer times its soft mask, for `parametrize`: written from the formula, threshold given."""

    def __init__(self, threshold: Tensor, tau: float, norm: bool) -> None:
        super().__init__()
        self.threshold, self.tau, self.norm = threshold, tau, norm

    def forward(self, weight: Tensor) -> Tensor:
        squares = weight.square().sum(1, keepdim=True) if self.norm else weight.square()
        return weight / (1 + ((self.threshold**2 - squares) / self.tau).exp())


def gradients(model: nn.Module, clip: float | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        inputs = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        model(inputs).square().sum().backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    return {name.replace("parametrizations.", "").replace(".original", ""): p.grad for name, p in
            model.named_parameters()}  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Noted(torch.optim.SGD):
    """An optimizer that notes the gradients that it is given and does nothing."""

    def step(self, closure: None = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradients_of_entries_are_those_of_autograd_accumulated_and_clipped(clip: float | None) -> None:
    model, twin = net(), net()
    weight = twin[0].weight.detach()
    parametrize.register_parametrization(twin[0], "weight", Explicit(border(weight.abs().view(1, -1), 7), 0.01, False))
    optimizer = Noted(model.parameters(), 0.1)
    soft = SoftWeights(model, Entries({"0.weight": (4, 5)}, ABSOLUTE), optimizer)
    soft.set({"0.weight": 7})
    assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-12)
    wanted, found = gradients(twin, clip), gradients(model, clip)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-9) for name in wanted)
    optimizer.step()
    assert torch.allclose(optimizer.seen[0], wanted["0.weight"], rtol=1e-9)


def test_gradients_of_rows_are_those_of_autograd_at_the_step() -> None:
    model, twin = net(), net()
    norms = twin[0].weight.detach().norm(dim=1)[None]
    parametrize.register_parametrization(twin[0], "weight", Explicit(border(norms, 2), 0.01, True))
    optimizer = Noted(model.parameters(), 0.1)
    SoftWeights(model, units(model, "0.weight", (1, 5)), optimizer).set({"0.weight": 2})
    assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-12)
    wanted = gradients(twin, None)
    gradients(model, None)
    optimizer.step()
    assert torch.allclose(optimizer.seen[0], wanted["0.weight"], rtol=1e-9)
    assert torch.equal(optimizer.seen[1], model[0].bias.grad)


def test_the_optimizer_moves_what_waits_and_masks_follow() -> None:
    model = net()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01)
    soft = SoftWeights(model, Entries({"0.weight": (4, 5)}, ABSOLUTE), optimizer)
    soft.set({"0.weight": 7})
    gradient = gradients(model, None)["0.weight"].clone()
    optimizer.step()
    moved = before - 0.1 * (gradient + 0.01 * before)
    assert torch.allclose(soft.raw()["0.weight"], moved, rtol=1e-12)
    t = border(moved.abs().view(1, -1), 7)
    assert torch.allclose(model[0].weight, soft_mask(moved.square(), t, values(0.01)) * moved, rtol=1e-12)


def test_nothing_soft_is_bit_for_bit_the_dense_net() -> None:
    model, dense = net(), net()
    pair = [(m, torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)) for m in (model, dense)]
    SoftWeights(model, Entries({"0.weight": (4, 5), "2.weight": (3, 4)}, ABSOLUTE), pair[0][1]).set(
        {"0.weight": 20, "2.weight": 12}
    )
    for m, optimizer in pair:
        for _ in range(3):
            optimizer.zero_grad()
            gradients(m, None)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """w²/τ is 6.25e6 here, beyond half precision."""
    model = nn.Linear(4, 2).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 2.5, 0.8]]))
    before = model.weight.detach().clone()
    soft = SoftWeights(model, Entries({"weight": (2, 4)}, Temperature(1e-6, False)), torch.optim.SGD([model.weight], 1))
    soft.set({"weight": 4})
    assert torch.equal(model.weight != 0, before >= 0.5)
    assert model.weight.dtype == dtype
    model(torch.ones(1, 4, dtype=dtype)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()


def test_remove_gives_the_weights_back_and_leaves_no_hook() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    soft = SoftWeights(model, Entries({"0.weight": (4, 5)}, ABSOLUTE), optimizer)
    soft.set({"0.weight": 7})
    assert not torch.equal(model[0].weight, before["0.weight"])
    soft.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].weight._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_without_some_of_the_weights_is_refused() -> None:
    model = net()
    entries: Mapping[str, tuple[int, ...]] = {"0.weight": (4, 5), "2.weight": (3, 4)}
    with pytest.raises(OptionError, match=r"the optimizer does not hold 2\.weight; give the one"):
        SoftWeights(model, Entries(entries, ABSOLUTE), torch.optim.SGD(model[0].parameters(), 0.1))
    model[2].weight.requires_grad_(False)
    SoftWeights(model, Entries(entries, ABSOLUTE), torch.optim.SGD(model[0].parameters(), 0.1))


def test_a_step_with_a_closure_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    SoftWeights(model, Entries({"0.weight": (4, 5)}, ABSOLUTE), optimizer).set({"0.weight": 7})
    with pytest.raises(OptionError, match=r"soft masks need optimizer\.step without a closure"):
        optimizer.step(lambda: 0.0)


def test_diverged_weights_are_named() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    SoftWeights(model, Entries({"0.weight": (4, 5)}, ABSOLUTE), optimizer).set({"0.weight": 7})
    model[0].weight.grad = torch.full((4, 5), torch.nan, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 0\.weight: training diverged"):
        optimizer.step()


def test_a_state_of_other_weights_is_refused() -> None:
    model = net()
    soft = SoftWeights(model, Entries({"0.weight": (4, 5)}, ABSOLUTE), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(PlanError, match=r"soft weights 0\.weight \[2, 2\], which the model has not"):
        soft.load_state_dict({"keeps": {"0.weight": 1}, "raw": {"0.weight": torch.ones(2, 2)}})
