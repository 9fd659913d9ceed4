"""`secateurs prune --granularity embedding`: a vocabulary cut to what a text needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import secateurs as sec
from tests.cli.running import run

WORDS = 40


@pytest.fixture
def checkpoint(workplace: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    LlamaForCausalLM(config).save_pretrained("dense")
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w38"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w38", mask_token="w35").save_pretrained("dense")
    Path("text.txt").write_text(" ".join(f"w{i % 7 + 2 * (i % 5)}" for i in range(600)), encoding="utf-8")
    Path("other.txt").write_text(" ".join(f"w{i % 20}" for i in range(300)), encoding="utf-8")
    return workplace / "dense"


def test_a_vocabulary_is_cut_to_a_text(checkpoint: Path) -> None:
    ran = run(
        "prune", "dense", "--granularity", "embedding", "--budget", "sparsity=50%", "--data", "text.txt",
        "--test-data", "other.txt", "--out", "small", "--export", "huggingface", "--no-measure",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    made = sec.load("small")
    assert made.plan.recipe.criterion == "token-frequency"
    assert made.plan.recipe.unknown == 38
    kept = made.plan.kept_ids().tolist()
    assert len(kept) == WORDS // 2
    # All words of the text, and the tokenizer's own.
    assert {*range(15), 35, 38} <= set(kept)
    assert json.loads(Path("small.hf/kept_ids.json").read_text()) == {"model.embed_tokens": kept}
    again = LlamaForCausalLM.from_pretrained("small.hf").eval()
    ids = AutoTokenizer.from_pretrained("small.hf")("w3 w35 w39", return_tensors="pt")["input_ids"]
    assert [kept[i] for i in ids[0].tolist()] == [3, 35, 38]
    with torch.no_grad():
        whole = LlamaForCausalLM.from_pretrained("dense").eval()(torch.tensor([[3, 35, 38]])).logits
        torch.testing.assert_close(again(ids).logits, whole[..., kept], rtol=1e-5, atol=1e-6)


def test_tasks_ask_with_the_old_ids(checkpoint: Path) -> None:
    words = ("--granularity", "embedding", "--budget", "sparsity=50%", "--tasks", "arc_easy", "--out", "small")
    ran = run("prune", "dense", *words)
    assert ran.code == 1
    assert "granularity embedding changes ids" in ran.error
