"""Checkpoints of mixtures: experts stored apart, stacked or under other names are solved as they are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateurs as sec
from secateurs.core.errors import ModelError
from secateurs.integrations.footprint import matrices_of
from secateurs.integrations.shards import Shards
from secateurs.integrations.streaming import prune_checkpoint
from secateurs.methods.language.sparsegpt import SparseGPT
from secateurs.methods.language.wanda import Wanda
from tests.graph.test_experts import language_model

pytestmark = pytest.mark.filterwarnings("ignore")
# How the experts of the last block are called in the checkpoint.
STORED = {
    "Mixtral": "model.layers.1.block_sparse_moe.experts.{}.w2.weight",
    "Qwen3-MoE": "model.layers.1.mlp.experts.{}.down_proj.weight",
    "DeepSeek-V3": "model.layers.1.mlp.experts.{}.down_proj.weight",
    "Granite-MoE": "model.layers.1.block_sparse_moe.output_linear.weight",
    "GPT-OSS": "model.layers.1.mlp.experts.down_proj",
    "Llama-4": "model.layers.1.feed_forward.experts.down_proj",
}


def built(name: str, folder: Path) -> Any:
    model, _ = language_model(name)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


@pytest.fixture
def data() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, 97, (3, 12))} for _ in range(2)]


def names(folder: Path) -> list[str]:
    return sorted(Shards(folder).names)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("options", [Wanda(), SparseGPT(propagate="dense")], ids=["wanda", "sparsegpt"])
def test_a_streamed_mixture_is_what_is_pruned_in_memory(
    name: str, options: Any, tmp_path: Path, data: list[Any]
) -> None:
    model = built(name, tmp_path / "before")
    done = prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", options, data=data)
    method = type(options).__name__.lower()
    whole = sec.prune(model, data[0], "2:4", method=method, options=options, data=data, measure=False)
    loaded, expected = type(model).from_pretrained(tmp_path / "after").state_dict(), whole.model.state_dict()
    assert all(torch.equal(tensor, expected[own]) for own, tensor in loaded.items())
    assert done.sparsity == pytest.approx(whole.plan.sparsity)
    # Under the names that it came with.
    assert names(tmp_path / "after") == names(tmp_path / "before")
    stored = [one for one in names(tmp_path / "after") if one in {STORED[name].format(e) for e in range(8)}]
    assert len(stored) == (8 if "{}" in STORED[name] else 1)
    shares = [float((Shards(tmp_path / "after").read(one) == 0).float().mean()) for one in stored]
    assert shares[0] > 0
    assert max(shares) == pytest.approx(0.5, abs=0 if len(stored) == 8 else 0.2)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, data: list[Any]) -> None:
    built("Mixtral", tmp_path / "before")

    def stop(done: Any) -> None:
        raise KeyboardInterrupt

    def run(out: str, **more: Any) -> None:
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / out, Wanda(), data=data, **more)

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", on_block=stop)
    run("killed")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file


def test_the_peak_has_the_products_of_all_experts(tmp_path: Path, data: list[Any]) -> None:
    model = built("GPT-OSS", tmp_path / "before")
    peaks = [
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / method, options, data=data).predicted_bytes
        for method, options in (("wanda", Wanda()), ("sparsegpt", SparseGPT()))
    ]
    path = "model.layers.0.mlp.experts"
    found = matrices_of(model, [f"{path}.gate_up_proj", f"{path}.down_proj"], data[0])
    experts = [matrix for stack in found.values() for matrix in stack]
    assert [matrix.columns for matrix in experts] == [32] * 8 + [48] * 8
    # Wanda's solver needs more beside what is gathered than SparseGPT's beside the products.
    assert peaks[1] - peaks[0] > 0.9 * sum(matrix.products for matrix in experts)


def test_experts_that_are_not_all_there_are_refused(tmp_path: Path, data: list[Any]) -> None:
    model, _ = language_model("Mixtral")
    model.save_pretrained(tmp_path / "before")
    file = tmp_path / "before" / "model.safetensors"
    rest = {name: tensor for name, tensor in load_file(file).items() if ".experts.7." not in name}
    save_file(rest, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stores model\.layers\.0\.mlp\.experts\.gate_up_proj under another name"):
        prune_checkpoint(tmp_path / "before", "2:4", tmp_path / "after", Wanda(), data=data)


def test_a_stack_is_read_from_its_pieces_and_taken_apart(tmp_path: Path) -> None:
    pieces = {f"{expert}.{part}": torch.full((rows, 3), 10.0 * expert + rows) for expert in range(2)
              for part, rows in (("gate", 1), ("up", 2))}  # fmt: skip
    save_file({**pieces, "norm": torch.ones(4)}, tmp_path / "model.safetensors")
    rows = tuple((f"{expert}.gate", f"{expert}.up") for expert in range(2))
    shards = Shards(tmp_path, stacks={"experts": rows})
    stack = shards.read("experts")
    assert stack[:, :, 0].tolist() == [[1, 2, 2], [11, 12, 12]]
    assert "experts" in shards
    assert (shards.entries("experts"), shards.bytes("experts"), shards.dtype("experts")) == (18, 72, torch.float32)
    assert shards.pieces("experts") == ["0.gate", "0.up", "1.gate", "1.up"]
    assert shards.pieces("norm") == ["norm"]
    apart = shards.apart("experts", stack)
    assert apart.keys() == pieces.keys()
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in apart.items())
    assert list(shards.apart("norm", torch.zeros(4))) == ["norm"]
