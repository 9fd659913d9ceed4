"""Fluctuation: against sums over tokens, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.dims import Atom, Concat, Fixed, product
from secateurs.core.errors import ModelError, OptionError
from secateurs.core.moments import Moments
from secateurs.core.units import ChannelGroup
from secateurs.criteria import score
from secateurs.criteria.fluctuation import METRICS, Recursion, standardized
from tests.criteria.models import ConvNet, images, member, mlp

DOUBLE = torch.float64


def hidden(size: int = 6, kind: str = "channel") -> ChannelGroup:
    """The units between the two layers of `mlp(n, size, m)`."""
    units = Atom("hidden", size)
    return ChannelGroup("hidden", size, kind, (member("0.weight", 0, units, 2), member("2.weight", 1, units, 2, "in")))


def setting() -> tuple[nn.Sequential, list[Tensor], Tensor, Tensor]:
    """A model, batches, all inputs of its second layer, and the weight of that."""
    torch.manual_seed(0)
    model = mlp(4, 6, 3, bias=True, dtype=DOUBLE)
    data = [torch.randn(5, 7, 4, dtype=DOUBLE), torch.randn(2, 3, 4, dtype=DOUBLE)]
    with torch.no_grad():
        seen = torch.cat([model[1](model[0](x)).flatten(0, 1) for x in data])
    return model, data, seen, model[2].weight.detach()


def by_hand(metric: str, x: Tensor, w: Tensor) -> Tensor:
    if metric == "wifn":
        return torch.stack([(w[:, j].abs() * x[:, j].square().mean().sqrt()).mean() for j in range(x.shape[1])])
    variance = torch.stack([(x[:, j] - x[:, j].mean()).square().mean() for j in range(x.shape[1])])
    return variance if metric == "ifv" else variance * w.square().sum(0)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_those_of_the_formulas(metric: str) -> None:
    model, data, x, w = setting()
    found = score("fluctuation", model, [hidden()], data=data, metric=metric)["hidden"]
    torch.testing.assert_close(found, by_hand(metric, x, w).float())


def test_it_is_the_error_of_a_channel_whose_mean_stays_behind() -> None:
    model, data, x, w = setting()
    found = score("fluctuation", model, [hidden()], data=data)["hidden"]
    for j in range(6):
        lost = (x[:, j] - x[:, j].mean())[:, None] * w[:, j]
        assert float(lost.square().sum(1).mean()) == pytest.approx(found[j].item(), rel=1e-6)


def test_scores_of_one_layer_have_mean_zero_and_standard_deviation_one() -> None:
    model, data, x, w = setting()
    found = score("fluctuation", model, [hidden()], data=data, standardize=True)["hidden"].double()
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std().item() == pytest.approx(1, rel=1e-6)
    raw = by_hand("wifv", x, w)
    torch.testing.assert_close(found.float(), ((raw - raw.mean()) / raw.std()).float())


def test_standardised_scores_do_not_see_the_scale_of_a_layer() -> None:
    model, data, _, _ = setting()
    plain, before = (score("fluctuation", model, [hidden()], data=data, standardize=s)["hidden"] for s in (False, True))
    with torch.no_grad():
        model[2].weight.mul_(3)
    scaled, after = (score("fluctuation", model, [hidden()], data=data, standardize=s)["hidden"] for s in (False, True))
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(scaled, 9 * plain)


def test_equal_values_are_zeros() -> None:
    assert standardized(torch.full((4,), 0.1, dtype=DOUBLE) * 3).tolist() == [0.0] * 4
    assert standardized(torch.tensor([7.0])).tolist() == [0.0]
    assert standardized(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_of_heads_the_squared_metric_is_standardised_over_positions_and_averaged() -> None:
    model, data, x, w = setting()
    heads = Atom("heads", 2)
    axis = product(heads, Fixed(3))
    members = (member("0.weight", 0, axis, 2), member("2.weight", 1, axis, 2, "in"))
    group = ChannelGroup("heads", 2, "head", members)
    found = score("fluctuation", model, [group], data=data, standardize=True, square_heads=True)["heads"]
    raw = by_hand("wifv", x, w).square()
    z = (raw - raw.mean()) / raw.std()
    torch.testing.assert_close(found, z.view(2, 3).mean(1).float())
    plain = score("fluctuation", model, [group], data=data, square_heads=False)["heads"]
    torch.testing.assert_close(plain, by_hand("wifv", x, w).view(2, 3).mean(1).float())
    # The units of a feed-forward layer are never squared.
    channels = score("fluctuation", model, [hidden()], data=data, square_heads=True)["hidden"]
    torch.testing.assert_close(channels, by_hand("wifv", x, w).float())


def test_positions_of_other_units_do_not_count() -> None:
    model, data, x, w = setting()
    units, others = Atom("units", 2), Fixed(4)
    members = (
        member("0.weight", 0, Concat((others, units)), 2),
        member("2.weight", 1, Concat((others, units)), 2, "in"),
    )
    found = score("fluctuation", model, [ChannelGroup("units", 2, "channel", members)], data=data, standardize=True)
    raw = by_hand("wifv", x, w)[4:]
    torch.testing.assert_close(found["units"], ((raw - raw.mean()) / raw.std()).float())


def test_of_several_consumers_the_mean_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return torch.cat([self.one(hidden), self.two(hidden)], -1)

    model, data = Twice().double(), [torch.randn(30, 4, dtype=DOUBLE)]
    units = Atom("u", 5)
    members = [member("first.weight", 0, units, 2), *(member(f"{n}.weight", 1, units, 2, "in") for n in ("one", "two"))]
    found = score("fluctuation", model, [ChannelGroup("u", 5, "channel", tuple(members))], data=data)["u"]
    with torch.no_grad():
        x = torch.relu(model.first(data[0]))
        parts = [by_hand("wifv", x, layer.weight) for layer in (model.one, model.two)]
    torch.testing.assert_close(found, (sum(parts) / 2).float())


def test_inputs_of_a_convolution_are_patches() -> None:
    torch.manual_seed(0)
    model, data = ConvNet().double(), [(x.double(), y) for x, y in images()]
    units = Atom("first", 4)
    members = (member("first.weight", 0, units, 4), member("second.weight", 1, units, 4, "in"))
    found = score("fluctuation", model, [ChannelGroup("first", 4, "channel", members)], data=data)["first"]
    with torch.no_grad():
        seen = [torch.relu(model.eval().norm(model.first(x))) for x, _ in data]
        patches = torch.cat([nn.functional.unfold(x, 3, stride=2).movedim(1, -1).flatten(0, 1) for x in seen])
        raw = by_hand("wifv", patches, model.second.weight.flatten(1)).view(4, 9).sum(1)
    torch.testing.assert_close(found, raw.float())


class Text(nn.Module):
    """Embedding, linear, relu, linear; a batch has "input_ids" and "attention_mask"."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(torch.relu(self.up(self.embed(input_ids))))


