"""What an inspection says of a model, against the model and against what a cut of it removes."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import FileError, OptionError
from secateurs.core.pq import pq_index
from secateurs.criteria import score
from secateurs.graph.cut import cut
from secateurs.graph.infer import infer
from secateurs.graph.structure import Structure
from secateurs.inspection import inspect, unit_time
from secateurs.measure.macs import macs
from secateurs.measure.params import bytes_in_memory, parameters
from secateurs.report.inspection import UnitTime
from tests.graph import nets

IMAGE = torch.ones(1, 3, 12, 12)


class Separable(nn.Module):
    """A depthwise convolution, whose channels are those of the layer before it, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.point(self.norm(self.depth(x)).relu())
        return self.head(x.mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))


# Each with its inputs; together they have channels and heads, products and sums of widths.
MODELS: dict[str, tuple[nn.Module, Any]] = {
    "mlp": (mlp(), torch.ones(2, 6)),
    "separable": (Separable(), IMAGE),
    "residual": (nets.ResNet20(), torch.ones(1, 3, 8, 8)),
    "attention": (nets.Attention(), torch.ones(1, 5, 12)),
}


@cache
def looked_at(name: str) -> tuple[sec.Inspection, Structure]:
    return inspect(*MODELS[name]), infer(*MODELS[name])


def removed(model: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float, float]:
    sizes = [(parameters(m), macs(m, inputs), bytes_in_memory(m)) for m in (model, smaller)]
    return tuple(a - b for a, b in zip(*sizes, strict=True))  # type: ignore[return-value]


@given(st.sampled_from(sorted(MODELS)), st.data())
def test_a_unit_costs_what_goes_when_it_is_cut(name: str, data: st.DataObject) -> None:
    (model, inputs), (found, structure) = MODELS[name], looked_at(name)
    group = data.draw(st.sampled_from([g for g in found.groups if g.size > 1]))
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[data.draw(st.integers(0, group.size - 1))] = False
    gone = removed(model, cut(model, structure, {group.name: keep}), inputs)
    assert gone == pytest.approx((group.params_per_unit, group.macs_per_unit, group.bytes_per_unit))


@given(st.integers(1, 9))
def test_units_that_meet_no_other_of_their_group_add_up(gone: int) -> None:
    model, inputs = MODELS["mlp"]
    first = inspect(model, inputs).groups[0]
    smaller = cut(model, infer(model, inputs), {first.name: torch.arange(first.size) >= gone})
    costs = first.params_per_unit, first.macs_per_unit, first.bytes_per_unit
    assert removed(model, smaller, inputs) == pytest.approx(tuple(gone * cost for cost in costs))


def test_who_makes_passes_on_and_reads_a_width() -> None:
    found = inspect(Separable(), IMAGE)
    (group,) = found.groups
    assert (group.makers, group.passing, group.readers) == (("stem", "point"), ("depth", "norm"), ("point", "head"))
    # 3·9 + 1 of the stem, 9 + 1 of the depthwise layer, 2 of the norm, 8 + 7 + 1 of the square one, 5 of the head.
    assert group.params_per_unit == 28 + 10 + 2 + 16 + 5
    assert group.macs_per_unit == 144 * (27 + 9 + 15) + 5
    assert [layer.name for layer in found.layers] == ["stem", "depth", "norm", "point", "head"]
    assert [layer.stays for layer in found.layers] == [(), (), (), (), ("an axis of the model's output",)]


def test_heads_are_shared_by_what_attention_is_made_of() -> None:
    model, inputs = MODELS["attention"]
    heads = next(g for g in inspect(model, inputs).groups if g.kind == "head")
    assert (heads.size, heads.makers, heads.readers) == (3, ("q", "k", "v"), ("out",))
    assert heads.params_per_unit == 3 * 4 * (12 + 1) + 4 * 12


def test_a_first_layer_of_grey_pictures_makes_its_width() -> None:
    found = inspect(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), torch.ones(1, 1, 9, 9))
    assert found.groups[0].makers == ("0",)
    assert found.groups[0].passing == ()


def test_a_layer_says_why_its_width_stays_although_another_was_met_first() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.wide, self.two = nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return x + self.two(self.wide(x))

    found = inspect(Twice(), torch.ones(1, 4))
    assert [f.tensor for f in found.frozen] == ["one.weight"]
    stays = {layer.name: layer.stays for layer in found.layers}
    assert stays == {"one": ("an axis of the model's output",), "wide": (), "two": ("an axis of the model's output",)}


def test_what_lies_along_a_width_that_can_go() -> None:
    found = inspect(*MODELS["mlp"])
    assert (found.params, found.macs) == (parameters(MODELS["mlp"][0]), macs(*MODELS["mlp"]))
    assert found.params_in_reach == pytest.approx(1 - 3 / found.params)  # the bias of the output is left
    assert found.macs_in_reach == 1
    rigid = inspect(nn.Linear(3, 2), torch.ones(1, 3))
    assert (rigid.groups, rigid.params_in_reach, rigid.macs_in_reach) == ((), 0, 0)


