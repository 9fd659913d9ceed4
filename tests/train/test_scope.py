"""Which weights are pruned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.train.scope import canonical_names, prunable_weights


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
