"""Tasks of the harness, defined here by files, so that nothing is downloaded."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateurs.core.errors import DataError, MissingExtraError, ModelError, OptionError
from secateurs.integrations import lm_eval as harness
from secateurs.integrations.lm_eval import check_tasks, evaluate_tasks, task_quality
from tests.cli.running import run, run_json, workplace

__all__ = ["workplace"]

WORDS = ["[UNK]", "[END]", *(f"w{number}" for number in range(30))]
ROWS = [{"question": f"w{i} w{i + 1}", "choices": ["w2", "w3 w4", "w5"], "answer": i % 3} for i in range(12)]


@pytest.fixture
def folder(workplace: Path) -> Path:
    """A language model of random weights with its tokenizer, and tasks: choice.yaml, lost.yaml."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(workplace / "model")
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[END]", bos_token="[END]")
    fast.save_pretrained(workplace / "model")
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    for name, rows in (("choice", "rows.jsonl"), ("lost", "nowhere.jsonl")):
        (workplace / f"{name}.yaml").write_text(
            f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {workplace / rows}}}, cache_dir: {workplace / "cache"}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
            encoding="utf-8",
        )
    return workplace


def opened(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    return model, PreTrainedTokenizerFast.from_pretrained(folder / "model")


def by_hand(model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the rows whose answer has the highest log-likelihood, as it is and by its letters."""
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        sums = []
        for choice in row["choices"]:
            prompt, answer = ([WORDS.index(word) for word in text.split()] for text in (row["question"], choice))
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(prompt) + i - 1, word]) for i, word in enumerate(answer)))
        lengths = [len(choice) for choice in row["choices"]]
        right["acc"] += max(range(3), key=lambda i: sums[i]) == row["answer"]
        right["acc_norm"] += max(range(3), key=lambda i: sums[i] / lengths[i]) == row["answer"]
    return {name: count / len(rows) for name, count in right.items()}


needed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@needed
@pytest.mark.parametrize("limit", [None, 5])
def test_accuracies_are_those_counted_by_hand(folder: Path, limit: int | None) -> None:
    model, tokenizer = opened(folder)
    found = evaluate_tasks(model, tokenizer, ["choice.yaml"], limit=limit, batch_size=4)
    assert found == {"choice": pytest.approx(by_hand(model, ROWS[:limit]))}


@needed
def test_the_model_and_the_random_numbers_are_left_as_they_were(folder: Path) -> None:
    model, tokenizer = opened(folder)
    # A head that was pruned apart from the embeddings that it was tied to.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    evaluate_tasks(model, str(folder / "model"), ["choice.yaml"], limit=2, num_fewshot=1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.lm_head.weight.any()
    assert "tie_weights" not in vars(model)
    assert len(tokenizer) == 32


@needed
def test_what_cannot_be_evaluated_is_refused(folder: Path) -> None:
    model, tokenizer = opened(folder)
    with pytest.raises(OptionError, match="unknown task of lm-eval 'hellaswagg'; the nearest are hellaswag"):
        check_tasks(["hellaswagg"])
    with pytest.raises(OptionError, match=r"there is no file 'gone\.yaml' that defines a task"):
        check_tasks(["gone.yaml"])
    with pytest.raises(DataError, match=r"the task lost\.yaml cannot be loaded"):
        evaluate_tasks(model, tokenizer, ["lost.yaml"])
    with pytest.raises(ModelError, match="tasks are for language models of transformers; Linear is none"):
        evaluate_tasks(nn.Linear(2, 2), tokenizer, ["choice.yaml"])
    model.model.layers[0].mlp.up_proj = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be run on the tasks"):
        evaluate_tasks(model, tokenizer, ["choice.yaml"])


@needed
def test_the_command_measures_before_and_after(folder: Path) -> None:
    words = ("prune", "model", "--budget", "sparsity=50%", "--granularity", "weight", "--no-measure", "--out", "made")
    report = run_json(*words, "--tasks", "choice.yaml", "--tasks-limit", "10")["report"]
    model, _ = opened(folder)
    wanted = by_hand(model, ROWS[:10])
    assert report["before"]["quality"] == {
        "choice accuracy": pytest.approx(wanted["acc"]),
        "choice normalised accuracy": pytest.approx(wanted["acc_norm"]),
    }
    assert list(report["after"]["quality"]) == list(report["before"]["quality"])
    page = Path("made/report.html").read_text(encoding="utf-8")
    assert "choice normalised accuracy" in page


@needed
def test_tasks_stand_behind_what_test_data_say(folder: Path) -> None:
    Path("cats.txt").write_text("w1 w2 w3 w4 " * 100, encoding="utf-8")
    words = ("prune", "model", "--budget", "sparsity=50%", "--granularity", "weight", "--no-measure", "--out", "made")
    report = run_json(*words, "--tasks", "choice.yaml", "--test-data", "cats.txt")["report"]
    assert list(report["after"]["quality"])[-2:] == ["choice accuracy", "choice normalised accuracy"]
    assert len(report["after"]["quality"]) > 2
    # The last stage is the model that comes out: it must not be told twice.
    assert list(report["stages"].values())[-1] == report["after"]["quality"]


@needed
def test_the_command_refuses_before_it_prunes(folder: Path) -> None:
    words = ("prune", "things:net", "--budget", "macs<=50%", "--out", "made", "--input", "2,1,8,8", "--no-measure")
    ran = run(*words, "--tasks", "choice.yaml")
    assert (ran.code, ran.error) == (
        1,
        "error: --tasks needs a Hugging Face language model that predicts the next token; things:net is none.",
    )
    assert run(*words, "--tasks", "hellaswagg").error.startswith("error: unknown task of lm-eval 'hellaswagg'")
    assert not Path("made").exists()


def test_quality_has_a_name_for_each_task_and_metric() -> None:
    found = task_quality({"a": {"acc": 0.5, "perplexity": 3.0}, "b": {"exact_match (strict)": 0.25}})
    assert found == {"a accuracy": 0.5, "a perplexity": 3.0, "b exact_match (strict)": 0.25}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"limit": 0.5}, r"limit must be a whole number of at least 1, got 0\.5"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"tasks": []}, r"tasks must be a list of at least one name, got \[\]"),
        ({"tasks": "arc_easy"}, "tasks must be a list of at least one name, got 'arc_easy'"),
    ],
)
def test_numbers_outside_their_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        evaluate_tasks(nn.Linear(2, 2), None, **{"tasks": ["arc_easy"], **options})


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    harness._index.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"lm-eval is needed here; install it with: .*'secateurs\[eval\]'"):
        check_tasks(["arc_easy"])