def test_weights_are_units_without_bytes() -> None:
    found = inspect(*MODELS["mlp"], granularity="block:5x1")
    first = found.groups[0]
    assert (first.name, first.kind, first.size, first.makers, first.readers) == ("0.weight", "block", 12, ("0",), ())
    # Two samples: each weight is used twice.
    assert (first.params_per_unit, first.macs_per_unit, first.bytes_per_unit) == (5, 10, 0)
    assert {f.tensor for f in found.frozen} == {"0.bias", "2.bias", "4.bias"}
    assert found.params_in_reach == pytest.approx((60 + 70 + 21) / found.params)
    assert found.macs_in_reach == 1


def test_the_model_is_left_as_it_was() -> None:
    model = Separable().train()
    before = copy.deepcopy(model.state_dict())
    inspect(model, IMAGE, timed=True, seconds=1e-3)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_times_are_measured_when_asked_for() -> None:
    model, inputs = MODELS["mlp"]
    for group in inspect(model, inputs, timed=True, seconds=1e-3).groups:
        assert group.measured is not None
        assert group.measured.p10 <= group.measured.median <= group.measured.p90
        assert group.measured.removed == group.size // 2
        assert 0 < (group.time or 0) <= 1
    assert all(g.measured is None and g.time is None for g in inspect(model, inputs).groups)
    zeros = inspect(model, inputs, granularity="weight", timed=True)
    assert all(g.measured is None and g.time is not None for g in zeros.groups)


def test_half_of_a_group_is_what_a_kernel_allows() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    structure = infer(model, torch.ones(1, 4))
    (group,) = structure.groups

    def measured(multiple: int) -> UnitTime | None:
        of = type(group)(group.name, group.size, group.kind, group.members, multiple)
        return unit_time(model, structure, of, torch.ones(1, 4), seconds=1e-3)

    assert [t and t.removed for t in map(measured, (1, 3, 8))] == [4, 2, None]


@pytest.mark.parametrize(
    ("times", "noisy"), [((3.0, 2.0, 4.0), False), ((3.0, 1.0, 5.0), True), ((-3.0, -4.0, -2.0), False)]
)
def test_what_is_smaller_than_its_spread_is_noisy(times: tuple[float, float, float], noisy: bool) -> None:
    assert UnitTime(*times, removed=4).noisy is noisy


def test_json_and_back() -> None:
    found = sec.inspect(Separable(), IMAGE, timed=True, seconds=1e-3, name="mine")
    assert found.model == "mine"
    again = sec.Inspection.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again == found
    assert str(again) == str(found)


def test_another_file_is_refused() -> None:
    data = sec.inspect(*MODELS["mlp"]).to_dict()
    for wrong in ({**data, "version": 2}, {"model": "x"}, []):
        with pytest.raises(FileError, match="not an inspection of version 1"):
            sec.Inspection.from_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="unknown field 'size'"):
        sec.Inspection.from_dict({**data, "size": 3})


def test_an_unknown_granularity() -> None:
    with pytest.raises(OptionError, match="unknown granularity 'channels'"):
        sec.inspect(*MODELS["mlp"], granularity="channels")


def test_widths_under_a_norm_go_where_all_widths_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    by_default, every = (inspect(model, torch.ones(1, 6), granularity=g) for g in ("channel", "width"))
    assert [group.name for group in by_default.groups] == ["2"]
    assert [group.name for group in every.groups] == ["0", "2"]
    assert every.groups[0].passing == ("1",)
    assert any("normalised over" in reason for reason in by_default.layers[0].stays)


def test_a_model_without_values_is_inspected_as_one_with() -> None:
    with torch.device("meta"):
        empty = Separable()
    found = inspect(Separable(), IMAGE)
    unknown = [replace(group, index=None, bound=None) for group in found.groups]
    assert inspect(empty, IMAGE) == replace(found, groups=tuple(unknown))


def test_the_index_and_its_bound_are_those_of_what_is_pruned() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [0.0], [5.0], [0.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]]))
    single = {g.name: (g.index, g.bound) for g in inspect(model, torch.ones(1, 1), granularity="weight").groups}
    assert single == {"0.weight": (pytest.approx(0.75), 1), "2.weight": (pytest.approx(0), 8)}
    blocks = {g.name: (g.index, g.bound) for g in inspect(model, torch.ones(1, 1), granularity="block:2x1").groups}
    # Two blocks with all in one: 1 - 2^(1 - 2).
    assert blocks == {"0.weight": (pytest.approx(0.5), 1), "2.weight": (pytest.approx(0), 4)}
    (channels,) = inspect(model, torch.ones(1, 1)).groups
    scores = score("magnitude", model, infer(model, torch.ones(1, 1)).groups)["0"]
    assert channels.index == pytest.approx(float(pq_index(scores)))
    assert channels.bound == math.ceil(4 * (1 - channels.index))


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_what_has_no_numbers_has_no_index(granularity: str) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    assert {(g.index, g.bound) for g in inspect(model, torch.ones(2, 6), granularity=granularity).groups} == {
        (None, None)
    }