def test_padding_does_not_count() -> None:
    model = Text().double()
    units = Atom("u", 6)
    members = (member("up.weight", 0, units, 2), member("down.weight", 1, units, 2, "in"))
    group = ChannelGroup("u", 6, "channel", members)
    ids = torch.randint(9, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    found = score("fluctuation", model, [group], data=[{"input_ids": ids, "attention_mask": mask}])["u"]
    with torch.no_grad():
        x = torch.relu(model.up(model.embed(ids)))[mask.bool()]
    torch.testing.assert_close(found, by_hand("wifv", x, model.down.weight.detach()).float())


# -- the published recursion -------------------------------------------------------------------------------------------


def test_of_two_sequences_the_recursion_is_half_of_the_second_around_the_joint_mean() -> None:
    a, b = torch.randn(6, 3, dtype=DOUBLE), torch.randn(6, 3, dtype=DOUBLE) + 2
    found = Recursion().add(Moments.of(a)).add(Moments.of(b)).fluctuation
    joint = torch.cat([a, b]).mean(0)
    torch.testing.assert_close(found, (b - joint).square().sum(0) / 2)
    assert torch.equal(torch.as_tensor(Recursion().add(Moments.of(a)).fluctuation), torch.zeros(3, dtype=DOUBLE))


def test_the_recursion_is_the_published_update() -> None:
    """F ← F·(k-2)/(k-1) + Σ_t (x_kt - m_k)²/k from the second sequence on, against the closed form."""
    sequences = [torch.randn(5, 2, dtype=DOUBLE) + k for k in range(4)]
    update, running = torch.zeros(2, dtype=DOUBLE), Recursion()
    for k, x in enumerate(sequences, 1):
        mean = torch.cat(sequences[:k]).mean(0)
        if k > 1:
            update = update * (k - 2) / (k - 1) + (x - mean).square().sum(0) / k
        running = running.add(Moments.of(x))
        torch.testing.assert_close(running.mean, mean)
    torch.testing.assert_close(running.fluctuation, update)


def test_the_released_variance_takes_each_sample_for_a_sequence() -> None:
    model, data, _, w = setting()
    found = score("fluctuation", model, [hidden()], data=data[:1], variance="released")["hidden"]
    running = Recursion()
    with torch.no_grad():
        for x in data[0]:
            running = running.add(Moments.of(model[1](model[0](x))))
    torch.testing.assert_close(found, (running.fluctuation * w.square().sum(0)).float())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_unknown_metrics_and_consumers_are_refused() -> None:
    model, data, _, _ = setting()
    with pytest.raises(OptionError, match="metric must be one of wifv, ifv, wifn, and variance exact or released; got"):
        score("fluctuation", model, [hidden()], data=data, metric="norm")
    produced = ChannelGroup("p", 6, "channel", hidden().members[:1])
    with pytest.raises(ModelError, match="group 'p' has nothing to score"):
        score("fluctuation", model, [produced], data=data)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) @ self.weight.T

    units = Atom("u", 6)
    group = ChannelGroup("u", 6, "channel", (member("up.weight", 0, units, 2), member("weight", 1, units, 2, "in")))
    with pytest.raises(ModelError, match=r"what consumes group 'u' \(weight\) is no linear layer or convolution"):
        score("fluctuation", Product(), [group], data=[torch.randn(2, 4)])


def test_a_consumer_that_is_never_reached_is_an_error() -> None:
    class Idle(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    model = Idle(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ModelError, match="no call of 2 was seen on this data"):
        score("fluctuation", model, [hidden()], data=[torch.randn(2, 4)])
