"""Criteria against slow twins written from the papers' formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from secateurs.core.dims import Atom
from secateurs.core.errors import OptionError
from secateurs.core.units import ChannelGroup, WeightGroup
from secateurs.criteria import score
from tests.criteria.models import member, mlp, vectors, weight_groups

DOUBLE = torch.float64


def model_and_data(*sizes: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = mlp(4, 5, 3, bias=True, activation=nn.Tanh, dtype=DOUBLE)
    return model, vectors(*(sizes or (6,)), features=4, classes=3, dtype=DOUBLE)


def all_at_once(data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def mask_gradients(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """dL/dm at m = 1, with every parameter replaced by m·w."""
    masks = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters()}
    x, y = all_at_once(data)
    loss = F.cross_entropy(
        functional_call(model, {n: masks[n] * p.detach() for n, p in model.named_parameters()}, (x,)), y
    )
    return dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))


def test_snip_is_the_gradient_of_a_mask() -> None:
    model, data = model_and_data(4, 2)
    found, expected = score("snip", model, weight_groups(model), data=data), mask_gradients(model, data)
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name].abs().flatten().float(), rtol=1e-6, atol=1e-9)


@given(st.floats(0.01, 100))
def test_snip_keeps_the_same_weights_when_the_loss_is_scaled(factor: float) -> None:
    model, data = model_and_data()
    groups = weight_groups(model)

    def kept(loss: object) -> list[int]:
        found = torch.cat(list(score("snip", model, groups, data=data, loss=loss).values()))  # type: ignore[arg-type]
        return sorted(found.topk(10).indices.tolist())

    assert kept(F.cross_entropy) == kept(lambda out, y: factor * F.cross_entropy(out, y))


def test_taylor_signed_predicts_the_change_of_the_loss() -> None:
    """For a loss that is linear in the weights the prediction is exact: L(w without w_q) - L(w)."""
    model, data = mlp(3, 2, dtype=DOUBLE), vectors(4, features=3, classes=2, dtype=DOUBLE)

    def linear(output: Tensor, target: Tensor) -> Tensor:
        return output[torch.arange(len(target)), target].sum()

    found = score("taylor-signed", model, weight_groups(model), data=data, loss=linear)["0.weight"]
    (x, y), *_ = data
    for q in range(6):
        twin = copy.deepcopy(model)
        twin[0].weight.data.view(-1)[q] = 0
        assert found[q].item() == pytest.approx((linear(twin(x), y) - linear(model(x), y)).item(), rel=1e-5, abs=1e-9)
    assert (found < 0).any()


def per_sample_fisher(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """w²·F/2 with F the mean of squared gradients of single samples."""
    x, y = all_at_once(data)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for n, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[n] += g**2 / len(x)
    return {n: p.detach() ** 2 * total[n] / 2 for n, p in model.named_parameters()}


def test_fisher_is_the_mean_over_samples() -> None:
    model, data = model_and_data(3, 2)
    found, expected = score("fisher", model, weight_groups(model), data=data), per_sample_fisher(model, data)
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name].flatten().float(), rtol=1e-5, atol=1e-12)


def test_fisher_per_batch_squares_the_gradient_of_the_batch() -> None:
    model, data = model_and_data(3, 2)
    found = score("fisher", model, weight_groups(model), data=data, per="batch")["0.weight"]
    parts = [score("taylor-signed", model, weight_groups(model), data=[batch])["0.weight"] for batch in data]
    torch.testing.assert_close(found, (parts[0] ** 2 + parts[1] ** 2) / 4, rtol=1e-5, atol=1e-12)
    assert not torch.allclose(found, score("fisher", model, weight_groups(model), data=data)["0.weight"])


def hidden(model: nn.Module) -> ChannelGroup:
    """The five hidden units: rows and biases that make them, columns that use them."""
    width = Atom("hidden", 5)
    out = member("0.weight", 0, width, 2), member("0.bias", 0, width, 1)
    return ChannelGroup("hidden", 5, "channel", (*out, member("2.weight", 1, width, 2, "in")))


def gate_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """dL/dz at z = 1, where z multiplies the hidden layer's output before its activation."""
    gate = torch.ones(5, dtype=DOUBLE, requires_grad=True)
    loss = F.cross_entropy(model[2](model[1](gate * model[0](batch[0]))), batch[1])
    return torch.autograd.grad(loss, gate)[0]


