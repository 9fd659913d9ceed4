"""The repair of a structured cut: layer by layer the least squares of what the repaired ones before it give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs import plan
from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.graph.plan import ModelPlan
from secateurs.methods.repair import repaired
from secateurs.solvers import quadratic_error
from tests.criteria.models import account, mlp, unruly
from tests.graph.nets import Attention, CatWithItself, ChannelShuffle, LeNet, ShuffleUnit

DOUBLE = torch.float64


def halved(model: nn.Module, x: Tensor, **options: object) -> ModelPlan:
    return plan(model, x, "sparsity=50%", allocation="uniform", floor=1, **options)  # type: ignore[arg-type]


def moments(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def fitted(weight: Tensor, x: Tensor, keep: Tensor, damping: float) -> Tensor:
    """W·H_:,K·(H_KK)⁻¹ of damped moments, and zeros: the slow way, without an inverse of all of H."""
    h = moments(x)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    made = torch.zeros_like(weight)
    made[:, keep] = torch.linalg.solve(h[keep][:, keep], (weight @ h)[:, keep].T).T
    return made


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_each_layer_is_fitted_to_the_inputs_that_the_repaired_ones_give(damping: float) -> None:
    torch.manual_seed(0)
    model = mlp(5, 8, 6, 3, bias=True, activation=nn.Tanh, dtype=DOUBLE)
    data = [torch.randn(40, 5, dtype=DOUBLE), torch.randn(20, 5, dtype=DOUBLE)]
    decided = halved(model, data[0])
    made = repaired(model, decided, data, damping=damping)
    x = torch.cat(data)
    hidden = model[1](model[0](x)).detach()
    second = fitted(model[2].weight.detach(), hidden, decided.keep["0"], damping)
    torch.testing.assert_close(made[2].weight.detach(), second, rtol=1e-8, atol=1e-10)
    hidden = torch.tanh(hidden @ second.T + model[2].bias).detach()
    third = fitted(model[4].weight.detach(), hidden, decided.keep["2"], damping)
    torch.testing.assert_close(made[4].weight.detach(), third, rtol=1e-8, atol=1e-10)
    assert torch.equal(made[0].weight, model[0].weight)


def test_no_other_weights_make_the_layer_s_outputs_differ_less() -> None:
    torch.manual_seed(1)
    model, x = mlp(4, 6, 3, dtype=DOUBLE), torch.randn(30, 4, dtype=DOUBLE)
    decided = halved(model, x)
    made = repaired(model, decided, [x], damping=0)[2].weight.detach()
    before, keep = model[2].weight.detach(), decided.keep["0"]
    hidden = model[1](model[0](x)).detach()
    least = quadratic_error(before, made, moments(hidden))
    wanted, got = hidden @ before.T, hidden @ made.T
    assert least == pytest.approx(float((wanted - got).square().sum()) / len(x), rel=1e-9)
    assert least < quadratic_error(before, before * keep, moments(hidden))
    for _ in range(20):
        other = made + 1e-3 * torch.randn_like(made) * keep
        assert quadratic_error(before, other, moments(hidden)) > least


# -- architectures -----------------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """A pointwise, a depthwise and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depth, self.project = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.depth(torch.relu(self.norm(self.expand(x)))))).mean((2, 3))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )


class Upwards(nn.Module):
    """A transposed convolution consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


IMAGE = (6, 3, 8, 8)
# Network, shape of its inputs, and the weights that change; where that is one, it is the layer before the output.
NETWORKS = {
    "depthwise": (Separable, IMAGE, {"project.weight"}),
    "grouped": (grouped, IMAGE, {"2.weight", "4.weight"}),
    "transposed": (Upwards, IMAGE, {"up.weight"}),
    "concatenated with itself": (CatWithItself, IMAGE, {"second.weight"}),
    "flattened": (LeNet, (20, 2, 2, 2), {"fc.weight"}),
    "channel shuffle": (ChannelShuffle, IMAGE, {"second.weight"}),
    "shuffle unit": (ShuffleUnit, IMAGE, None),
    "attention": (Attention, (6, 5, 12), {"out.weight"}),
    "pytorch's encoder": (encoder, (6, 5, 16), {"self_attn.out_proj.weight", "linear2.weight"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_consumers_are_zero_where_it_goes_and_the_cut_is_what_was_repaired(name: str) -> None:
    torch.manual_seed(2)
    build, shape, changed = NETWORKS[name]
    model = build().eval()
    x = torch.randn(shape)
    decided = halved(model, x)
    made = repaired(model, decided, [x])
    other = {n for n, p in made.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert other == changed if changed else len(other) > 1
    for group in decided.groups:
        for member in (m for m in group.members if m.role == "in"):
            goes = ~group.spread(decided.keep[group.name])[member.tensor]
            parameter = made.get_parameter(member.tensor)
            assert (parameter[goes.expand(parameter.shape)] == 0).all()
    cut, plain = decided.cut(made).eval(), decided.cut(model).eval()
    with torch.no_grad():
        dense, wanted = model(x), made(x)
        torch.testing.assert_close(cut(x), wanted, rtol=1e-4, atol=1e-5)
        # Over several layers, what is best for each is not always best for the last.
        if changed and len(changed) == 1:
            assert (wanted - dense).square().sum() < (plain(x) - dense).square().sum()


def test_one_flattened_channel_is_many_columns() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=DOUBLE), nn.Flatten(), nn.Linear(12, 5, dtype=DOUBLE))
    x = torch.randn(40, 2, 4, 4, dtype=DOUBLE)
    with torch.no_grad():
        model[0].weight[1] *= 1e-3
        model[2].weight[:, 4:8] *= 1e-3
    decided = plan(model, x, "sparsity=34%", floor=1)
    assert decided.keep["0"].tolist() == [True, False, True]
    made = repaired(model, decided, [x], damping=0)[2].weight.detach()
    keep = torch.ones(12, dtype=torch.bool)
    keep[4:8] = False
    wanted = fitted(model[2].weight.detach(), model[0](x).flatten(1).detach(), keep, 0)
    torch.testing.assert_close(made, wanted, rtol=1e-8, atol=1e-11)


def test_groups_of_a_convolution_are_fitted_each_to_its_own_inputs() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, dtype=DOUBLE), nn.Conv2d(8, 6, 1, groups=2, bias=False, dtype=DOUBLE))
    x = torch.randn(20, 3, 4, 4, dtype=DOUBLE)
    decided = halved(model, x, scope="0")
    made = repaired(model, decided, [x], damping=0.01)[1].weight.detach().flatten(1)
    rows = model[0](x).detach().movedim(1, -1).reshape(-1, 8)
    weight = model[1].weight.detach().flatten(1)
    stays = decided.masks(model)["1.weight"].flatten(1)
    halves = [fitted(weight[i : i + 3], rows[:, k : k + 4], stays[i], 0.01) for i, k in ((0, 0), (3, 4))]
    torch.testing.assert_close(made, torch.cat(halves), rtol=1e-8, atol=1e-10)


# -- what it leaves alone, and what it refuses -------------------------------------------------------------------------


def test_the_model_is_untouched() -> None:
    torch.manual_seed(5)
    model, x = unruly(mlp(5, 8, 3)), torch.randn(9, 5)
    decided, before = halved(model, x), account(model)
    made = repaired(model, decided, [x])
    assert account(model) == before
    assert [m.training for m in made.modules()] == [m.training for m in model.modules()]
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_nothing_that_goes_changes_nothing() -> None:
    model, x = mlp(5, 8, 3), torch.randn(9, 5)
    made = repaired(model, plan(model, x, "sparsity=0%"), [x])
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in made.named_parameters())


def test_half_precision_stays_half() -> None:
    torch.manual_seed(6)
    model, x = mlp(5, 8, 3).bfloat16(), torch.randn(9, 5).bfloat16()
    made = repaired(model, halved(model, x), [x])
    assert made[2].weight.dtype == torch.bfloat16
    assert not torch.equal(made[2].weight, model[2].weight)


def test_inputs_that_are_always_zero_are_cut_without_a_change_of_the_others() -> None:
    torch.manual_seed(7)
    model, x = mlp(4, 6, 3), torch.zeros(5, 4)
    decided = halved(model, x)
    made = repaired(model, decided, [x])
    assert torch.equal(made[2].weight, model[2].weight * decided.keep["0"])


class Twice(nn.Module):
    """Two consumers of other widths' outputs share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.left(x)) + self.b(self.right(x))


def test_a_weight_of_two_layers_is_refused() -> None:
    model, x = Twice(), torch.randn(5, 4)
    with pytest.raises(
        ModelError, match=r"a\.weight consumes what goes.*b\.weight is the same tensor; leave it out wi"
    ):
        repaired(model, halved(model, x), [x])


def test_a_weight_of_no_known_layer_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.weight

    model, x = Own(), torch.randn(5, 4)
    with pytest.raises(
        ModelError, match=r"weight consumes what goes and cannot be repaired: it belongs to a Own, which"
    ):
        repaired(model, halved(model, x), [x])


def test_a_layer_that_is_not_called_is_refused() -> None:
    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.a(x), self.b.weight)

    model, x = Uncalled(), torch.randn(5, 4)
    with pytest.raises(ModelError, match="no call of b was seen on the calibration data"):
        repaired(model, halved(model, x), [x])


def test_data_and_plans_that_make_no_sense() -> None:
    model, x = mlp(4, 6, 3), torch.randn(5, 4)
    decided = halved(model, x)
    with pytest.raises(DataError, match="the calibration data is empty"):
        repaired(model, decided, [])
    with pytest.raises(ModelError, match="NaN or infinite values among the inputs of 2"):
        repaired(model, decided, [torch.full((5, 4), torch.nan)])
    with pytest.raises(ModelError, match=r"hessian of 2 is not positive definite with damping up to 0 "):
        repaired(model, decided, [x[:2]], damping=0)
    with pytest.raises(OptionError, match="this plan removes single weights"):
        repaired(model, plan(model, x, "sparsity=50%", granularity="weight"), [x])
