from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.core.units import Group, WeightGroup
from secateurs.criteria import Criterion, criteria, elementwise, score
from tests.criteria.models import (
    ConvNet,
    account,
    first_channels,
    images,
    layer_group,
    mlp,
    second_channels,
    unruly,
    weight_groups,
)

NAMES = [c.name for c in criteria() if "channel" in c.groups]
GROUPS: dict[str, Sequence[Group]] = {
    "channel": [first_channels(), second_channels()],
    "weight": weight_groups(ConvNet()),
    "layer": [layer_group(ConvNet(), "first", "second", "last")],
}
# One is about layers that keep the shape of their input, others about experts and ids: their own tests have such.
_OTHERS = ("block-influence", "reap", "expert-frequency", "token-frequency")
PAIRS = [(c.name, kind) for c in criteria() for kind in c.groups if c.name not in _OTHERS]
NEED_DATA = [c.name for c in criteria() if "data" in c.needs and "channel" in c.groups]


def groups(name: str, kind: str) -> Sequence[Group]:
    """Groups that the criterion can score: only the first convolution is followed by a norm."""
    return GROUPS[kind][:1] if name == "norm-scale" else GROUPS[kind]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_same_call_works_for_all(name: str, kind: str) -> None:
    model, asked = ConvNet(), groups(name, kind)
    found = score(name, model, asked, data=images())
    assert list(found) == [g.name for g in asked]
    for group in asked:
        assert found[group.name].shape == (group.size,)
        assert found[group.name].dtype == torch.float32
        assert not found[group.name].requires_grad
        assert found[group.name].unique().numel() > 1


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_model_is_left_as_it_was(name: str, kind: str) -> None:
    model = unruly(ConvNet())
    data = images()
    before = account(model)
    score(name, model, groups(name, kind), data=data)
    assert account(model) == before


@pytest.mark.parametrize("name", NEED_DATA)
def test_the_model_is_left_as_it_was_when_the_forward_fails(name: str) -> None:
    model = unruly(ConvNet())
    data = [*images(1), (torch.randn(2, 7, 6, 6), torch.zeros(2, dtype=torch.long))]
    before = account(model)
    with pytest.raises(ModelError, match=r"ConvNet fails on the inputs given .*channels"):
        score(name, model, groups(name, "channel"), data=data)
    assert account(model) == before


def test_an_account_sees_every_change() -> None:
    changes = [
        lambda m: m.norm.running_mean.add_(1),
        lambda m: m.calls.add_(1),
        lambda m: m.first.weight.requires_grad_(False),
        lambda m: setattr(m.first.weight, "grad", torch.zeros_like(m.first.weight)),
        lambda m: m.drop.eval(),
        lambda m: m.first.register_forward_hook(print),
        lambda m: m.first.weight.data.mul_(2),
        lambda m: torch.rand(1),
    ]
    for change in changes:
        model = ConvNet()
        before = account(model)
        assert account(model) == before
        change(model)
        assert account(model) != before


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_full_scores(name: str, kind: str, dtype: torch.dtype) -> None:
    model = ConvNet().to(dtype)
    data = [(x.to(dtype), y) for x, y in images()]
    exact = score(name, copy.deepcopy(model).double(), groups(name, kind), data=[(x.double(), y) for x, y in data])
    for key, found in score(name, model, groups(name, kind), data=data).items():
        assert found.dtype == torch.float32
        # The order of magnitude is right although the model itself computes coarsely.
        assert torch.corrcoef(torch.stack([found, exact[key]]))[0, 1] > 0.95


