"""Neurons: the published score with its weights that cancel, and the one whose weights count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.dims import Atom, Fixed, product
from secateurs.core.units import ChannelGroup
from secateurs.criteria import score
from tests.criteria.models import member

DOUBLE = torch.float64


class Gated(nn.Module):
    """down(up(x)·sigmoid(gate(x))), with seven neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 7), nn.Linear(4, 7), nn.Linear(7, 4)

    def neurons(self, x: Tensor) -> Tensor:
        return self.up(x) * torch.sigmoid(self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.neurons(x))


def setting() -> tuple[Gated, ChannelGroup, Tensor]:
    torch.manual_seed(0)
    units = Atom("n", 7)
    produced = (member("gate.weight", 0, units, 2), member("up.weight", 0, units, 2), member("gate.bias", 0, units, 1))
    group = ChannelGroup("n", 7, "channel", (*produced, member("down.weight", 1, units, 2, "in")))
    return Gated().double(), group, torch.randn(50, 4, dtype=DOUBLE)


def norms(model: Gated, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.neurons(x).square().mean(0).sqrt()


def published(model: Gated, n: Tensor, over: int, inner: float = 1.0, power: float = 1.0) -> Tensor:
    """mean_i {[|D|·n^b/Σ + |U|/Σ + |G|/Σ]·n^c}, the sums over outputs i (0), as released, or over neurons j (1)."""
    weights = (model.down.weight, model.up.weight.T, model.gate.weight.T)
    d, u, g = (w.detach().abs() for w in weights)
    parts = [p / p.sum(over, keepdim=True) for p in (d * n**inner, u, g)]
    return (sum(parts) * n**power).mean(0)


@pytest.mark.parametrize(("inner", "power"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.5)])
def test_the_published_weights_cancel(inner: float, power: float) -> None:
    model, group, x = setting()
    found = score("input-norm", model, [group], data=[x], power=power)["n"]
    released = published(model, norms(model, x), 0, inner, power)
    torch.testing.assert_close(found * 3 / 4, released.float())


def test_other_weights_do_not_change_the_released_ranking() -> None:
    model, group, x = setting()
    found = score("input-norm", model, [group], data=[x])["n"]
    with torch.no_grad():
        model.down.weight.copy_(torch.randn(4, 7))
    assert torch.equal(score("input-norm", model, [group], data=[x])["n"], found)


@pytest.mark.parametrize(("inner", "power"), [(1.0, 1.0), (0.5, 2.0)])
def test_shares_over_neurons_do_count(inner: float, power: float) -> None:
    model, group, x = setting()
    found = score("weight-aware", model, [group], data=[x], inner=inner, power=power)["n"]
    torch.testing.assert_close(found, published(model, norms(model, x), 1, inner, power).float())
    with torch.no_grad():
        model.down.weight[:, 2] *= 5
    assert score("weight-aware", model, [group], data=[x], inner=inner, power=power)["n"][2] > found[2]


def test_without_a_gate_there_are_two_matrices() -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double(), torch.randn(30, 4, dtype=DOUBLE)
    units = Atom("n", 6)
    group = ChannelGroup("n", 6, "channel", (member("0.weight", 0, units, 2), member("2.weight", 1, units, 2, "in")))
    with torch.no_grad():
        n = model[1](model[0](x)).square().mean(0).sqrt()
    d, u = model[2].weight.detach().abs() * n, model[0].weight.detach().T.abs()
    expected = ((d / d.sum(1, keepdim=True)).mean(0) + (u / u.sum(1, keepdim=True)).mean(0)) * n
    torch.testing.assert_close(score("weight-aware", model, [group], data=[x])["n"], expected.float())


def test_rows_of_zeros_and_silent_neurons_are_worth_nothing() -> None:
    model, group, x = setting()
    with torch.no_grad():
        model.up.weight[3] = 0
        model.up.bias[3] = 0
        model.down.weight[1] = 0
    for name in ("input-norm", "weight-aware"):
        found = score(name, model, [group], data=[x])["n"]
        assert found.argmin() == 3
        assert found[3] == 0


def test_a_unit_of_several_positions_has_their_mean() -> None:
    model, _, x = setting()
    units = Atom("n", 1)
    axis = product(units, Fixed(7))
    members = (member("gate.weight", 0, axis, 2), member("down.weight", 1, axis, 2, "in"))
    found = score("input-norm", model, [ChannelGroup("n", 1, "channel", members)], data=[x])["n"]
    assert found.item() == pytest.approx(norms(model, x).mean().item(), rel=1e-6)
