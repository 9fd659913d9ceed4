from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.core.errors import OptionError
from secateurs.core.units import WeightGroup
from secateurs.criteria import criteria, criterion, elementwise, get_criterion, registry, score
from tests.criteria.models import mlp

PUBLISHED = {
    *("activation-norm", "activation-variance", "block-influence", "crop", "expert-frequency", "fisher", "grasp"),
    *("magnitude", "norm-scale", "random", "reap", "ria", "snip", "synflow", "taylor", "taylor-signed", "wanda"),
    "token-frequency",
}


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry in which a test may enter names."""
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))


def test_all_come_registered_in_order() -> None:
    names = [c.name for c in criteria()]
    assert set(names) >= PUBLISHED
    assert names == sorted(names)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_records_are_complete(name: str) -> None:
    record = get_criterion(name)
    assert record.name == name
    assert record.paper
    assert record.summary
    assert record.data_free == (record.needs in ((), ("inputs",)))
    assert record.accepts("data") == bool(record.needs)
    assert record.accepts("loss") == ("labels" in record.needs)


def test_options_are_those_of_the_function() -> None:
    assert get_criterion("magnitude").options == ("norm",)
    assert get_criterion("grasp").options == ("temperature", "train")
    assert get_criterion("random").options == ()


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"unknown criterion 'magnitud'; the nearest are magnitude"):
        get_criterion("magnitud")


def test_a_name_is_given_once() -> None:
    with pytest.raises(OptionError, match=r"'snip' is already registered, by secateurs\.criteria\.gradient"):
        criterion("snip")(lambda model, names: {})


@pytest.mark.usefixtures("scratch")
def test_a_registered_function_is_a_criterion_with_options() -> None:
    @criterion("nearest-one")
    def nearest_one(model: nn.Module, names: list[str], *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """How near each weight is to one."""
        return {name: -scale * (model.get_parameter(name).detach() - 1).abs() for name in names}

    model = mlp(2, 1)
    model[0].weight.data = torch.tensor([[1.0, 3.0]])
    group = WeightGroup("0.weight", (1, 2))
    assert get_criterion("nearest-one").summary == "How near each weight is to one."
    assert score("nearest-one", model, [group], scale=0.5)["0.weight"].tolist() == [0.0, -1.0]
    with pytest.raises(OptionError, match="'nearest-one' has no option scail; its options are scale, reduce,"):
        score("nearest-one", model, [group], scail=2)


def test_elementwise_sees_names_and_values() -> None:
    model = mlp(2, 1)
    model[0].weight.data = torch.tensor([[1.0, 3.0]])
    made = elementwise(lambda name, w: w * len(name))
    assert score(made, model, [WeightGroup("0.weight", (1, 2))])["0.weight"].tolist() == [8.0, 24.0]


def test_the_words_of_others_lead_to_the_name_here() -> None:
    with pytest.raises(OptionError, match=r"unknown criterion 'l1'; here it is 'magnitude'\."):
        get_criterion("l1")
    for words in registry._OTHER_WORDS.values():
        assert get_criterion(words.split("'")[1])
