"""Biases that a model got after it was planned, and the flags of a config that say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateurs.core.units import Member
from secateurs.graph.biases import bias_slots, with_biases
from secateurs.graph.configs.building import switches
from secateurs.graph.configs.config import fit, mend_config
from secateurs.graph.cut import cut, mask, prove
from secateurs.graph.infer import infer
from secateurs.graph.structure import Structure
from tests.criteria.models import mlp


def with_bias(model: nn.Module, *paths: str) -> nn.Module:
    for path in paths:
        layer = model.get_submodule(path)
        layer.bias = nn.Parameter(torch.randn(layer.weight.shape[0]))
    return model


def test_an_added_bias_is_typed_like_the_outputs_of_its_layer() -> None:
    x = torch.randn(4, 5)
    structure = infer(mlp(5, 8, 6, 3), x)
    found = with_biases(structure, with_bias(mlp(5, 8, 6, 3), "2", "4"))
    assert found.tensors["2.bias"] == (structure.tensors["2.weight"][0],)
    assert "4.bias" not in found.tensors
    members = {g.name: [m for m in g.members if m.tensor == "2.bias"] for g in found.groups}
    assert members == {"0": [], "2": [Member("2.bias", 0, structure.tensors["2.weight"][0], 1)]}
    assert found.costs.total("params") == structure.costs.total("params") + 6 + 3
    assert found.costs.total("params", {"2": 2}) == structure.costs.total("params", {"2": 2}) + 2 + 3
    assert found.costs.total("bytes", {"2": 2}) == structure.costs.total("bytes", {"2": 2}) + 4 * (2 + 3)
    again = Structure.from_dict(found.to_dict())
    assert again.groups == found.groups


def test_a_model_with_added_biases_is_masked_and_cut_alike() -> None:
    x = torch.randn(4, 5)
    model = with_bias(mlp(5, 8, 6, 3), "0", "2", "4")
    structure = with_biases(infer(mlp(5, 8, 6, 3), x), model)
    keep = {"0": torch.arange(8) % 2 == 0, "2": torch.arange(6) < 2}
    smaller = cut(model, structure, keep)
    assert [smaller[i].bias.shape[0] for i in (0, 2, 4)] == [4, 2, 3]
    assert prove(mask(model, structure.groups, keep), smaller, x) < 1e-5


@pytest.mark.parametrize("change", ["nothing", "weight", "other"])
def test_any_other_difference_leaves_the_structure_as_it_is(change: str) -> None:
    x = torch.randn(4, 5)
    structure = infer(mlp(5, 8, 6, 3), x)
    model = mlp(5, 8, 6, 3) if change == "nothing" else with_bias(mlp(5, 8, 6, 3), "2")
    if change == "weight":
        model[4].weight = nn.Parameter(torch.randn(4, 6))
    if change == "other":
        model[4].register_parameter("scale", nn.Parameter(torch.ones(3)))
    assert with_biases(structure, model) is structure


# -- configs -----------------------------------------------------------------------------------------------------------


def llama(**sizes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, **sizes,
    ))  # fmt: skip


def layers(*names: str) -> set[str]:
    return {f"model.layers.{i}.{name}" for i in range(2) for name in names}


ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
INNER = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_slots_are_those_that_a_flag_makes_together() -> None:
    model = llama()
    assert set(bias_slots(model, ["model.layers.0.mlp.down_proj"])) == layers(*INNER)
    both = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    assert set(bias_slots(model, both)) == layers(*INNER, *ATTENTION)
    assert set(bias_slots(llama(mlp_bias=True), both[1:])) == layers(*ATTENTION)


def test_without_a_flag_for_all_of_them_or_a_config_there_are_no_others() -> None:
    assert bias_slots(llama(), ["lm_head", "model.layers.0.mlp.down_proj"]) == (
        "lm_head",
        "model.layers.0.mlp.down_proj",
    )
    assert bias_slots(mlp(3, 4, 2), ["2"]) == ("2",)


def test_flags_follow_the_biases_and_can_be_put_back() -> None:
    model = with_bias(llama(), *layers(*INNER))
    assert switches(model.config) == {("attention_bias",): False, ("mlp_bias",): False}
    found = fit(model)
    assert found.changes == {("mlp_bias",): (False, True)}
    assert found.left == {}
    undo = mend_config(model)
    assert model.config.mlp_bias is True
    assert model.model.config is model.config
    assert undo is not None
    undo()
    assert model.config.mlp_bias is False


@pytest.mark.parametrize("paths", [layers("mlp.down_proj"), {"model.layers.0.mlp.down_proj"}])
def test_a_flag_that_would_make_others_stays(paths: set[str]) -> None:
    model = with_bias(llama(), *paths)
    found = fit(model)
    assert found.changes == {}
    assert found.left is not None
    assert set(found.left) == {f"{path}.bias" for path in paths}
    assert mend_config(model) is None


def test_flags_and_numbers_are_found_together() -> None:
    model = llama()
    for layer in model.model.layers:
        for name, shape in (("gate", (10, 16)), ("up", (10, 16)), ("down", (16, 10))):
            linear = getattr(layer.mlp, f"{name}_proj")
            linear.weight = nn.Parameter(torch.randn(shape))
            linear.out_features, linear.in_features = shape
            linear.bias = nn.Parameter(torch.randn(shape[0]))
        layer.mlp.intermediate_size = 10
    found = fit(model, agreed=True)
    assert found.changes == {("mlp_bias",): (False, True), ("intermediate_size",): (24, 10)}
    assert found.left == {}


def test_flags_of_sub_configs_are_seen() -> None:
    class Config:
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

        def to_dict(self) -> dict[str, Any]:
            return vars(self)

    inner = Config(qkv_bias=True, bias_scale=2, name="bias")
    assert switches(Config(text=inner, use_bias=False, _bias=inner)) == {
        ("text", "qkv_bias"): True,
        ("use_bias",): False,
    }
