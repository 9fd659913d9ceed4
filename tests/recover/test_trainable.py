"""Subsets of parameters: which they are, and that nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.recover.adapters import attach
from secateurs.recover.trainable import SELECTORS, create_biases, head_of, is_tied, only_trained, trainable_parameters


class RMSNorm(nn.Module):
    """A norm known by its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6, bias=False), RMSNorm(), nn.Linear(6, 3)
    )


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("biases", ["0.bias", "1.bias", "5.bias"]),
        ("norms", ["1.weight", "1.bias", "4.weight"]),
        ("head", ["5.weight", "5.bias"]),
        (("norms", "biases"), ["0.bias", "1.weight", "1.bias", "4.weight", "5.bias"]),
        (("head", "norms"), ["1.weight", "1.bias", "4.weight", "5.weight", "5.bias"]),
        ("all", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "4.weight", "5.weight", "5.bias"]),
    ],
)
def test_subsets(what: Any, names: list[str]) -> None:
    assert list(trainable_parameters(net(), what)) == names


def test_adapters_are_a_subset() -> None:
    model = net()
    attach(model, ["0", "3"], rank=2)
    names = ["0.adapter.down", "0.adapter.up", "3.adapter.down", "3.adapter.up"]
    assert list(trainable_parameters(model, "adapters")) == names
    assert "0.adapter.down" not in trainable_parameters(model, ("biases", "norms"))


def test_biases_of_attention_and_tables_of_biases() -> None:
    model = nn.MultiheadAttention(4, 2)
    model.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
    assert list(trainable_parameters(model, "biases")) == ["in_proj_bias", "out_proj.bias"]


def test_opt_125m_is_counted_as_published() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(transformers.OPTConfig())

    def count(what: Any) -> int:
        return sum(parameter.numel() for parameter in trainable_parameters(model, what).values())

    total, both = sum(p.numel() for p in model.parameters()), count(("biases", "norms"))
    assert (total, count("biases"), both - count("biases")) == (125_239_296, 102_144, 19_200)
    assert round(100 * count("biases") / total, 4) == 0.0816
    assert round(100 * both / total, 4) == 0.0969
    assert head_of(model) == "lm_head"
    assert is_tied(model, "lm_head")


@pytest.mark.parametrize("what", [s for s in SELECTORS if s != "all"])
def test_nothing_outside_the_subset_moves_by_a_bit(what: str) -> None:
    model = net()
    attach(model, ["0", "3"], rank=2)
    model[1].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with only_trained(model, what) as chosen:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(chosen)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_flags_return_when_training_fails() -> None:
    model = net()

    def training() -> None:
        with only_trained(model, "biases"):
            assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "1.bias", "5.bias"]
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        training()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_whole_numbers_are_left_alone() -> None:
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with only_trained(model, "all") as chosen:
        assert list(chosen) == ["bias"]


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("bias", OptionError, "unknown selector of parameters 'bias'; the nearest are biases"),
        ("adapters", ModelError, "Sequential has no adapters to train: choose others of biases, norms"),
        ((), ModelError, "Sequential has no parameter to train"),
    ],
)
def test_what_cannot_be_trained(what: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), only_trained(net(), what):
        pytest.fail("there is nothing to train")


def test_a_head_that_is_the_embedding_too_is_refused() -> None:
    assert is_tied(tied(), "head")
    assert not is_tied(net(), "5")
    with pytest.raises(ModelError, match="the weight of head is that of an embedding too and would change it"):
        trainable_parameters(tied(), "head")
    assert list(trainable_parameters(tied(), "all")) == ["embedding.weight"]


def test_the_head() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.last = nn.Linear(2, 3), nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    assert head_of(net()) == "5"
    assert head_of(Named()) == "out"
    assert head_of(nn.Linear(2, 2)) == ""
    with pytest.raises(ModelError, match="Conv2d has no linear layer that could be its head"):
        head_of(nn.Conv2d(1, 1, 1))


def test_biases_are_created_where_asked_for() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ConvTranspose2d(4, 6, 3, bias=False, groups=2), nn.Flatten(),
        nn.Linear(6 * 25, 5, bias=False), nn.Linear(5, 2),
    ).bfloat16()  # fmt: skip
    given = torch.randn(2, 1, 5, 5).bfloat16()
    before, kept = model(given), model[4].bias
    assert create_biases(model, "[01]") == ("0.bias", "1.bias")
    assert create_biases(model) == ("3.bias",)
    assert create_biases(model) == ()
    assert [tuple(model[i].bias.shape) for i in (0, 1, 3)] == [(4,), (6,), (5,)]
    assert model[0].bias.dtype == torch.bfloat16
    assert model[4].bias is kept
    assert torch.equal(model(given), before)
    assert len(trainable_parameters(model, "biases")) == 4
    with torch.no_grad():
        model[3].bias += 1
    assert not torch.equal(model(given), before)


def test_creating_a_bias_for_no_layer() -> None:
    with pytest.raises(OptionError, match=r"unknown layer '1'; the nearest are"):
        create_biases(net(), "1")
