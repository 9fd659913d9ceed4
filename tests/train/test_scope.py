"""Which weights are pruned."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.train.scope import canonical_names, divided_weights, input_axes, prunable_weights, stack_names


class Conv1D(nn.Module):
    """By its name the Hugging Face layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.bias = nn.Parameter(torch.ones(4))


class PlanarNorm(nn.Module):
    """A norm with a scale of two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.zeros(7, 4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.planar = PlanarNorm()
        self.layer_norm = nn.LayerNorm((3, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 6)
        self.mixer = Conv1D()
        self.fc = nn.Linear(4, 5)
        self.codes = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)


LAYERS = [
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "mixer.weight",
    "fc.weight",
]


def test_layers_by_default() -> None:
    assert list(prunable_weights(Zoo())) == LAYERS


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("fc.weight", ["fc.weight"]),
        ("fc", ["fc.weight"]),
        (["fc", "conv"], ["conv.weight", "fc.weight"]),
        ("*", LAYERS),
        ("attention*", LAYERS[1:3]),
        ("embed*", ["embed.weight"]),
        ("pos?tion", ["position"]),
    ],
)
def test_scope(scope: str | list[str], expected: list[str]) -> None:
    assert list(prunable_weights(Zoo(), scope)) == expected


def test_ignore() -> None:
    assert list(prunable_weights(Zoo(), ignore=["lstm", "*.out_proj*", "conv"])) == [LAYERS[1], LAYERS[5], LAYERS[6]]
    assert list(prunable_weights(Zoo(), ["f*", "conv"], "fc")) == ["conv.weight"]


def quantised(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    return layer


def test_layers_of_integers_are_named_and_stay() -> None:
    model = nn.Sequential(quantised(nn.Linear(4, 3)), nn.Linear(3, 4), quantised(nn.Linear(4, 3)))
    with pytest.warns(UserWarning, match="^0 and 1 more are held as integers.*: prune before quantising"):
        assert list(prunable_weights(model)) == ["1.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(prunable_weights(model, "1")) == ["1.weight"]
    with pytest.raises(ModelError, match=r"nothing to prune in Sequential: .* \(0 holds integers: prune before quant"):
        prunable_weights(nn.Sequential(quantised(nn.Linear(4, 3))))


def test_adapters_that_are_not_merged_are_named() -> None:
    inside = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})})
    with pytest.warns(UserWarning, match=r"^1\.lora_A\.default\.weight is of an adapter.*merge_and_unload\(\)"):
        prunable_weights(nn.Sequential(nn.Linear(4, 4), inside))


def test_values_are_the_model_s_parameters() -> None:
    model = Zoo()
    assert prunable_weights(model)["fc.weight"] is model.fc.weight


@pytest.mark.parametrize("where", ["scope", "ignore"])
def test_a_pattern_without_a_match_is_refused(where: str) -> None:
    with pytest.raises(OptionError, match=r"unknown weight pattern 'cnv.weight'; the nearest are conv.weight"):
        prunable_weights(Zoo(), **{where: "cnv.weight"})


def test_norms_and_biases_cannot_be_asked_for() -> None:
    for pattern in ("planar", "layer_norm.weight", "fc.bias", "codes"):
        with pytest.raises(OptionError, match=r"unknown weight pattern"):
            prunable_weights(Zoo(), pattern)


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ModelError, match=r"nothing to prune in LayerNorm"):
        prunable_weights(nn.LayerNorm(4))
    with pytest.raises(ModelError, match=r"nothing to prune in Linear"):
        prunable_weights(nn.Linear(2, 2), ignore="weight")


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"0.weight has no shape yet"):
        prunable_weights(nn.Sequential(nn.LazyLinear(3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


def test_a_weight_tied_to_an_embedding_counts_as_one_and_only_when_asked_for() -> None:
    assert list(prunable_weights(Tied())) == ["body.weight"]
    assert list(prunable_weights(Tied(), ["head", "embed", "body"])) == ["embed.weight", "body.weight"]


def test_canonical_names() -> None:
    names = canonical_names(Tied())
    assert names["head.weight"] == names["embed.weight"] == "embed.weight"
    assert names["body.bias"] == "body.bias"


def test_class_names_that_only_sound_like_norms() -> None:
    class NormalizedProjection(nn.Linear):
        pass

    class NormLinear(nn.Linear):
        pass

    model = nn.Sequential(NormalizedProjection(2, 2), NormLinear(2, 2))
    assert list(prunable_weights(model)) == ["0.weight", "1.weight"]


def test_stacked_experts_are_weights_where_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Module())
    model[1].up, model[1].table = nn.Parameter(torch.ones(4, 24, 8)), nn.Parameter(torch.ones(1, 24, 8))
    model[1].down, model[1].bias = nn.Parameter(torch.ones(4, 8, 12)), nn.Parameter(torch.ones(4, 24))
    assert list(prunable_weights(model)) == ["0.weight"]
    assert list(prunable_weights(model, stacks=True)) == ["0.weight", "1.up", "1.down"]
    assert list(prunable_weights(model, ignore="1.up", stacks=True)) == ["0.weight", "1.down"]
    assert stack_names(model) == {"1.up", "1.down"}
    assert input_axes(model, ["0.weight", "1.up", "1.table"]) == {"0.weight": 1, "1.up": 2, "1.table": 1}
    model[1].is_transposed = True
    assert input_axes(model, ["1.up"]) == {"1.up": 1}


def test_a_pattern_needs_inputs_that_it_divides_whatever_their_axis() -> None:
    weights = {"a": nn.Parameter(torch.ones(2, 6, 8)), "b": nn.Parameter(torch.ones(2, 8, 6))}
    fitting = divided_weights(weights, 4, "2:4", all_of_them=False, axes={"a": 2, "b": 2})
    assert list(fitting) == ["a"]
    assert list(divided_weights(weights, 4, "2:4", all_of_them=False, axes={"a": 1, "b": 1})) == ["b"]
    with pytest.raises(OptionError, match="2:4 needs a number of inputs that 4 divides; b has 6"):
        divided_weights(weights, 4, "2:4", all_of_them=True, axes={"a": 2, "b": 2})
