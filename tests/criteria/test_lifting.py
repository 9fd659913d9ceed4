from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.dims import Atom, Fixed, concat, product
from secateurs.core.errors import ModelError, OptionError
from secateurs.core.units import ChannelGroup, WeightGroup
from secateurs.criteria import Lift, elementwise, score
from secateurs.criteria.lifting import resolve, select
from tests.criteria.models import ConvNet, first_channels, member, mlp, second_channels

ENTRIES = elementwise(lambda name, w: w.abs())


def tensors(group: ChannelGroup) -> list[tuple[str, int]]:
    return [(m.tensor, m.axis) for m in group.members]


@pytest.mark.parametrize(
    ("lift", "expected"),
    [
        (Lift(), [("first.weight", 0), ("second.weight", 1)]),
        (Lift(members="out"), [("first.weight", 0)]),
        (Lift(tensors="norms"), [("norm.weight", 0)]),
        (
            Lift(members="out", tensors="all"),
            [("first.weight", 0), ("first.bias", 0), ("norm.weight", 0), ("norm.bias", 0)],
        ),
    ],
)
def test_select_takes_the_members_asked_for(lift: Lift, expected: list[tuple[str, int]]) -> None:
    assert tensors(select(first_channels(), ConvNet(), lift)) == expected


def test_a_tied_axis_counts_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = model["a"].weight
    width, inner = Atom("w", 4), Atom("w", 3)
    group = ChannelGroup("w", 4, "channel", (member("a.weight", 0, width, 2), member("b.weight", 0, width, 2)))
    assert tensors(select(group, model, Lift())) == [("a.weight", 0)]
    other = ChannelGroup("w", 3, "channel", (member("a.weight", 1, inner, 2), member("b.weight", 1, inner, 2)))
    assert tensors(select(other, model, Lift())) == [("a.weight", 1)]


def test_a_tensor_with_the_unit_on_both_axes_counts_on_both() -> None:
    model = mlp(2, 2)
    model[0].weight.data = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    width = Atom("w", 2)
    group = ChannelGroup("w", 2, "channel", (member("0.weight", 0, width, 2), member("0.weight", 1, width, 2, "in")))
    assert score("magnitude", model, [group], normalize="none")["w"].tolist() == [3.0 + 5.0, 12.0 + 10.0]


def test_a_group_may_name_a_tied_parameter_by_its_alias() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)})
    model["b"].weight = model["a"].weight
    assert [name for name, _ in model.named_parameters()] == ["a.weight"]
    found = score("magnitude", model, [WeightGroup("b.weight", (1, 2))])["b.weight"]
    assert torch.equal(found, model["a"].weight.detach().abs().flatten())


def naive(
    model: nn.Module, group: ChannelGroup, unit: int, members: list[tuple[str, int, list[int]]], norm: float
) -> float:
    """SPA, section 3: the p-norm per tensor, over the mean of the group, averaged over tensors; entry by entry."""

    def entries(tensor: str, axis: int, positions: list[int]) -> float:
        slices = model.get_parameter(tensor).detach().double().unbind(axis)
        return sum(abs(float(x)) ** norm for p in positions for x in slices[p].flatten()) ** (1 / norm)

    parts = []
    for tensor, axis, owners in members:
        norms = [entries(tensor, axis, [p for p, u in enumerate(owners) if u == v]) for v in range(group.size)]
        parts.append(norms[unit] / (sum(norms) / group.size))
    return sum(parts) / len(parts)


@pytest.mark.parametrize("norm", [1, 2, 3])
def test_channel_scores_are_those_of_the_formula(norm: int) -> None:
    model, group = ConvNet(), second_channels()
    members = [("second.weight", 0, [0, 1, 2]), ("last.weight", 1, [0] * 4 + [1] * 4 + [2] * 4)]
    expected = [naive(model, group, u, members, norm) for u in range(3)]
    assert score("magnitude", model, [group], norm=norm)["second"].tolist() == pytest.approx(expected, rel=1e-5)