@pytest.mark.parametrize("power", ["square", "abs"])
@pytest.mark.parametrize("average", ["scores", "gradients"])
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_taylor_is_the_gradient_of_a_gate(power: str, average: str, per: str) -> None:
    model, data = model_and_data(3, 3)
    x, y = all_at_once(data)
    pieces = data if per == "batch" else [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    gates = torch.stack([gate_gradient(model, piece) for piece in pieces])
    curve = torch.square if power == "square" else torch.abs
    expected = curve(gates).mean(0) if average == "scores" else curve(gates.mean(0))
    found = score("taylor", model, [hidden(model)], data=data, power=power, average=average, per=per)["hidden"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)


def test_mean_gradients_weigh_samples_and_mean_scores_weigh_batches() -> None:
    model, data = model_and_data(4, 1)
    gates = [gate_gradient(model, batch) for batch in data]
    for average, expected in [
        ("gradients", (4 * gates[0] + gates[1]).abs() / 5),
        ("scores", (gates[0].abs() + gates[1].abs()) / 2),
    ]:
        found = score("taylor", model, [hidden(model)], data=data, power="abs", average=average)["hidden"]
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)


def test_taylor_counts_the_members_and_tensors_asked_for() -> None:
    model, data = model_and_data()
    group, options = hidden(model), {"power": "abs", "average": "gradients"}
    product = mask_gradients(model, data)
    rows, biases, columns = product["0.weight"].sum(1), product["0.bias"], product["2.weight"].sum(0)
    for extra, expected in [
        ({}, rows + biases),
        ({"tensors": "weights"}, rows),
        ({"members": "all"}, rows + biases + columns),
        ({"members": "all", "tensors": "weights"}, rows + columns),
    ]:
        found = score("taylor", model, [group], data=data, **options, **extra)["hidden"]
        torch.testing.assert_close(found, expected.abs().float(), rtol=1e-5, atol=1e-9)


def test_taylor_on_single_weights_is_snip() -> None:
    model, data = model_and_data(4, 2)
    groups = weight_groups(model)
    found = score("taylor", model, groups, data=data, power="abs", average="gradients")
    expected = score("snip", model, groups, data=data)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_entries_cancel_inside_a_unit_for_taylor_only() -> None:
    model = mlp(2, 1, dtype=DOUBLE)
    model[0].weight.data = torch.tensor([[1.0, -1.0]], dtype=DOUBLE)
    data = [(torch.ones(1, 2, dtype=DOUBLE), None)]
    block = [WeightGroup("0.weight", (1, 2), block=(1, 2))]
    options = {"data": data, "loss": lambda output, target: output.sum()}
    assert score("taylor", model, block, **options)["0.weight"].item() == 0.0
    assert score("snip", model, block, **options)["0.weight"].item() == 2.0


def test_by_default_taylor_averages_the_squares_of_batches() -> None:
    model, data = model_and_data(3, 3)
    expected = torch.stack([gate_gradient(model, batch) for batch in data]).square().mean(0)
    found = score("taylor", model, [hidden(model)], data=data)["hidden"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"power": "cube"}, "power must be square or abs, got 'cube'"),
        ({"average": "max"}, "average must be scores or gradients, got 'max'"),
        ({"per": "token"}, "per must be batch or sample, got 'token'"),
        ({"members": "both"}, "members must be one of all, out, in, got 'both'"),
    ],
)
def test_wrong_options_of_taylor_are_refused(options: dict[str, str], text: str) -> None:
    model, data = model_and_data()
    with pytest.raises(OptionError, match=text):
        score("taylor", model, [hidden(model)], data=data, **options)


def test_train_mode_uses_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, eps=1e-12), nn.Linear(5, 3))
    data = vectors(6, features=4, classes=3)
    groups = [WeightGroup("0.weight", (5, 4), block=(1, 4))]
    options = {"power": "abs", "average": "gradients"}
    # A row before a batch norm on batch statistics can be scaled freely, so the derivative along it is zero.
    train = score("taylor", model, groups, data=data, train=True, **options)["0.weight"]
    assert train.max() < 1e-5
    assert score("taylor", model, groups, data=data, **options)["0.weight"].max() > 1e-3
    assert model[1].num_batches_tracked == 0
