"""The demonstration, once through with a single pass of training: every claim of its table holds on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import secateurs as sec
from secateurs import demo
from secateurs.core.errors import MissingExtraError, ProofError
from tests.cli.running import Ran, run

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("demo") / "out"
    ran = run("demo", "--out", place, "--epochs", "1")
    assert ran.code == 0, ran.err
    return ran, place, json.loads((place / "demo.json").read_text())


def test_every_figure_was_measured_on_what_was_saved(shown: tuple[Ran, Path, dict[str, Any]]) -> None:
    _, place, found = shown
    dense, half, sparse = found["outcomes"]
    x, y = demo.digits(0).test
    for outcome in (half, sparse):
        made = sec.load(place / outcome["name"])
        with torch.no_grad():
            right = (made.model(x).argmax(1) == y).double().mean().item()
        assert outcome["accuracy"] == pytest.approx(right)
        assert sum(p.numel() for p in made.model.parameters()) == outcome["params"]
        assert sum(int(p.count_nonzero()) for p in made.model.parameters()) == outcome["nonzero"]
    assert half["macs"] <= dense["macs"] / 2
    assert half["disk_bytes"] < dense["disk_bytes"]
    plan = sec.load(place / "sparse").plan
    assert plan.sparsity == pytest.approx(0.9, abs=1e-4)
    weights = sec.load(place / "sparse").model.get_parameter
    assert plan.counts == {name: int(weights(name).count_nonzero()) for name in plan.counts}
    assert dense["speedup"] is None
    assert half["speedup"] > 0
    assert found["proof"] < 1e-4


def test_the_exported_file_agrees_with_the_saved_model(shown: tuple[Ran, Path, dict[str, Any]]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    _, place, _ = shown
    session = runtime.InferenceSession(str(place / "half.onnx"), providers=["CPUExecutionProvider"])
    x = demo.digits(0).examples
    with torch.no_grad():
        expected = sec.load(place / "half").model(x)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_it_is_shown_to_a_person(shown: tuple[Ran, Path, dict[str, Any]]) -> None:
    ran, _, found = shown
    assert all(name in ran.out for name in ("dense", "half", "sparse", "macs<=50%", "sparsity=90%"))
    assert all(headline in ran.out for headline in found["headlines"].values())
    assert "training a residual network on handwritten digits" in ran.err
    assert Path(found["files"]["half, report"]).read_text().startswith("<!")


def test_digits_are_split_honestly() -> None:
    data, other = demo.digits(0), demo.digits(1)
    assert data.train[0].shape == (1347, 1, 8, 8)
    assert data.test[0].shape == (450, 1, 8, 8)
    assert data.train[0].min() >= 0
    assert data.train[0].max() == 1
    assert data.test[1].bincount().min() >= 43
    assert not torch.equal(data.test[0], other.test[0])
    seen = {tuple(picture.flatten().tolist()) for picture in data.train[0]}
    assert sum(tuple(picture.flatten().tolist()) in seen for picture in data.test[0]) == 0


def test_batches_are_complete_and_shuffled() -> None:
    data = demo.digits(0)
    assert {len(x) for x, _ in data.batches()} == {64}
    torch.manual_seed(0)
    shuffled = data.shuffled(0)
    assert len(shuffled) == len(data.batches())
    assert not torch.equal(shuffled[0][1], data.batches()[0][1])


def test_without_onnx_it_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingExtraError("onnx", "onnx")

    made = _Made()
    monkeypatch.setattr(demo, "export_onnx", missing)
    monkeypatch.setattr(demo, "_pruned", lambda *_: made)
    monkeypatch.setattr(demo, "train", lambda *_, **__: None)
    monkeypatch.setattr(demo, "load", lambda _: made)
    found = demo.run(tmp_path)
    assert found.notes == (
        "no ONNX file was made: onnx is needed here; install it with: pip install 'secateurs[onnx]'",
    )
    assert "half, ONNX" not in found.files


def test_a_model_that_came_back_changed_is_refused() -> None:
    saved, loaded = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(ProofError, match="weight comes back from the disk changed"):
        demo._refuse_changes(saved, loaded)
    demo._refuse_changes(saved, saved)


class _Made:
    """A pruned model that took no time."""

    model = torch.nn.Linear(2, 2)
    report = sec.Report(
        model="x",
        form="cut",
        before=sec.report.Side(params=4, macs=4, quality={"accuracy": 1.0}),
        after=sec.report.Side(params=2, macs=2, quality={"accuracy": 0.5}),
    )

    def save(self, folder: Path) -> Path:
        return folder
