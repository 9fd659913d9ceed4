"""Checkpoints block by block: the same as in memory, resumed to the same bytes, and whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import secateurs as sec
from secateurs.core.errors import DataError, FileError, ModelError, OptionError
from secateurs.integrations.shards import Shards
from secateurs.integrations.streaming import prune_checkpoint
from secateurs.methods.language.sparsegpt import SparseGPT
from secateurs.methods.language.wanda import Wanda

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BUILT: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=32, num_key_value_heads=1)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=32, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZE, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32)),
    "bert": lambda: BertModel(BertConfig(**SIZE, intermediate_size=32)),
}


def built(kind: str, folder: Path, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BUILT[kind]().eval()
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return model


@pytest.fixture
def data() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(3)]


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("budget", ["sparsity=50%", "2:4"])
def test_a_streamed_checkpoint_is_what_is_pruned_in_memory(
    kind: str, budget: str, tmp_path: Path, data: list[Any]
) -> None:
    model = built(kind, tmp_path / "before", max_shard_size="20KB")
    done = prune_checkpoint(tmp_path / "before", budget, tmp_path / "after", Wanda(), data=data)
    whole = sec.prune(model, data[0], budget, method="wanda", data=data, measure=False)
    loaded = type(model).from_pretrained(tmp_path / "after")
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert done.sparsity == 0.5
    assert sorted(f"{name}.weight" for name in done.errors) == sorted(whole.masks)
    assert not (tmp_path / "after" / ".progress").exists()


def test_dense_activations_may_go_on(tmp_path: Path, data: list[Any]) -> None:
    model = built("llama", tmp_path / "before")
    prune_checkpoint(tmp_path / "before", "sparsity=50%", tmp_path / "after", Wanda(propagate="dense"), data=data)
    options = Wanda(propagate="dense")
    whole = sec.prune(model, data[0], "sparsity=50%", method="wanda", options=options, data=data, measure=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole.model.state_dict().items())


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, data: list[Any], propagate: Any, dtype: torch.dtype
) -> None:
    built("llama", tmp_path / "before", dtype=dtype)
    options = Wanda(propagate=propagate)

    def stop(done: Any) -> None:
        assert done.total == 3
        if done.number == 2:
            raise KeyboardInterrupt

    def run(out: str, **more: Any) -> None:
        prune_checkpoint(
            tmp_path / "before", "2:4", tmp_path / out, options, data=data, dtype=torch.float32, **more
        )  # fmt: skip

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", on_block=stop)
    # What was being written when it was killed is not taken for done.
    (tmp_path / "killed" / "model-00003.safetensors").write_bytes(b"half")
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        prune_checkpoint(tmp_path / "before", "sparsity=50%", tmp_path / "killed", options, data=data)
    run("killed")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_tensors_keep_the_checkpoint_s_dtype(tmp_path: Path, data: list[Any]) -> None:
    built("llama", tmp_path / "before", dtype=torch.bfloat16)
    prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data, dtype=torch.float32)
    after, before = Shards(tmp_path / "after"), Shards(tmp_path / "before")
    weight = "model.layers.1.mlp.up_proj.weight"
    assert after.dtype(weight) == before.dtype(weight) == torch.bfloat16
    kept = after.read(weight) != 0
    assert kept.view(-1, 4).sum(1).unique().tolist() == [2]
    assert torch.equal(after.read(weight)[kept], before.read(weight)[kept])


def test_a_checkpoint_without_the_prefix_of_its_base_model_is_read(tmp_path: Path, data: list[Any]) -> None:
    built("gpt2", tmp_path / "before")
    file = tmp_path / "before" / "model.safetensors"
    short = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "after").transformer.h[2].mlp.c_fc.weight
    assert (weight.T != 0).reshape(-1, 4).sum(1).unique().tolist() == [2]


def test_the_peak_is_told_before_anything_is_read(tmp_path: Path, data: list[Any]) -> None:
    built("llama", tmp_path / "before")
    told: list[int] = []

    def tell(predicted: int) -> None:
        told.append(predicted)
        assert not (tmp_path / "after").exists()

    done = prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data, on_memory=tell)
    assert told == [done.predicted_bytes]
    assert predicted(tmp_path, data, SparseGPT()) > predicted(tmp_path, data, Wanda())


def predicted(tmp_path: Path, data: list[Any], options: Any) -> int:
    told: list[int] = []

    def stop(bytes_: int) -> None:
        told.append(bytes_)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "never", options, data=data, on_memory=stop)
    return told[0]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_prediction_is_what_stands_beside_one_another(method: str, tmp_path: Path, data: list[Any]) -> None:
    built("llama", tmp_path / "before")
    shards = Shards(tmp_path / "before")
    names = {
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }  # fmt: skip
    block = sum(shards.bytes(f"model.layers.0.{name}") for name in names)
    embeddings = shards.bytes("model.embed_tokens.weight") + shards.bytes("model.norm.weight")
    options = Wanda() if method == "wanda" else SparseGPT()
    work, weights = options.solver.workspace, 16 * 32
    # Where most is held: up_proj, beside the products that it has from gate_proj, those of down_proj and the masks of
    # what is solved; or down_proj, beside its own.
    masks = 16 * 16 * 2 + 8 * 16 * 2
    up = (16**2 + 32**2) * 8 * options.solver.full + masks + 2 * weights + work.bytes(weights, 16)
    down = 32**2 * 8 * options.solver.full + masks + 3 * weights + work.bytes(weights, 32)
    assert predicted(tmp_path, data, options) == embeddings + block + 2 * 72 * 16 * 4 + max(up, down)


def test_the_report_has_the_errors(tmp_path: Path, data: list[Any]) -> None:
    built("llama", tmp_path / "before")
    done = prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)
    written = json.loads((tmp_path / "after" / "secateurs.json").read_text())
    assert written == {"budget": "2:4", "method": "wanda", "sparsity": 0.5, "errors": dict(done.errors)}


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, data: list[Any]) -> None:
    with pytest.raises(FileError, match="holds no checkpoint in safetensors"):
        prune_checkpoint(tmp_path, "2:4", tmp_path / "after", Wanda(), data=data)
    built("llama", tmp_path / "before", max_shard_size="20KB")
    first = sorted((tmp_path / "before").glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="truncated or damaged"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)
    first.unlink()
    with pytest.raises(FileError, match="missing"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)
    assert not (tmp_path / "after").exists()


def test_other_files_and_the_source_are_never_overwritten(tmp_path: Path, data: list[Any]) -> None:
    built("llama", tmp_path / "before")
    with pytest.raises(FileError, match="the checkpoint itself"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "before", Wanda(), data=data)
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "thesis.tex").write_text("mine")
    with pytest.raises(FileError, match="holds other files"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)
    with pytest.raises(DataError, match="empty"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "new", Wanda(), data=[])


def test_names_that_loading_would_convert_are_refused(tmp_path: Path, data: list[Any]) -> None:
    built("llama", tmp_path / "before")
    file = tmp_path / "before" / "model.safetensors"
    other = {name.replace("gate_proj", "w1"): tensor for name, tensor in load_file(file).items()}
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stores model\.layers\.0\.mlp\.gate_proj\.weight under another name"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)
