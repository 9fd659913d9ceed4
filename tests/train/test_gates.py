"""Gates on a model: what they multiply, what they expect, and how they come from open to fixed."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.cost import CostModel, Monomial
from secateurs.core.dims import Atom, Fixed
from secateurs.core.errors import OptionError
from secateurs.core.schedule import Cubic, Linear
from secateurs.core.units import ChannelGroup
from secateurs.recover.finetune import fine_tune
from secateurs.train.gates import (
    Gated,
    GatePruner,
    expected_sparsity,
    gate_optimizer,
    highest_sparsity,
    lagrangian,
)
from secateurs.train.hard_concrete import LIMIT, open_probability
from tests.criteria.models import member, mlp, vectors

HIDDEN = Atom("hidden", 8)
SIZES = {"hidden": 8}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return mlp(4, 8, 3, bias=True)


def group(*, consumers: bool = True) -> ChannelGroup:
    producing = (member("0.weight", 0, HIDDEN, 2), member("0.bias", 0, HIDDEN, 1))
    return ChannelGroup("hidden", 8, "channel", (member("2.weight", 1, HIDDEN, 2, "in"),) if consumers else producing)


def gated(model: nn.Module, start: float = 1.0, **options: Any) -> Gated:
    return Gated(model, [group(**options)], {"hidden": start})


def transformer_costs(layers: int, width: int, heads: int, inner: int) -> tuple[CostModel, dict[str, int]]:
    """L·(4d² + 3dm), as in the paper: heads are of size d / heads."""
    stream = Atom("width", width)
    rows, sizes = [], {"width": width}
    for i in range(layers):
        head, channel = Atom(f"head{i}", heads), Atom(f"channel{i}", inner)
        sizes |= {head.name: heads, channel.name: inner}
        rows += [Monomial(4 * width / heads, (stream, head)), Monomial(3, (stream, channel))]
    return CostModel({"params": tuple(rows)}), sizes


# -- expected size and penalty -----------------------------------------------------------------------------------------


def test_the_expected_size_is_the_cost_of_expected_counts() -> None:
    costs, sizes = transformer_costs(32, 4096, 32, 11008)
    assert costs.total("params") == 6_476_005_376
    sparsity = expected_sparsity("params", costs, sizes)

    def at(inside: float, width: float) -> float:
        counts = {name: torch.tensor((width if name == "width" else inside) * n) for name, n in sizes.items()}
        return float(sparsity(counts))

    assert at(1, 1) == 0
    assert at(0.5, 1) == pytest.approx(0.5)
    assert at(0.5, 0.5) == pytest.approx(0.75)


def test_products_of_independent_gates_are_expected_so() -> None:
    costs, sizes = transformer_costs(1, 3, 2, 2)
    chances = {name: torch.rand(n, dtype=torch.float64) for name, n in sizes.items()}
    found = expected_sparsity("params", costs, sizes)({name: p.sum() for name, p in chances.items()})
    outer = torch.outer(chances["width"], chances["head0"]).sum() * 4 * 3 / 2
    outer += torch.outer(chances["width"], chances["channel0"]).sum() * 3
    assert float(found) == pytest.approx(float(1 - outer / (4 * 9 + 3 * 3 * 2)))


def test_what_clamped_gates_can_reach() -> None:
    costs, sizes = transformer_costs(2, 8, 4, 6)
    single = {name: n for name, n in sizes.items() if name != "width"}
    assert highest_sparsity(expected_sparsity("sparsity", costs, sizes), sizes) == pytest.approx(0.9529, abs=1e-4)
    whole = highest_sparsity(expected_sparsity("params", costs, sizes), sizes)
    assert whole == pytest.approx(1 - 0.0471298**2, abs=1e-6)
    fixed = CostModel(
        {"params": tuple(Monomial(m.coefficient, (Fixed(8), m.dims[1])) for m in costs.metrics["params"])}
    )
    assert highest_sparsity(expected_sparsity("params", fixed, single), single) == pytest.approx(0.9529, abs=1e-4)


def test_multipliers_see_the_gap_and_its_square() -> None:
    multipliers = torch.zeros(2, requires_grad=True)
    lagrangian(torch.tensor(0.5), 0.3, multipliers).backward()
    assert multipliers.grad is not None
    assert multipliers.grad.tolist() == pytest.approx([0.2, 0.04])


def test_targets_rise_on_a_line_or_fast_at_first() -> None:
    assert Linear(final=0.3, begin=0, end=400)(100) == pytest.approx(0.075)
    assert Cubic(final=0.3, begin=0, end=400)(100) == pytest.approx(0.1734375)


# -- the gated model ---------------------------------------------------------------------------------------------------


def test_open_gates_are_not_there() -> None:
    model, x = net(), torch.randn(5, 4)
    assert torch.equal(gated(model)(x), model(x))


@pytest.mark.parametrize("consumers", [True, False])
def test_gates_multiply_the_members_and_folding_changes_nothing(consumers: bool) -> None:
    model, x = net().double(), torch.randn(5, 4, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    made = gated(model, consumers=consumers).double()
    with torch.no_grad():
        made.log_alpha.copy_(torch.linspace(-4, 4, 8))
    made.fix()
    z = made.gates()["hidden"]
    assert 0 < int((z == 0).sum()) < 8
    inner = torch.relu(model[0](x)) if consumers else torch.relu(model[0](x) * z)
    expected = model[2](inner * z if consumers else inner)
    torch.testing.assert_close(made(x), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    made.fold()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(made(x), expected)


def test_random_in_training_and_not_in_evaluation() -> None:
    made, x = gated(net()), torch.randn(5, 4)
    made.begin()
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    assert float(made.expected()["hidden"].detach()) == pytest.approx(
        float(open_probability(made.log_alpha.detach()).sum())
    )


def test_first_values_follow_the_seed() -> None:
    first, again, other = (Gated(net(), [group()], {"hidden": 4.595}, seed) for seed in (0, 0, 1))
    assert torch.equal(first.log_alpha, again.log_alpha)
    assert not torch.equal(first.log_alpha, other.log_alpha)
    assert float(first.log_alpha.detach().mean()) == pytest.approx(4.595, abs=0.02)


# -- training ----------------------------------------------------------------------------------------------------------


def train(steps: int, target: float = 0.5, *, begin: int = 0, fix: int | None = None, end: int | None = None,
          watch: Any = None, **options: Any) -> tuple[Gated, GatePruner]:  # fmt: skip
    made = gated(net(), LIMIT)
    made.model.requires_grad_(False)
    made.model[0].weight.requires_grad_(True)
    built: list[GatePruner] = []
    sparsity = expected_sparsity("sparsity", CostModel({}), SIZES)

    def pruner(model: nn.Module, optimizer: Any) -> GatePruner:
        schedule = Linear(final=target, begin=begin, end=end or steps // 2)
        built.append(GatePruner(made, optimizer, sparsity, schedule, begin=begin, fix=fix, **options))
        return built[0]

    fine_tune(
        made, vectors(8, features=4, classes=3), steps=steps, lr=0.01, schedule="linear", pruner=pruner,
        optimizer=lambda parameters, lr: gate_optimizer(made, parameters, lr),
        on_step=None if watch is None else lambda progress: watch(made, built[0], progress),
    )  # fmt: skip
    return made, built[0]


def test_the_target_is_reached_and_multipliers_move_as_they_must() -> None:
    seen: list[tuple[float, float, list[float]]] = []

    def watch(made: Gated, pruner: GatePruner, _progress: Any) -> None:
        seen.append((float(pruner.sparsity().detach()), pruner.target, made.multipliers.tolist()))

    made, pruner = train(400, watch=watch)
    assert pruner.reached == pytest.approx(0.5, abs=0.02)
    assert int(made.kept()["hidden"].sum()) == 4
    seconds = [multipliers[1] for _, _, multipliers in seen]
    assert all(later >= earlier for earlier, later in pairwise(seconds))
    assert seconds[-1] > 0
    # The first steps lag behind the ramp: s < t, so λ1 falls, and gates are pulled down.
    assert all(s < t for s, t, _ in seen[:5])
    assert seen[5][2][0] < 0
    assert max(made.log_alpha.abs().tolist()) <= LIMIT + 1e-6


def test_gates_wait_and_stay_and_rates_are_their_own() -> None:
    phases: list[int] = []
    rates: list[list[float]] = []
    values: list[Tensor] = []

    def watch(made: Gated, pruner: GatePruner, progress: Any) -> None:
        phases.append(int(made.phase))
        values.append(made.log_alpha.detach().clone())
        rates.append([group["lr"] for group in optimizers[0].param_groups])

    optimizers: list[Any] = []
    made, pruner = gated(net(), 1.0), None

    def optimizer(parameters: Any, lr: float) -> Any:
        optimizers.append(gate_optimizer(made, parameters, lr))
        return optimizers[0]

    def build(model: nn.Module, own: Any) -> GatePruner:
        nonlocal pruner
        sparsity = expected_sparsity("sparsity", CostModel({}), SIZES)
        pruner = GatePruner(made, own, sparsity, Linear(final=0.1, begin=2, end=4), begin=2, fix=6)
        return pruner

    with pytest.warns(
        UserWarning, match=r"gates were fixed at an expected sparsity of 0\.\d+, not 0\.100: train longe"
    ):
        fine_tune(
            made, vectors(8, features=4, classes=3), steps=8, lr=0.01, schedule="linear", pruner=build,
            optimizer=optimizer, on_step=lambda progress: watch(made, pruner, progress),
        )  # fmt: skip
    assert phases == [0, 1, 1, 1, 1, 2, 2, 2]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])
    assert torch.equal(values[5], values[7])
    assert [rate[0] for rate in rates] == pytest.approx([0.01 * (1 - i / 8) for i in range(8)])
    assert {tuple(rate[1:]) for rate in rates} == {(0.1, 0.1)}


def test_a_rule_may_decide() -> None:
    told: list[Any] = []

    def decide(alphas: Any, expected: Any) -> dict[str, Tensor]:
        told.append((alphas["hidden"].shape, expected["hidden"]))
        return {"hidden": torch.arange(8) == 3}

    with pytest.warns(UserWarning, match="gates were fixed"):
        made, pruner = train(4, decide=decide)
    assert made.kept()["hidden"].nonzero().flatten().tolist() == [3]
    assert told[0][0] == (8,)
    assert 0 < told[0][1] < 8
    assert torch.equal(pruner.finalize()["hidden"], made.kept()["hidden"])


def test_times_out_of_order_are_refused() -> None:
    with pytest.raises(OptionError, match=r"in this order, got 0, 4 and 2\."):
        train(8, fix=2, end=4)
