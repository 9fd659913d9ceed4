"""Units: lifting saliency and spreading decisions, against loops over entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.dims import Atom, Fixed, concat, product
from secateurs.core.errors import OptionError
from secateurs.core.units import ChannelGroup, Member, Reduce, WeightGroup, combine, normalized, reduce_units

H = Atom("h", 3)
# Three heads of two: a projection with bias that makes them, one that reads them beside four fixed inputs, a norm.
HEADS = ChannelGroup(
    "h",
    3,
    "head",
    (
        Member("q.weight", 0, product(H, Fixed(2)), 2),
        Member("q.bias", 0, product(H, Fixed(2)), 1),
        Member("o.weight", 1, concat(product(H, Fixed(2)), Fixed(4)), 2, "in"),
    ),
)
SALIENCY = {
    "q.weight": torch.arange(30.0).view(6, 5),
    "q.bias": torch.tensor([1.0, 2.0, 30.0, 40.0, 500.0, 600.0]),
    "o.weight": torch.arange(20.0).view(2, 10),
    "other": torch.ones(3),
}
REDUCTIONS = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_a_channel_group_reduces_each_tensor_over_each_unit(reduce: Reduce) -> None:
    lifted = HEADS.lift(SALIENCY, reduce)
    assert list(lifted) == ["q.weight", "q.bias", "o.weight"]
    for unit in range(3):
        part = slice(2 * unit, 2 * unit + 2)
        expected = {"q.weight": SALIENCY["q.weight"][part], "q.bias": SALIENCY["q.bias"][part]}
        expected["o.weight"] = SALIENCY["o.weight"][:, part]
        for name, entries in expected.items():
            assert lifted[name][unit] == REDUCTIONS[reduce](entries)


def test_a_one_dimensional_tensor_is_lifted() -> None:
    assert HEADS.lift({"q.bias": SALIENCY["q.bias"]})["q.bias"].tolist() == [3.0, 70.0, 1100.0]
    assert HEADS.lift({}) == {}


def test_a_tensor_that_carries_a_group_twice_counts_each_axis() -> None:
    a = Atom("a", 2)
    group = ChannelGroup("a", 2, "channel", (Member("w", 0, a, 2), Member("w", 1, a, 2, "in")))
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert group.lift({"w": weight})["w"].tolist() == [3.0 + 4.0, 7.0 + 6.0]
    assert group.spread(torch.tensor([True, False]))["w"].tolist() == [[True, False], [False, False]]
    assert group.tensors == ("w",)


def test_a_decision_spreads_to_every_tensor() -> None:
    masks = HEADS.spread(torch.tensor([False, True, False]))
    assert masks["q.weight"].flatten().int().tolist() == [0, 0, 1, 1, 0, 0]
    assert masks["q.weight"].shape == (6, 1)
    assert masks["q.bias"].int().tolist() == [0, 0, 1, 1, 0, 0]
    assert masks["o.weight"].int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 1, 1]]
    assert HEADS.tensors == ("q.weight", "q.bias", "o.weight")
    assert HEADS.units_along(HEADS.members[2]).tolist() == [0, 0, 1, 1, 2, 2, -1, -1, -1, -1]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["sum", "mean", "max"]),
)
def test_blocks_are_cut_out_of_the_matrix(shape: tuple[int, ...], block: tuple[int, int], reduce: Reduce) -> None:
    group = WeightGroup("w", shape, block)
    saliency = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = saliency.reshape(shape[0], -1)
    rows, columns = block
    blocks = [
        matrix[i : i + rows, j : j + columns]
        for i in range(0, matrix.shape[0], rows)
        for j in range(0, matrix.shape[1], columns)
    ]
    assert group.size == len(blocks)
    expected = torch.stack([REDUCTIONS[reduce](entries) for entries in blocks])
    torch.testing.assert_close(group.lift({"w": saliency}, reduce)["w"], expected)
    for unit in range(group.size):
        only = torch.arange(group.size) == unit
        spread = group.spread(only)["w"]
        assert spread.shape == shape
        assert sorted(saliency[spread].tolist()) == sorted(blocks[unit].flatten().tolist())


def test_a_weight_group_describes_itself() -> None:
    single, blocks, scalar = WeightGroup("w", (4, 3, 3, 3)), WeightGroup("w", (4, 6), (2, 4)), WeightGroup("w", ())
    assert (single.kind, single.size, single.matrix, single.tensors) == ("weight", 108, (4, 27), ("w",))
    assert (blocks.kind, blocks.size, blocks.grid) == ("block", 4, (2, 2))
    assert (scalar.size, scalar.spread(torch.tensor([False]))["w"].item()) == (1, False)
    assert single.lift({"other": torch.ones(1)}) == {}
    with pytest.raises(OptionError, match=r"block sizes must be positive, got \(0, 1\) for w"):
        WeightGroup("w", (4, 4), (0, 1))


def test_sums_of_half_precision_are_wide() -> None:
    values = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    units = torch.zeros(1, dtype=torch.int64)
    assert reduce_units(values, units, 1).item() == 4096.0
    assert reduce_units(values, units, 1).dtype == torch.float32
    assert reduce_units(values.double(), units, 1).dtype == torch.float64


def test_positions_of_no_unit_do_not_count() -> None:
    values, units = torch.tensor([[1.0, 1.0], [5.0, 5.0], [7.0, 9.0]]), torch.tensor([1, -1, 1])
    assert reduce_units(values, units, 3).tolist() == [0.0, 18.0, 0.0]
    assert reduce_units(values, units, 3, "mean").tolist() == [0.0, 4.5, 0.0]
    assert reduce_units(values, units, 3, "max").tolist() == [-torch.inf, 9.0, -torch.inf]
    with pytest.raises(OptionError, match="reduce must be sum, mean or max, got 'min'"):
        reduce_units(values, units, 3, "min")  # type: ignore[arg-type]


def test_normalizations_are_those_of_their_names() -> None:
    scores = torch.tensor([1.0, 2.0, 5.0])
    assert normalized(scores, "none") is scores
    assert normalized(scores, "sum").sum().item() == pytest.approx(1)
    assert normalized(scores, "mean").mean().item() == pytest.approx(1)
    assert normalized(scores, "max").max().item() == 1
    assert normalized(scores, "minmax").tolist() == pytest.approx([0, 0.25, 1], abs=1e-6)
    gaussian = normalized(scores, "gaussian")
    assert (gaussian.mean().item(), gaussian.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-6)
    with pytest.raises(OptionError, match="normalize must be none, sum"):
        normalized(scores, "l2")


@pytest.mark.parametrize("how", ["sum", "mean", "max", "minmax", "gaussian"])
def test_a_normalization_keeps_the_order(how: str) -> None:
    for scores in (torch.tensor([-3.0, -1.0, -2.0]), torch.zeros(3), torch.tensor([1.0, 3.0, 2.0])):
        out = normalized(scores, how)
        assert bool(out.isfinite().all())
        assert torch.equal(out.argsort(stable=True), scores.argsort(stable=True))


def test_parts_are_combined_per_unit() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0], dtype=torch.float64)]
    expected = {"sum": [4, 10], "mean": [2, 5], "max": [3, 8], "prod": [3, 16], "first": [1, 2]}
    for how, values in expected.items():
        assert combine(parts, how).tolist() == values  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="combine must be sum"):
        combine(parts, "median")  # type: ignore[arg-type]


def test_rounding_counts_the_channels_of_heads() -> None:
    """Twelve heads of 16 channels in a packed projection: any number of them is a multiple of eight, not of 24."""
    each = product(Atom("h", 12), Fixed(16))
    members = (
        Member("qkv.weight", 0, concat(each, each, each), 2),
        Member("out.weight", 1, each, 2, "in"),
        Member("table", 1, Atom("h", 12), 2),
    )
    heads = ChannelGroup("h", 12, "head", members)
    assert [heads.multiple_for(width) for width in (1, 8, 24, 32, 96)] == [1, 1, 3, 2, 6]
    assert ChannelGroup("h", 12, "channel", members).multiple_for(8) == 8
    assert ChannelGroup("h", 12, "expert", members).multiple_for(8) == 1
    assert ChannelGroup("h", 12, "head", members, multiple=4).multiple_for(24) == 12
