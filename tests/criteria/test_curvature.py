"""The OBS saliency of entries and of channels against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.criteria import curvature, score
from tests.criteria.models import ConvNet, first_channels, images, mlp, second_channels, vectors, weight_groups


def written_out(weight: Tensor, x: Tensor, damping: float) -> Tensor:
    """w²/(2·[H⁻¹]_qq) by an explicit inverse: weight [rows, columns], inputs [observations, columns]."""
    h = 2 / len(x) * x.T @ x
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    return weight.square() / (2 * torch.linalg.inv(h).diagonal())


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_entries_of_linear_layers(damping: float) -> None:
    torch.manual_seed(0)
    model, data = mlp(5, 4, 3, dtype=torch.float64), vectors(30, 20, features=5, classes=3, dtype=torch.float64)
    found = score("obs", model, weight_groups(model), data=data, damping=damping)
    x = torch.cat([batch for batch, _ in data])
    for name, inputs in (("0.weight", x), ("2.weight", model[1](model[0](x)).detach())):
        wanted = written_out(model.get_parameter(name).detach(), inputs, damping)
        torch.testing.assert_close(found[name], wanted.flatten().float(), rtol=1e-5, atol=1e-9)


def test_a_channel_is_judged_by_the_layers_that_consume_it() -> None:
    torch.manual_seed(1)
    model, data = ConvNet().double(), [(x.double(), y) for x, y in images(4)]
    # No channel is always zero: such a one costs nothing, whatever its weights.
    nn.init.constant_(model.norm.bias, 1)
    found = score("obs", model, [first_channels(), second_channels()], data=data, normalize="none")
    x = torch.cat([batch for batch, _ in data])
    model.eval()
    with torch.no_grad():
        hidden = torch.relu(model.norm(model.first(x)))
        flat = model.second(hidden).flatten(1)
    patches = nn.functional.unfold(hidden, 3, stride=2).transpose(1, 2).reshape(-1, 36)
    first = written_out(model.second.weight.detach().flatten(1), patches, 0.01).view(3, 4, 9).sum((0, 2))
    second = written_out(model.last.weight.detach(), flat, 0.01).view(5, 3, 4).sum((0, 2))
    torch.testing.assert_close(found["first"], first.float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["second"], second.float(), rtol=1e-5, atol=1e-9)


def test_groups_of_a_convolution_have_inverses_of_their_own() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(4, 6, 1, groups=2, bias=False).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    found = score("obs", nn.Sequential(conv), weight_groups(nn.Sequential(conv)), data=[x])["0.weight"].view(6, 2)
    rows = x.movedim(1, -1).reshape(-1, 4)
    weight = conv.weight.detach().flatten(1)
    wanted = torch.cat([written_out(weight[:3], rows[:, :2], 0.01), written_out(weight[3:], rows[:, 2:], 0.01)])
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-9)


def test_a_channel_that_is_always_zero_costs_nothing() -> None:
    torch.manual_seed(3)
    model = ConvNet()
    with torch.no_grad():
        model.norm.weight[2], model.norm.bias[2] = 0, -1
    scores = score("obs", model, [first_channels()], data=images())["first"]
    assert scores[2] == 0
    assert (scores[[0, 1, 3]] > 0).all()


def test_hessians_are_held_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model, data = mlp(6, 5, 4, 3), vectors(20, features=6, classes=3)
    whole = score("obs", model, weight_groups(model), data=data)
    runs = []
    monkeypatch.setattr(curvature, "_HELD", 6 * 6 + 5 * 5)
    monkeypatch.setattr(curvature, "_grams", lambda *a, own=curvature._grams: runs.append(a[1]) or own(*a))
    again = score("obs", model, weight_groups(model), data=data)
    assert runs == [("0.weight", "2.weight"), ("4.weight",)]
    assert all(torch.equal(again[name], scores) for name, scores in whole.items())


def test_what_it_refuses() -> None:
    model = mlp(3, 4, 2)
    with pytest.raises(DataError, match="calibration data"):
        score("obs", model, weight_groups(model))
    with pytest.raises(OptionError, match="the damping must be a number of at least 0, got -1"):
        score("obs", model, weight_groups(model), data=[torch.randn(4, 3)], damping=-1)
    with pytest.raises(ModelError, match=r"NaN or infinite values among the inputs of 0\.weight"):
        score("obs", model, weight_groups(model), data=[torch.full((4, 3), torch.nan)])
    embedding = nn.Sequential(nn.Embedding(4, 3))
    with pytest.raises(ModelError, match=r"'obs' has no score for group '0\.weight'"):
        score("obs", embedding, weight_groups(embedding), data=[torch.tensor([1, 2])])
