"""Mode connectivity: the sign, the line itself, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.measure.connectivity import Path, connect, error_on, interpolated, loss_on, mode_connectivity
from secateurs.recover import fine_tune, recalibrate_batch_norm


class Point(nn.Module):
    """One number."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(float(value)))


def well(model: nn.Module) -> float:
    return (model.at.item() ** 2 - 1) ** 2


def net(seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [5 + 3 * torch.randn(16, 4, generator=generator) for _ in range(4)]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def test_a_double_well_has_a_barrier_of_one() -> None:
    path = connect(Point(), Point(-1), Point(1), well)
    assert len(path.positions) == 11
    assert (path.mc, path.worst, path.ends) == (-1, 0.5, 0)


def test_a_bowl_has_none_and_equal_ends_give_zero() -> None:
    assert connect(Point(), Point(-1), Point(2), lambda m: m.at.item() ** 2).mc > 0
    a = net(1)
    assert connect(a, a, copy.deepcopy(a), loss_on(batches())).mc == 0


@pytest.mark.parametrize(("values", "mc"), [((0.1, 0.3, 0.2, 0.0, 0.1), -0.2), ((0.4, 0.35, 0.1, 0.45, 0.4), 0.3)])
def test_the_sign_is_that_of_the_largest_deviation(values: tuple[float, ...], mc: float) -> None:
    assert mode_connectivity(values) == pytest.approx(mc)


def test_of_equal_deviations_the_first_counts() -> None:
    assert mode_connectivity((0.5, 0.25, 0.75, 0.5)) == 0.25
    assert Path((0.0, 0.3, 0.6, 1.0), (0.5, 0.25, 0.75, 0.5)).worst == 0.3


def test_refining_finds_a_narrow_barrier() -> None:
    def spike(model: nn.Module) -> float:
        return max(0.0, 1 - abs(model.at.item() - 0.47) / 0.06)

    ends = Point(0), Point(1)
    coarse, fine = (connect(Point(), *ends, spike, refine=rounds) for rounds in (0, 4))
    assert coarse.mc == pytest.approx(-0.5, abs=1e-5)
    assert fine.mc < -0.95
    assert len(fine.positions) == 11 + 2 * 4
    assert list(fine.positions) == sorted(fine.positions)


@given(t=st.floats(0, 1))
def test_common_zeros_stay_and_so_does_what_agrees(t: float) -> None:
    a, b, keep = net(1), net(2), torch.arange(32).view(8, 4) % 3 == 0
    for model in (a, b):
        model[0].weight.data *= keep
    b[0].bias.data = a[0].bias.data.clone()
    found = interpolated(a.state_dict(), b.state_dict(), t)
    assert bool((found["0.weight"][~keep] == 0).all())
    assert torch.equal(found["0.bias"], a[0].bias)
    expected = (1 - t) * a[3].weight.double() + t * b[3].weight.double()
    torch.testing.assert_close(found["3.weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_the_ends_are_exact_and_counters_are_of_the_first() -> None:
    a, b = net(1, norm=True), net(2, norm=True)
    b[1].num_batches_tracked += 7
    for t, end in ((0.0, a), (1.0, b)):
        found = interpolated(a.state_dict(), b.state_dict(), t)
        assert all(torch.equal(found[name], value) for name, value in end.state_dict().items() if value.dim())
        assert int(found["1.num_batches_tracked"]) == 0
    half = {"w": torch.tensor([1.0], dtype=torch.float16)}
    assert interpolated(half, half, 0.3)["w"].dtype == torch.float16


def test_models_stay_and_state_dicts_do() -> None:
    model, a, b = net(0), net(1), net(2)
    before = copy.deepcopy(model.state_dict())
    first = connect(model, a.state_dict(), b.state_dict(), error_on(batches()))
    assert first == connect(model, a, b, error_on(batches()))
    assert first.values[0] == error_on(batches())(a)
    assert first.values[-1] == error_on(batches())(b)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_of_old_make_a_barrier() -> None:
    trained = []
    for seed in (1, 2):
        model = net(seed, norm=True)
        fine_tune(model, batches(), epochs=30, lr=0.05)
        trained.append(model)
    prepared: list[nn.Module] = []

    def prepare(model: nn.Module) -> Any:
        prepared.append(model)
        return recalibrate_batch_norm(model, batches(), by_size=True)

    right = connect(trained[0], *trained, loss_on(batches()), prepare=prepare)
    wrong = connect(trained[0], *trained, loss_on(batches()), prepare=lambda model: None)
    assert len(prepared) == 11
    assert wrong.mc < right.mc < 0
    with pytest.raises(OptionError, match="give prepare="):
        connect(trained[0], *trained, loss_on(batches()))


def test_other_architectures_and_masks_are_refused() -> None:
    a, b = net(1), net(2)
    with pytest.raises(OptionError, match=r"only between networks of one architecture: 0\.bias, 0\.weight"):
        connect(a, a, nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.ReLU(), nn.Linear(8, 3)), well)
    b[0].weight.data[0, :2] = 0
    with pytest.raises(OptionError, match=r"different masks: 2 entries of 0\.weight are zero in one alone"):
        connect(a, a, b, loss_on(batches()))
    assert connect(a, a, b, loss_on(batches()), different_masks=True).values
    b[0].bias.data[0] = 0
    a[0].weight.data[0, :2] = 0
    assert connect(a, a, b, loss_on(batches())).values


def test_nonsense_is_refused() -> None:
    a = net(1)
    with pytest.raises(OptionError, match="got 1 and 0"):
        connect(a, a, a, well, points=1)
    with pytest.raises(OptionError, match="got 1 values"):
        mode_connectivity([0.1])
    with pytest.raises(ModelError, match=r"the score is nan at t = 0;"):
        connect(a, a, a, lambda model: float("nan"))


def test_a_path_says_what_it_is() -> None:
    assert str(Path((0.0, 0.5, 1.0), (0.1, 0.3, 0.1))) == "mc -0.2000 at t = 0.5, ends 0.1000 and 0.1000"
