from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.core.units import WeightGroup
from secateurs.criteria import score
from tests.criteria.models import ConvNet, account, first_channels, images, mlp, unruly, vectors, weight_groups

DOUBLE = torch.float64


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Two layers with twelve weights."""
    model = mlp(3, 2, 3, activation=nn.Tanh, dtype=DOUBLE)
    assert sum(p.numel() for p in model.parameters()) == 12
    return model, vectors(4, 1, features=3, classes=3, dtype=DOUBLE)


def brute_force(model: nn.Module, data: list[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """-w·(Hg) of all weights: gradient and Hessian by differences of the loss alone."""
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    flat, step = torch.cat([p.detach().flatten() for p in model.parameters()]), 1e-3

    def loss(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in model.parameters()])
        state = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, state, (x,)) / temperature, y).detach()

    eye = torch.eye(12, dtype=DOUBLE) * step
    gradient = torch.stack([(loss(flat + e) - loss(flat - e)) / (2 * step) for e in eye])
    hessian = torch.stack(
        [
            torch.stack(
                [(loss(flat + a + b) - loss(flat + a - b) - loss(flat - a + b) + loss(flat - a - b)) for b in eye]
            )
            for a in eye
        ]
    ) / (4 * step**2)
    return -flat * (hessian @ gradient)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_grasp_is_the_hessian_times_the_gradient(temperature: float) -> None:
    model, data = small()
    found = torch.cat(list(score("grasp", model, weight_groups(model), data=data, temperature=temperature).values()))
    published = brute_force(model, data, temperature)
    # The paper removes its largest scores; ours is the negative, so that the highest stay.
    torch.testing.assert_close(found, -published.float(), rtol=1e-3, atol=1e-6)
    assert found.argmin() == published.argmax()
    crop = torch.cat(list(score("crop", model, weight_groups(model), data=data, temperature=temperature).values()))
    torch.testing.assert_close(crop, found.abs())
    assert (found < 0).any()


def test_grasp_predicts_the_gradient_norm() -> None:
    """Removing a small weight lowers half the squared gradient norm by its score."""
    model, data = small()
    model[0].weight.data[0, 0] = 1e-4
    found = score("grasp", model, weight_groups(model), data=data)["0.weight"][0].item()

    def half_norm(m: nn.Module) -> float:
        x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
        grads = torch.autograd.grad(F.cross_entropy(m(x), y), list(m.parameters()))
        return sum(g.square().sum().item() for g in grads) / 2

    without = copy.deepcopy(model)
    without[0].weight.data[0, 0] = 0
    assert found == pytest.approx(half_norm(model) - half_norm(without), rel=1e-2)


def test_a_loss_without_curvature_scores_zero() -> None:
    model = mlp(3, 2)
    found = score(
        "grasp", model, weight_groups(model), data=vectors(2, features=3, classes=2), loss=lambda o, y: o.sum()
    )
    assert found["0.weight"].tolist() == [0.0] * 6


def test_a_temperature_needs_targets_and_is_positive() -> None:
    model, data = small()
    with pytest.raises(OptionError, match="temperature must be positive, got 0"):
        score("grasp", model, weight_groups(model), data=data, temperature=0)
    with pytest.raises(DataError, match=r"a temperature needs batches as \(inputs, target\)"):
        score(
            "grasp", model, weight_groups(model), data=[x for x, _ in data], loss=lambda o, y: o.sum(), temperature=2.0
        )


widths = st.lists(st.integers(1, 6), min_size=3, max_size=5)


@given(widths)
def test_synaptic_flow_is_conserved(widths: list[int]) -> None:
    model = mlp(*widths)
    found = score("synflow", model, weight_groups(model), data=[torch.randn(2, widths[0])])
    assert [s.sum().item() for s in found.values()] == pytest.approx([1.0] * (len(widths) - 1), rel=1e-5)


def test_synflow_is_the_sum_of_paths_through_a_weight() -> None:
    """R = 1ᵀ |W3| |W2| |W1| 1, so a weight's share is (paths into it) · |w| · (paths out of it) / R."""
    model = mlp(3, 4, 2, 3, dtype=DOUBLE)
    one, two, three = (model[i].weight.detach().abs() for i in (0, 2, 4))
    into, out = one.sum(1), three.sum(0)
    expected = out[:, None] * two * into[None, :] / (three @ two @ one).sum()
    found = score("synflow", model, weight_groups(model), data=[torch.randn(5, 3)])["2.weight"]
    torch.testing.assert_close(found, expected.flatten().float())


