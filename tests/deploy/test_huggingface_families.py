"""Cut Hugging Face models, family by family: the config follows, the folder loads, or the reason is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateurs as sec
from benchmarks import pretrained
from benchmarks.families import FAMILIES
from secateurs.core.errors import ModelError, ProofError
from secateurs.deploy.huggingface import save_pretrained
from secateurs.graph.configs.config import fit, mend_config
from secateurs.pruning import Pruned

GRANULARITIES = pretrained.GRANULARITIES
# Where one number fits all layers, and where the class derives the size of a head from the width.
NATIVE = {
    ("BERT", "width"), ("Llama", "channel"), ("Qwen2", "channel"), ("Gemma", "channel"), ("GPT-2", "width"),
    ("ViT", "channel"), ("ResNet", "channel"),
}  # fmt: skip
LOADED = {("BERT", "channel"), ("GPT-2", "channel"), ("Qwen3", "head-size")}
OTHERS = [(name, unit) for name in FAMILIES for unit in GRANULARITIES if (name, unit) not in NATIVE | LOADED]


def pruned(name: str, **options: Any) -> Pruned:
    model, inputs = FAMILIES[name]()
    options = {"granularity": "channel", "allocation": "uniform", **options}
    return sec.prune(model, inputs, "sparsity=50%", measure=False, **options)


@pytest.mark.parametrize(("name", "granularity"), sorted(NATIVE))
def test_uniform_widths_load_from_a_folder(name: str, granularity: str) -> None:
    assert pretrained.fate(name, granularity) == (pretrained.FOLDER, "")


@pytest.mark.parametrize(("name", "granularity"), sorted(LOADED))
def test_what_a_config_cannot_say_is_refused_and_loads_all_the_same(name: str, granularity: str) -> None:
    fate, why = pretrained.fate(name, granularity)
    assert fate == pretrained.LOAD
    assert "0.att" in why or "0.self_attn" in why
    assert why.endswith("save it with save_model.")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "granularity"), OTHERS)
def test_every_family_comes_back(name: str, granularity: str) -> None:
    fate, _ = pretrained.fate(name, granularity)
    assert fate in (pretrained.FOLDER, pretrained.LOAD, pretrained.NOTHING)


def test_the_config_of_the_cut_model_is_mended_and_that_of_the_original_is_not() -> None:
    model, inputs = FAMILIES["Qwen2"]()
    before = model.config.to_dict()
    cut = sec.prune(model, inputs, "sparsity=50%", granularity="channel", allocation="uniform", measure=False).model
    config = cut.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 64)
    # Derived from the width before, which has stayed: now it has to be said.
    assert (config.head_dim, config.hidden_size) == (16, 64)
    assert cut.model.config is config
    assert model.config.to_dict() == before


@pytest.mark.parametrize(("name", "scope"), [("GPT-2", "*.c_fc"), ("GPT-J", "*.fc_in")])
def test_a_number_that_the_config_leaves_open_is_filled_in(name: str, scope: str, tmp_path: Path) -> None:
    """Four times the width, unless it is given."""
    cut = pruned(name, scope=scope).model
    assert FAMILIES[name]()[0].config.n_inner is None
    assert cut.config.n_inner == 128
    assert fit(cut).changes == {}
    save_pretrained(cut, tmp_path / "m")


def test_a_number_that_the_config_leaves_open_stays_so_where_no_one_fits() -> None:
    model, inputs = FAMILIES["GPT-2"]()
    with torch.no_grad():
        for block, scale in zip(model.transformer.h, (1.0, 9.0), strict=True):
            block.mlp.c_fc.weight.mul_(scale)
    cut = sec.prune(model, inputs, "sparsity=50%", scope="*.c_fc", allocation="global", measure=False).model
    assert len({block.mlp.c_fc.nf for block in cut.transformer.h}) == 2
    assert cut.config.n_inner is None


def test_queries_per_key_follow_where_there_is_one_key() -> None:
    cut = pruned("Gemma").model
    assert [layer.self_attn.num_key_value_groups for layer in cut.model.layers] == [2, 2]


def test_a_plain_save_of_the_mended_model_loads(tmp_path: Path) -> None:
    cut = pruned("Llama").model
    cut.save_pretrained(tmp_path)
    loaded = type(cut).from_pretrained(tmp_path).eval()
    inputs = FAMILIES["Llama"]()[1]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, cut.eval()(**inputs).logits)


def test_a_number_on_which_layers_differ_is_left_alone(tmp_path: Path) -> None:
    model, inputs = FAMILIES["Llama"]()
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, (1.0, 9.0), strict=True):
            layer.mlp.gate_proj.weight.mul_(scale)
    cut = sec.prune(model, inputs, "sparsity=50%", granularity="channel", allocation="global", measure=False).model
    widths = [layer.mlp.gate_proj.out_features for layer in cut.model.layers]
    assert widths[0] != widths[1]
    assert cut.config.intermediate_size == 128
    with pytest.raises(ModelError, match=r"the config of LlamaForCausalLM makes 'model\.layers\.\d"):
        save_pretrained(cut, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_mending_can_be_undone() -> None:
    cut = pruned("Llama").model
    mended = cut.config.to_dict()
    for name, value in (("num_attention_heads", 4), ("num_key_value_heads", 2), ("intermediate_size", 128)):
        setattr(cut.config, name, value)
    undo = mend_config(cut)
    assert cut.config.to_dict() == mended
    assert undo is not None
    undo()
    assert (cut.config.num_attention_heads, cut.config.intermediate_size) == (4, 128)


def test_a_model_that_its_config_builds_is_left_alone() -> None:
    model, _ = FAMILIES["BERT"]()
    found = fit(model)
    assert (found.changes, found.left) == ({}, {})
    assert mend_config(model) is None
    assert mend_config(torch.nn.Linear(2, 2)) is None


def test_heads_that_only_numbers_tell_apart_are_not_lost(tmp_path: Path) -> None:
    """Shapes alone fit four heads of eight as well as two of sixteen."""
    cut = pruned("BERT", granularity="width").model
    for layer in cut.bert.encoder.layer:
        layer.attention.self.attention_head_size = 8
    with pytest.raises(ModelError, match="attention_head_size' 16, but it is 8"):
        save_pretrained(cut, tmp_path / "m")


def test_outputs_are_compared_where_there_are_inputs(tmp_path: Path) -> None:
    cut = pruned("BERT", granularity="width").model
    inputs = FAMILIES["BERT"]()[1]
    save_pretrained(cut, tmp_path / "m", example_inputs=inputs)
    for layer in cut.bert.encoder.layer:
        layer.attention.self.num_attention_heads = 1
        layer.attention.self.attention_head_size = 32
    with pytest.raises(ProofError, match="what from_pretrained loads computes something else"):
        save_pretrained(cut, tmp_path / "n", example_inputs=inputs)
