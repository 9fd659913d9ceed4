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


def zeroed(workplace: Path) -> None:
    (workplace / "zeros.py").write_text(
        "import torch\nfrom torch import nn\ndef net():\n    layer = nn.Linear(6, 6).requires_grad_(False)\n"
        "    layer.weight[:, 1:] = 0\n    return nn.Sequential(layer), torch.ones(2, 6)\n"
    )


def test_sparse_forms(workplace: Path) -> None:
    zeroed(workplace)
    (found,) = run_json("bench", "zeros:net", "--sparse", "--seconds", "0.01")
    (layer,) = found["sparse"]["layers"]
    assert (layer["name"], layer["shape"]) == ("0", [6, 6])
    assert layer["density"] == pytest.approx(1 / 6)
    assert {"dense", "sparse"} <= set(found["sparse"]["seconds"])
    assert len(found["sparse"]["speedup"]) == 3
    assert "sparse" not in run_json("bench", "zeros:net", "--seconds", "0.01")[0]


def test_a_table_of_sparse_forms(workplace: Path) -> None:
    zeroed(workplace)
    shown = run("bench", "zeros:net", "--sparse", "--seconds", "0.01").out
    assert "zeros:net: the form of each layer" in shown
    assert "6×6" in shown
    assert "One pass, taken in turn: dense " in shown


def test_onnxruntime_is_left_out_where_it_fails(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateurs.core.errors import MissingExtraError, ModelError
    from secateurs.deploy import onnx

    zeroed(workplace)
    words = ("bench", "zeros:net", "--sparse", "--seconds", "0.01")

    def fails(error: Exception) -> None:
        def session(*_: object) -> None:
            raise error

        monkeypatch.setattr(onnx, "onnx_session", session)

    fails(ModelError("it has no luck."))
    assert "note: without onnxruntime, since it has no luck." in run(*words).err
    fails(MissingExtraError("onnxruntime", "onnx"))
    ran = run(*words)
    assert (ran.code, "note" in ran.err, "onnxruntime" in ran.out) == (0, False, False)


def test_a_missing_model(workplace: Path) -> None:
    ran = run("bench", "things:net", "./nowhere", *QUICK)
    assert (ran.code, ran.out) == (1, "")
    assert "there is no folder './nowhere'" in ran.error