def test_half_precision_weights_are_not_rounded_again() -> None:
    model = mlp(100, 3).half()
    model[0].weight.data.fill_(0.1)
    total = score("magnitude", model, [WeightGroup("0.weight", (3, 100), block=(3, 100))])["0.weight"]
    assert total.item() == pytest.approx(300 * float(torch.tensor(0.1).half()), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_models_and_no_grad_make_no_difference(name: str) -> None:
    model, data = ConvNet(), images()
    asked = groups(name, "channel")
    free = score(name, model, asked, data=data)
    with torch.inference_mode():
        frozen = score(name, model.requires_grad_(False), asked, data=data)
    assert all(torch.equal(free[k], frozen[k]) for k in free)


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_random_state(name: str) -> None:
    model, data, asked = ConvNet(), images(), groups(name, "channel")
    first = score(name, model, asked, data=data, seed=3)
    torch.rand(5)
    again = score(name, model, asked, data=data, seed=3)
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("name", ["snip", "taylor", "fisher", "grasp"])
def test_train_mode_follows_the_seed(name: str) -> None:
    model, data, asked = ConvNet(), images(), GROUPS["channel"]
    options: dict[str, Any] = {"train": True, **({"per": "batch"} if name == "fisher" else {})}
    one, two, other = (score(name, model, asked, data=data, seed=s, **options)["second"] for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


class Trap:
    """Data that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("data was read")


@pytest.mark.parametrize("name", [c.name for c in criteria() if not c.needs])
def test_data_is_not_read_where_it_is_not_needed(name: str) -> None:
    score(name, ConvNet(), groups(name, "channel"), data=Trap())
    with pytest.raises(AssertionError, match="data was read"):
        score("wanda", ConvNet(), GROUPS["channel"], data=Trap())


@pytest.mark.parametrize("name", NEED_DATA)
def test_missing_and_empty_data_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="needs calibration data: pass data="):
        score(name, ConvNet(), groups(name, "channel"))
    with pytest.raises(DataError, match="calibration data is empty"):
        score(name, ConvNet(), groups(name, "channel"), data=[])


@pytest.mark.parametrize("name", [c.name for c in criteria() if "labels" in c.needs])
def test_missing_labels_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="the loss needs labels"):
        score(name, ConvNet(), GROUPS["channel"], data=[x for x, _ in images()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_named_before_anything_else(name: str, value: float) -> None:
    model = ConvNet()
    model.last.bias.data[1] = value
    with pytest.raises(ModelError, match=r"NaN or infinite weights in last\.bias"):
        score(name, model, groups(name, "channel"), data=Trap())


def test_many_broken_weights_are_counted() -> None:
    model = ConvNet()
    for parameter in list(model.parameters())[:5]:
        parameter.data.flatten()[0] = float("nan")
    with pytest.raises(ModelError, match=r"in first\.weight, first\.bias, norm\.weight and 2 more: repair"):
        score("magnitude", model, GROUPS["channel"])


def test_infinite_buffers_are_allowed() -> None:
    model = ConvNet()
    model.register_buffer("mask", torch.full((2,), -float("inf")))
    data = images()
    before = account(model)
    score("snip", model, GROUPS["channel"], data=data)
    assert account(model) == before


@pytest.mark.parametrize("name", ["activation-norm", "activation-variance", "norm-scale"])
def test_channel_criteria_refuse_weights(name: str) -> None:
    with pytest.raises(
        OptionError,
        match=rf"'{name}' scores channel groups, but 'first.weight' is a weight group; for it use one of crop, ",
    ):
        score(name, ConvNet(), GROUPS["weight"], data=images())


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "magnitude",
            {"nrom": 2, "speed": 1},
            "'magnitude' has no option nrom, speed; its options are norm, reduce, normalize",
        ),
        ("taylor", {"reduce": "mean"}, "'taylor' has no option reduce; its options are power, average, per, members"),
        ("norm-scale", {"tensors": "all"}, "'norm-scale' has no option tensors; its options are reduce, normalize"),
        ("activation-norm", {"members": "all"}, "'activation-norm' has no option members"),
        ("random", {"members": "all"}, "'random' has no option members; its options are normalize."),
        (
            "grasp",
            {"normalize": "mean"},
            "'grasp' carry a sign, so their mean is no scale; normalize must be none, minmax or g",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        score(name, ConvNet(), GROUPS["channel"], data=images(), **options)


def test_empty_and_repeated_groups_are_refused() -> None:
    with pytest.raises(OptionError, match="no groups to score"):
        score("magnitude", ConvNet(), [])
    with pytest.raises(OptionError, match="group names must differ, but 'first' occur more than once"):
        score("magnitude", ConvNet(), [first_channels(), second_channels(), first_channels()])


def test_a_criterion_is_a_name_a_record_or_a_function() -> None:
    with pytest.raises(OptionError, match="must be a name, a Criterion or a function, got int"):
        score(3, ConvNet(), GROUPS["channel"])  # type: ignore[arg-type]


def test_a_function_gets_what_it_names() -> None:
    seen: dict[str, Any] = {}
    data = images()

    def mine(
        model: nn.Module, groups: Sequence[Group], *, data: Any, loss: Any, seed: int, power: int = 1
    ) -> Mapping[str, Tensor]:
        seen.update(data=data, loss=loss, seed=seed, power=power)
        return {g.name: torch.arange(g.size) for g in groups}

    found = score(mine, ConvNet(), GROUPS["channel"], data=iter(data), loss=nn.MSELoss, seed=5, power=2)
    assert found["first"].tolist() == [0, 1, 2, 3]
    assert found["first"].dtype == torch.float32
    assert seen == {"data": data, "loss": nn.MSELoss, "seed": 5, "power": 2}
    assert score(lambda model, groups: {g.name: torch.ones(g.size) for g in groups}, ConvNet(), GROUPS["weight"])
    with pytest.raises(OptionError, match="'mine' has no option size"):
        score(mine, ConvNet(), GROUPS["channel"], size=2)
    keywords = score(
        lambda model, groups, **rest: {g.name: torch.ones(g.size) * rest["k"] for g in groups},
        ConvNet(),
        GROUPS["weight"],
        k=3,
    )
    assert keywords["last.weight"].unique().tolist() == [3.0]


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        ({}, OptionError, "returned no scores for group 'first'"),
        ({"first": torch.ones(3)}, OptionError, r"returned shape \(3,\) for group 'first', which has 4 units"),
        (
            {"first": torch.tensor([1.0, 2.0, 3.0, float("nan")])},
            ModelError,
            "gave NaN or infinite scores for group 'first'",
        ),
        (
            {"first": torch.full((4,), 1e300, dtype=torch.float64)},
            ModelError,
            "gave NaN or infinite scores for group 'first'",
        ),
    ],
)
def test_wrong_results_of_a_function_are_named(made: dict[str, Tensor], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        score(lambda model, groups: made, ConvNet(), [first_channels()])


def test_wrong_saliencies_are_named() -> None:
    with pytest.raises(OptionError, match=r"returned shape \(4,\) for 'first.weight' of shape \(4, 2, 3, 3\)"):
        score(elementwise(lambda name, w: w.flatten(1).sum(1)), ConvNet(), [first_channels()])
    with pytest.raises(ModelError, match=r"gave NaN or infinite values for 'first\.weight'"):
        score(elementwise(lambda name, w: w.log()), ConvNet(), [first_channels()])


def test_a_group_without_saliency_is_named() -> None:
    none = Criterion("none", lambda model, names: {})
    with pytest.raises(
        ModelError, match=r"'none' has no score for group 'first': none of its tensors \(first.weight, second.weight\)"
    ):
        score(none, ConvNet(), [first_channels()])


def test_a_generator_of_batches_will_do() -> None:
    model, data = ConvNet(), images()
    found = score("grasp", model, GROUPS["weight"], data=(batch for batch in data))
    expected = score("grasp", model, GROUPS["weight"], data=data)
    assert all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("kind", ["elementwise", "unit"])
def test_a_criterion_that_returns_nothing_is_refused(kind: Any) -> None:
    silent = Criterion("silent", lambda model, subject: None, kind=kind)  # type: ignore[arg-type,return-value]
    with pytest.raises(OptionError, match="criterion 'silent' returned NoneType: it must return a dict of tensors by"):
        score(silent, ConvNet(), GROUPS["weight"])