def test_positions_outside_the_unit_do_not_count() -> None:
    model = mlp(2, 5)
    model[0].weight.data = torch.tensor([[1.0, 1.0], [2.0, 2.0], [100.0, 100.0], [3.0, 3.0], [4.0, 4.0]])
    # Two units, a fixed row between their copies.
    dim = concat(Atom("a", 2), Fixed(1), Atom("a", 2))
    group = ChannelGroup("a", 2, "channel", (member("0.weight", 0, dim, 2),))
    assert score(ENTRIES, model, [group], normalize="none")["a"].tolist() == [2.0 + 6.0, 4.0 + 8.0]


WEIGHT = torch.tensor([[1.0, -3.0], [2.0, 2.0], [0.0, 8.0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": "none"}, [4.0, 4.0, 8.0]),
        ({"normalize": "none", "reduce": "mean"}, [2.0, 2.0, 4.0]),
        ({"normalize": "none", "reduce": "max"}, [3.0, 2.0, 8.0]),
        ({}, [0.75, 0.75, 1.5]),
        ({"normalize": "sum"}, [0.25, 0.25, 0.5]),
        ({"normalize": "max"}, [0.5, 0.5, 1.0]),
        ({"normalize": "minmax"}, [0.0, 0.0, 1.0]),
    ],
)
def test_options_of_the_lifting(options: dict[str, str], expected: list[float]) -> None:
    model = mlp(2, 3)
    model[0].weight.data = WEIGHT
    group = ChannelGroup("a", 3, "channel", (member("0.weight", 0, Atom("a", 3), 2),))
    assert score("magnitude", model, [group], **options)["a"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("sum", [4.0, 9.0]), ("mean", [2.0, 4.5]), ("max", [3.0, 5.0]), ("first", [1.0, 4.0]), ("prod", [3.0, 20.0])],
)
def test_tensors_are_combined_as_asked(how: str, expected: list[float]) -> None:
    model = mlp(1, 2, 1)
    model[0].weight.data = torch.tensor([[1.0], [4.0]])
    model[2].weight.data = torch.tensor([[3.0, -5.0]])
    width = Atom("a", 2)
    group = ChannelGroup("a", 2, "channel", (member("0.weight", 0, width, 2), member("2.weight", 1, width, 2, "in")))
    assert score("magnitude", model, [group], normalize="none", combine=how)["a"].tolist() == expected


def test_signed_scores_are_not_divided_by_their_mean() -> None:
    model = mlp(2, 3)
    model[0].weight.data = WEIGHT
    group = ChannelGroup("a", 3, "channel", (member("0.weight", 0, Atom("a", 3), 2),))
    assert score(elementwise(lambda name, w: w, signed=True), model, [group])["a"].tolist() == [-2.0, 4.0, 8.0]
    assert score(elementwise(lambda name, w: w), model, [group])["a"].tolist() == pytest.approx([-0.6, 1.2, 2.4])


def test_weights_are_not_normalised_and_blocks_add_up() -> None:
    model = mlp(2, 3)
    model[0].weight.data = WEIGHT
    assert score("magnitude", model, [WeightGroup("0.weight", (3, 2))])["0.weight"].tolist() == [1, 3, 2, 2, 0, 8]
    blocks = WeightGroup("0.weight", (3, 2), block=(2, 2))
    assert score("magnitude", model, [blocks])["0.weight"].tolist() == [8.0, 8.0]
    assert score("magnitude", model, [blocks], norm=2)["0.weight"].tolist() == pytest.approx([18**0.5, 8.0])


