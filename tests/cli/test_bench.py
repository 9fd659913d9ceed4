from __future__ import annotations

from pathlib import Path

import pytest

from secateurs.cli import bench
from tests.cli.running import run, run_json

QUICK = ("--seconds", "0.01", "--input", "2,1,8,8")


def test_models_side_by_side(workplace: Path) -> None:
    words = ("--budget", "macs<=50%", "--out", "smaller", "--input", "1,1,8,8", "--no-measure", "--quiet")
    assert run("prune", "things:net", *words).code == 0
    whole, cut = run_json("bench", "things:net", "smaller", *QUICK)
    assert (whole["model"], cut["model"]) == ("things:net", "smaller")
    assert whole["speedup"]["median"] == 1
    assert cut["macs"] <= whole["macs"] / 2
    assert cut["params"] < whole["params"]
    assert whole["batch"] == cut["batch"] == 2
    assert whole["repeats"] == cut["repeats"] >= 3
    assert 0 < cut["latency"]["p10"] <= cut["latency"]["median"] <= cut["latency"]["p90"]


def test_a_table_for_people(workplace: Path) -> None:
    shown = run("bench", "things:net", "things:net", *QUICK).out
    assert "batch 2, cpu" in shown
    assert "things:net (2)" in shown


@pytest.mark.parametrize(
    ("specs", "names"),
    [(["a", "b"], ["a", "b"]), (["a", "a", "b", "a"], ["a", "a (2)", "b", "a (3)"])],
)
def test_names_are_distinct(specs: list[str], names: list[str]) -> None:
    assert bench._names(specs) == names


def test_unequal_batches_are_told(workplace: Path) -> None:
    (workplace / "two.py").write_text(
        "import torch\nfrom torch import nn\ndef one(): return nn.Linear(2, 2), torch.ones(1, 2)\n"
        "def two(): return nn.Linear(2, 2), torch.ones(2, 2)\n"
    )
    assert "batches of different sizes" in run("bench", "two:one", "two:two", "--seconds", "0.01").err
    assert "batches" not in run("bench", "two:one", "two:one", "--seconds", "0.01").err


def test_a_missing_model(workplace: Path) -> None:
    ran = run("bench", "things:net", "./nowhere", *QUICK)
    assert (ran.code, ran.out) == (1, "")
    assert "there is no folder './nowhere'" in ran.error
