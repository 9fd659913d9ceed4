"""`secateurs stream`: a checkpoint in, a pruned one out, and what is refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateurs.integrations.shards import Shards
from tests.cli.ranks import WORDS, started
from tests.cli.running import run, run_json

LOADER = """
import torch


def tokens():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(3)]
"""


@pytest.fixture
def checkpoint(workplace: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(workplace / "before", max_shard_size="20KB")
    (workplace / "texts.py").write_text(LOADER, encoding="utf-8")
    return workplace / "before"


def test_a_pattern_holds_in_what_from_pretrained_loads(checkpoint: Path) -> None:
    words = ("stream", checkpoint, "--budget", "2:4", "--data", "texts:tokens", "--out", "after", "--method", "wanda")
    found = run_json(*words)
    assert (found["folder"], found["sparsity"], len(found["errors"])) == ("after", 0.5, 14)
    model = AutoModelForCausalLM.from_pretrained("after")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (weight != 0).view(-1, 4).sum(1).unique().tolist() == [2]
    assert bool((model.lm_head.weight != 0).all())


@pytest.mark.parametrize("tokenizer", [False, True])
def test_prune_leaves_a_folder_for_from_pretrained_where_asked(checkpoint: Path, tokenizer: bool) -> None:
    if tokenizer:
        vocabulary = {f"w{number}": number for number in range(64)}
        made = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(checkpoint)
    words = ("prune", checkpoint, "--budget", "2:4", "--method", "sparsegpt", "--data", "texts:tokens", "--no-measure")
    found = run_json(*words, "--out", "after", "--export", "huggingface")
    assert found["files"]["huggingface"] == "after.hf"
    weight = AutoModelForCausalLM.from_pretrained("after.hf").model.layers[1].mlp.up_proj.weight
    assert (weight != 0).view(-1, 4).sum(1).unique().tolist() == [2]
    assert (Path("after.hf") / "tokenizer.json").is_file() == tokenizer


def test_memory_is_told_before_and_errors_after(checkpoint: Path) -> None:
    ran = run("stream", checkpoint, "--budget", "sparsity=50%", "--data", "texts:tokens", "--out", "after")
    assert ran.code == 0, ran.err
    assert "GiB of memory will be needed" in ran.err
    assert "50.0% of 14 layers went" in ran.out
    assert "mean relative error 0." in ran.out


def test_options_of_the_method_and_precision(checkpoint: Path) -> None:
    ran = run(
        "stream", checkpoint, "--budget", "2:4", "--data", "texts:tokens", "--out", "after", "--precision", "bfloat16",
        "--set", "damping=0.1", "--scope", "*.mlp.*",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "50.0% of 6 layers went" in ran.out
    assert Shards(Path("after")).dtype("model.layers.0.mlp.up_proj.weight") == torch.float32


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--method", "global-magnitude"), "global-magnitude needs the whole model; those that go block by block are"),
        (("--set", "dampings=1"), "unknown option of sparsegpt 'dampings'"),
        (("--budget", "macs<=50%"), "needs a budget such as sparsity=50% or 2:4"),
    ],
)
def test_what_cannot_be_done_is_refused(checkpoint: Path, words: tuple[str, ...], text: str) -> None:
    ran = run("stream", checkpoint, "--budget", "2:4", "--data", "texts:tokens", "--out", "after", *words)
    assert ran.code == 1
    assert text in ran.error


def test_a_name_of_the_hub_is_no_folder(workplace: Path) -> None:
    ran = run("stream", "someone/llm", "--budget", "2:4", "--data", "text.txt", "--out", "after")
    assert ran.code == 1
    assert ran.error.startswith(
        "error: there is no folder someone/llm: give that of a Hugging Face model in safetensors;"
    )


def test_a_folder_without_a_checkpoint_is_refused(workplace: Path, checkpoint: Path) -> None:
    ran = run("stream", workplace, "--budget", "2:4", "--data", "texts:tokens", "--out", "after")
    assert ran.code == 1
    assert "no checkpoint" in ran.error or "no model" in ran.error


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(started, (str(checkpoint.parent), port), nprocs=2)
    told = [Path(f"rank{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]
    assert told[0].startswith("050.0% of 14 layers went")
    assert told[1] == "0"
    assert run(*WORDS, "--out", "one").code == 0
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("one", "two"))
    assert all(torch.equal(tensor != 0, two[name] != 0) for name, tensor in one.items())