@given(st.permutations(range(6)))
def test_scores_move_with_their_channels(order: list[int]) -> None:
    model, moved = mlp(3, 6, 2), mlp(3, 6, 2)
    moved[0].weight.data = model[0].weight.data[order]
    moved[2].weight.data = model[2].weight.data[:, order]
    width = Atom("a", 6)
    group = ChannelGroup("a", 6, "channel", (member("0.weight", 0, width, 2), member("2.weight", 1, width, 2, "in")))
    before, after = score("magnitude", model, [group])["a"], score("magnitude", moved, [group])["a"]
    torch.testing.assert_close(after, before[order])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduce": "median"}, "reduce must be one of sum, mean, max, got 'median'"),
        ({"normalize": "l2"}, "normalize must be one of none, sum, mean, max, minmax, gaussian, got 'l2'"),
        ({"combine": "min"}, "combine must be one of sum, mean, max, prod, first, got 'min'"),
        ({"members": "both"}, "members must be one of all, out, in, got 'both'"),
        ({"tensors": "biases"}, "tensors must be one of weights, norms, all, got 'biases'"),
    ],
)
def test_wrong_lifting_options_are_refused(options: dict[str, str], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        score("magnitude", ConvNet(), [first_channels()], **options)


def test_a_group_of_biases_only_is_refused() -> None:
    group = ChannelGroup("odd", 4, "channel", (member("first.bias", 0, Atom("odd", 4), 1),))
    with pytest.raises(
        ModelError, match=r"group 'odd' has nothing to score: none of its tensors \(first.bias\).*tensors='all'"
    ):
        score("magnitude", ConvNet(), [group])
    assert score("magnitude", ConvNet(), [group], tensors="all")["odd"].shape == (4,)


def test_groups_of_another_model_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no parameter 'gone.weight': the groups belong to another model"):
        score("magnitude", ConvNet(), [WeightGroup("gone.weight", (2, 2))])
    with pytest.raises(ModelError, match=r"'last.weight' expects shape \(5, 13\), but the tensor has \(5, 12\)"):
        score("magnitude", ConvNet(), [WeightGroup("last.weight", (5, 13))])
    wide = ChannelGroup("w", 5, "channel", (member("first.weight", 0, Atom("w", 5), 4),))
    with pytest.raises(ModelError, match=r"group 'w' expects 5 positions on axis 0 of 4 of 'first\.weight'"):
        score("magnitude", ConvNet(), [wide])
    flat = ChannelGroup("w", 4, "channel", (member("first.weight", 0, Atom("w", 4), 2),))
    with pytest.raises(ModelError, match=r"'first\.weight', which has shape"):
        score("magnitude", ConvNet(), [flat])


def test_integers_and_meta_tensors_are_refused() -> None:
    model = mlp(2, 2)
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'0.weight' holds torch.int8: only floating-point"):
        resolve(model, ["0.weight"])
    with pytest.raises(ModelError, match=r"'0\.weight' is on the meta device"):
        score("magnitude", mlp(2, 2).to("meta"), [WeightGroup("0.weight", (2, 2))])


def test_a_product_axis_maps_heads_to_their_positions() -> None:
    model = mlp(1, 6)
    model[0].weight.data = torch.arange(1.0, 7.0)[:, None]
    group = ChannelGroup("h", 3, "head", (member("0.weight", 0, product(Atom("h", 3), Fixed(2)), 2),))
    within = ChannelGroup("d", 2, "channel", (member("0.weight", 0, product(Fixed(3), Atom("d", 2)), 2),))

    def total(group: ChannelGroup) -> list[float]:
        return score("magnitude", model, [group], normalize="none")[group.name].tolist()

    assert total(group) == [3.0, 7.0, 11.0]
    assert total(within) == [9.0, 12.0]


class Other:
    """A group of a third kind: whole tensors."""

    name, size, kind, tensors = "layers", 2, "layer", ("0.weight", "2.weight")

    def lift(self, saliency: dict[str, Tensor], reduce: str = "sum", cache: object = None) -> dict[str, Tensor]:
        return {n: saliency[n].sum() * torch.tensor([i == 0, i == 1]) for i, n in enumerate(self.tensors)}

    def spread(self, keep: Tensor) -> dict[str, Tensor]:
        return {n: keep[i] for i, n in enumerate(self.tensors)}


def test_any_group_that_can_lift_is_scored() -> None:
    model = mlp(1, 2, 1)
    model[0].weight.data = torch.tensor([[1.0], [4.0]])
    model[2].weight.data = torch.tensor([[3.0, -5.0]])
    assert score("magnitude", model, [Other()], normalize="none", combine="sum")["layers"].tolist() == [5.0, 8.0]