def naive_synflow(model: ConvNet, shape: tuple[int, ...]) -> Tensor:
    """Absolute parameters and buffers in a copy, a backward pass from an input of ones, |w·dR/dw|."""
    twin = copy.deepcopy(model).double().eval()
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            tensor.data.abs_()
    total = twin(torch.ones(1, *shape, dtype=DOUBLE)).sum()
    total.backward()
    return (twin.second.weight * twin.second.weight.grad / total).abs().detach()


def test_synflow_of_a_network_with_norms_and_biases() -> None:
    model = unruly(ConvNet())
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    found = score("synflow", model, weight_groups(model), data=images())["second.weight"]
    torch.testing.assert_close(found, naive_synflow(model, (2, 6, 6)).flatten().float())


def test_synflow_sees_only_the_shape_and_the_size_of_weights() -> None:
    model = mlp(3, 4, 2)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data *= torch.randn_like(p).sign()
    one = score("synflow", model, weight_groups(model), data=[torch.zeros(5, 3)])
    two = score("synflow", twin, weight_groups(model), data=[(torch.randn(2, 3), torch.tensor([0, 1]))])
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_synflow_feeds_one_sample_of_ones() -> None:
    model, seen = mlp(3, 2), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    score("synflow", model, weight_groups(model), data=[torch.randn(5, 3)])
    assert [x.tolist() for x in seen] == [[[1.0, 1.0, 1.0]]]


def test_synflow_reads_one_batch_only() -> None:
    def batches() -> object:
        yield torch.randn(1, 3)
        raise AssertionError("a second batch was read")

    score("synflow", mlp(3, 2), [WeightGroup("0.weight", (2, 3))], data=batches())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs example inputs"):
        score("synflow", mlp(3, 2), [WeightGroup("0.weight", (2, 3))])


def test_synflow_leaves_signs_and_buffers() -> None:
    model = unruly(ConvNet())
    data = images()
    before = account(model)
    score("synflow", model, [first_channels()], data=data)
    assert account(model) == before
    assert (model.first.weight < 0).any()


def test_synflow_does_not_overflow_in_deep_networks() -> None:
    model = mlp(*[100] * 40)
    for p in model.parameters():
        nn.init.normal_(p)
    found = score("synflow", model, weight_groups(model)[:1], data=[torch.ones(1, 100)])["0.weight"]
    assert found.sum().item() == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ModelError, match="the flow through the scored tensors is inf"):
        score("synflow", model, weight_groups(model)[:1], data=[torch.ones(1, 100)], dtype=torch.float32)


def test_synflow_refuses_dead_networks_and_tokens() -> None:
    model = mlp(3, 4, 2)
    model[2].weight.data.zero_()
    with pytest.raises(ModelError, match=r"the flow through the scored tensors is 0\.0"):
        score("synflow", model, weight_groups(model), data=[torch.ones(1, 3)])
    words = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(ModelError, match="this model takes integers"):
        score("synflow", words, weight_groups(words), data=[torch.tensor([[1, 2]])])


def test_synflow_takes_positional_and_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    model = Two()
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    total = model.a.weight.abs().sum() + model.b.weight.abs().sum()
    for batch in ((x, y, torch.zeros(4)), {"x": x, "y": y}, ((x, y), None)):
        found = score("synflow", model, weight_groups(model), data=[batch])
        torch.testing.assert_close(found["b.weight"], (model.b.weight.abs() / total).detach().flatten())


def test_synflow_scores_a_tied_weight_once_for_both_uses() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    groups = [WeightGroup("0.weight", (2, 2)), WeightGroup("2.weight", (2, 2))]
    found = score("synflow", model, groups, data=[torch.ones(1, 2)])
    assert torch.equal(found["0.weight"], found["2.weight"])
    # R is of degree two in the tied weight.
    assert found["0.weight"].sum().item() == pytest.approx(2.0, rel=1e-5)


def test_synflow_leaves_out_labels_and_keeps_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.a(x) * mask[:, None]

    model = Masked()
    batch = {"x": torch.randn(2, 2), "mask": torch.tensor([3, 0]), "labels": torch.tensor([0, 1])}
    found = score("synflow", model, weight_groups(model), data=[batch])["a.weight"]
    torch.testing.assert_close(found, (model.a.weight.abs() / model.a.weight.abs().sum()).detach().flatten())
