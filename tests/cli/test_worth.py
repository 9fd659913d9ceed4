from __future__ import annotations

from pathlib import Path

from tests.cli.running import run, run_json

WORDS = (
    "--budget",
    "macs<=50%",
    "--data",
    "small.npz",
    "--test-data",
    "small.npz",
    "--epochs",
    "1",
    "--tune-epochs",
    "1",
)


def test_every_arm_is_run_for_every_seed(workplace: Path) -> None:
    verdict = run_json("worth", "things:net", *WORDS, "--seeds", "2", "--tune-lr", "0.01", "--quiet")
    arms = verdict["arms"]
    assert list(arms) == ["dense", "pruned", "fine-tune at 0.01", "scratch-E", "scratch-B"]
    for arm in arms.values():
        assert len(arm["accuracies"]) == 2
        assert arm["mean"] == sum(arm["accuracies"]) / 2
    assert isinstance(verdict["worth_it"], bool)


def test_zeros_add_the_lottery_ticket(workplace: Path) -> None:
    words = ("--budget", "sparsity=50%", *WORDS[2:], "--seeds", "1", "--granularity", "weight", "--quiet")
    assert "lottery" in run_json("worth", "things:net", *words)["arms"]


def test_an_impossible_budget_is_one_sentence(workplace: Path) -> None:
    failed = run("worth", "things:net", "--budget", "macs<=0.1%", *WORDS[2:], "--seeds", "1", "--quiet")
    assert failed.code == 1
    assert failed.error.startswith("error: macs<=0.1% cannot be met")
