from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.dims import Atom
from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.core.units import ChannelGroup, WeightGroup
from secateurs.criteria import Moments, gradients, observe, score
from secateurs.criteria.evidence import each_gradient, hessian_gradient, loss_of, samples
from tests.criteria.models import ConvNet, account, images, member, mlp, unruly, vectors


def backward(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples, by `.backward()` on a copy."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    twin.zero_grad()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    F.cross_entropy(twin(x), y).backward()
    return {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (4, 2), (1, 1, 4)])
def test_gradients_do_not_depend_on_the_batches(sizes: tuple[int, ...]) -> None:
    model = unruly(mlp(4, 5, 3, bias=True, dtype=torch.float64))
    data = vectors(*sizes, features=4, classes=3, dtype=torch.float64)
    found, expected = gradients(model, data), backward(model, data)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_gradients_leave_the_model_as_it_was() -> None:
    model = unruly(ConvNet())
    data = images()
    before = account(model)
    gradients(model, data, train=True)
    hessian_gradient(model, data, names=["first.weight"])
    observe(model, data, {"first": lambda *found: None}, train=True)
    assert account(model) == before


def test_half_precision_gradients_are_averaged_in_float32() -> None:
    model = mlp(4, 3).to(torch.bfloat16)
    data = vectors(2, 2, features=4, classes=3, dtype=torch.bfloat16)
    found = gradients(model, data)["0.weight"]
    parts = [gradients(model, [batch])["0.weight"] for batch in data]
    assert found.dtype == torch.float32
    assert torch.equal(found, (parts[0] + parts[1]) / 2)
    assert not torch.equal(found, found.bfloat16().float())


class Routed(nn.Module):
    """Two experts of which the first is used, behind a wall that lets no gradient through if asked."""

    def __init__(self, wall: bool = False) -> None:
        super().__init__()
        self.used, self.unused, self.wall = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), wall

    def forward(self, x: Tensor) -> Tensor:
        out = self.used(x)
        return out.detach() if self.wall else out


GROUPS = [WeightGroup("used.weight", (2, 2)), WeightGroup("unused.weight", (2, 2))]


@pytest.mark.parametrize("name", ["snip", "taylor", "taylor-signed", "fisher", "grasp", "crop"])
def test_a_parameter_that_the_loss_does_not_reach_scores_zero(name: str) -> None:
    found = score(name, Routed(), GROUPS, data=vectors(3, features=2, classes=2))
    assert found["unused.weight"].tolist() == [0.0] * 4
    assert found["used.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", ["snip", "taylor", "fisher", "grasp"])
def test_a_loss_that_reaches_nothing_is_an_error(name: str) -> None:
    data = vectors(3, features=2, classes=2)
    with pytest.raises(
        ModelError, match=r"the loss reaches none of the tensors to be scored \(used.weight, unused.weight\)"
    ):
        score(name, Routed(wall=True), GROUPS, data=data)
    with pytest.raises(ModelError, match=r"the loss reaches none of the tensors to be scored \(unused.weight\)"):
        score(name, Routed(), GROUPS[1:], data=data)


def test_a_parameter_that_some_batches_do_not_reach_is_averaged_over_all() -> None:
    class Gated(Routed):
        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) if x[0, 0] > 0 else self.unused(x)

    torch.manual_seed(1)
    model, data = Gated(), vectors(1, 1, 2, features=2, classes=2)
    data[0][0][0, 0], data[1][0][0, 0], data[2][0][0, 0] = 1.0, -1.0, 1.0
    found = gradients(model, data)
    one, two, three = (gradients(model, [batch], names=["used.weight", "unused.weight"]) for batch in data)
    torch.testing.assert_close(found["used.weight"], (one["used.weight"] + 2 * three["used.weight"]) / 4)
    torch.testing.assert_close(found["unused.weight"], two["unused.weight"] / 4)


def test_losses_that_are_no_number_are_refused() -> None:
    model, data = mlp(2, 2), vectors(3, features=2, classes=2)
    with pytest.raises(DataError, match=r"must be a tensor of one number per batch, got shape \(3,\): reduce it"):
        gradients(model, data, lambda out, target: F.cross_entropy(out, target, reduction="none"))
    with pytest.raises(DataError, match="got a float: reduce it"):
        gradients(model, data, lambda out, target: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match="the loss is nan on a batch"):
        gradients(model, [(torch.full((1, 2), float("nan")), torch.tensor([0]))])


def test_a_loss_may_have_one_axis_and_no_labels() -> None:
    model = mlp(2, 2)
    x = torch.randn(3, 2)
    value = loss_of(model, x, lambda output, target: output.square().sum().reshape(1))
    assert value.shape == ()
    torch.testing.assert_close(value, model(x).square().sum())


class Language(nn.Module):
    """A model with keyword inputs and its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embed(input_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def test_keyword_batches_carry_their_labels() -> None:
    model = Language()
    ids = torch.randint(7, (2, 4))
    twin = copy.deepcopy(model)
    twin(ids, ids).loss.backward()
    found = gradients(model, [{"input_ids": ids, "labels": ids}])
    assert list(found) == ["embed.weight"]
    torch.testing.assert_close(found["embed.weight"], twin.embed.weight.grad)
    with pytest.raises(DataError, match="the loss needs labels"):
        gradients(model, [{"input_ids": ids}])


@pytest.mark.parametrize("name", ["snip", "fisher", "grasp", "taylor"])
def test_a_tied_parameter_may_be_scored_under_both_names(name: str) -> None:
    groups = [WeightGroup("embed.weight", (7, 3)), WeightGroup("head.weight", (7, 3))]
    ids = torch.randint(7, (2, 4))
    both = score(name, Language(), groups, data=[{"input_ids": ids, "labels": ids}])
    assert torch.equal(both["embed.weight"], both["head.weight"])
    assert both["embed.weight"].abs().sum() > 0


def test_samples_cut_every_tensor_of_the_batch() -> None:
    x, y, position = torch.arange(6.0).view(3, 2), torch.tensor([4, 5, 6]), torch.arange(2)[None]
    assert [(a.tolist(), b.tolist()) for a, b in samples((x, y))] == [([[0, 1]], [4]), ([[2, 3]], [5]), ([[4, 5]], [6])]
    cut = list(samples({"x": x, "labels": y, "position": position, "scale": torch.tensor(2.0), "flag": True}))
    assert [c["labels"].tolist() for c in cut] == [[4], [5], [6]]
    assert all(c["position"] is position and c["scale"] == 2.0 and c["flag"] for c in cut)
    assert [a[1][0].tolist() for a in samples([x, [y]])] == [[4], [5], [6]]


def test_per_is_batch_or_sample() -> None:
    with pytest.raises(OptionError, match="per must be batch or sample, got 'token'"):
        each_gradient(mlp(2, 2), [], print, names=["0.weight"], per="token")  # type: ignore[arg-type]


def test_visits_are_in_order_with_their_sizes() -> None:
    model, data = mlp(2, 2), vectors(3, 1, features=2, classes=2)
    seen: list[int] = []
    each_gradient(model, data, lambda n, g: seen.append(n), names=["0.weight"])
    each_gradient(model, data, lambda n, g: seen.append(n), names=["0.weight"], per="sample")
    assert seen == [3, 1, 1, 1, 1, 1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


def test_attention_has_a_second_derivative() -> None:
    model, data = Attention(), [(torch.randn(2, 5, 4), torch.tensor([0, 1]))]
    name = "qkv.weight"
    found = hessian_gradient(model, data, names=[name])[name]
    gradient, step = gradients(model, data, names=[name])[name], 1e-2
    shifted = [copy.deepcopy(model) for _ in range(2)]
    for twin, sign in zip(shifted, (1, -1), strict=True):
        twin.qkv.weight.data += sign * step * gradient
    high, low = (gradients(twin, data, names=[name])[name] for twin in shifted)
    torch.testing.assert_close(found, (high - low) / (2 * step), rtol=0.02, atol=1e-5)


def test_modules_that_are_never_called_are_named() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    group = WeightGroup("attention.out_proj.weight", (4, 4))
    with pytest.raises(ModelError, match=r"no call of attention.out_proj was seen .*\(as nn.MultiheadAttention does\)"):
        score("wanda", Wrapped(), [group], data=[torch.randn(1, 3, 4)])


def test_one_silent_module_among_others_is_named() -> None:
    data = vectors(2, features=2, classes=2)
    with pytest.raises(ModelError, match=r"no call of unused was seen"):
        observe(Routed(), data, {"used": lambda *found: None, "unused": lambda *found: None})


rows = st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), max_size=5)


@given(rows, rows)
def test_merged_moments_are_those_of_both_samples(first: list[list[float]], second: list[list[float]]) -> None:
    def tensor(values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(-1, 2)

    merged = Moments.of(tensor(first)).merge(Moments.of(tensor(second)))
    whole = torch.cat([tensor(first), tensor(second)])
    assert merged.count == len(whole)
    if len(whole):
        torch.testing.assert_close(merged.mean, whole.mean(0), rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(merged.variance, whole.var(0, correction=0), rtol=1e-9, atol=1e-3)
        torch.testing.assert_close(merged.mean_square, whole.square().mean(0), rtol=1e-9, atol=1e-3)


def test_moments_do_not_cancel() -> None:
    near = 1e8 + torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    merged = Moments.of(near[:1]).merge(Moments.of(near[1:]))
    assert merged.variance.item() == pytest.approx(1.25, rel=1e-6)


def test_moments_of_nothing_are_zero() -> None:
    empty = Moments.of(torch.empty(0, 2))
    assert (empty.count, empty.mean.tolist(), empty.variance.tolist()) == (0, [0.0, 0.0], [0.0, 0.0])


class Reader(nn.Module):
    """Embeds tokens, mixes them with a convolution as long as the mask, and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(9, 3), nn.Linear(3, 4)
        self.mix = nn.Conv1d(4, 4, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.mix(self.up(self.embed(input_ids)))


def test_visitors_do_not_see_what_a_mask_leaves_out() -> None:
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def visitor(name: str) -> Any:
        return lambda module, given, made: shapes.__setitem__(name, (given.shape, made.shape))

    model, visitors = Reader(), {name: visitor(name) for name in ("embed", "up", "mix")}
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0, 0], [1] * 4])}
    observe(model, [batch], visitors)
    # A convolution's axes are samples and channels, though there are as many channels as tokens.
    assert shapes == {"embed": ((6,), (6, 3)), "up": ((6, 3), (6, 4)), "mix": ((2, 4, 4), (2, 4, 4))}
    observe(model, [batch], visitors, padding=True)
    assert shapes["up"] == ((2, 4, 3), (2, 4, 4))
    observe(model, [batch, {**batch, "attention_mask": torch.ones(2, 4)}], visitors)
    assert shapes["up"] == ((2, 4, 3), (2, 4, 4))


@pytest.mark.parametrize("name", ["wanda", "ria", "activation-norm", "activation-variance", "obs"])
def test_padding_changes_no_score(name: str) -> None:
    torch.manual_seed(0)
    model, weight = Reader(), "up.weight"
    model.mix = nn.Identity()
    ids = torch.randint(9, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.long)
    wide = {"input_ids": F.pad(ids, (2, 1)), "attention_mask": F.pad(mask, (2, 1))}
    weights = [WeightGroup(weight, (4, 3))]
    channels = [ChannelGroup("up", 4, "channel", (member(weight, 0, Atom("up", 4), 2),))]
    groups: list[Any] = channels if name.startswith("activation") else weights
    found = [score(name, model, groups, data=[batch])[groups[0].name] for batch in ({"input_ids": ids}, wide)]
    torch.testing.assert_close(found[1], found[0])
