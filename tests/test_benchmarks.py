"""How the tables of architectures are judged and kept: by small models, without any of the collections."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import architectures, record
from benchmarks.architectures import COLUMNS, COVERED, Entry
from secateurs.graph.structure import Frozen


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))


def _row(make: Any, parameters: int = 0) -> dict[str, str]:
    return dict(zip(COLUMNS, architectures.row(Entry("it", make, parameters)), strict=True))


def test_a_model_that_can_be_cut_is_covered() -> None:
    found = _row(lambda: (_net().eval(), torch.randn(1, 3, 3, 3)))
    # 224 + 16 + 36 parameters: half of the eight channels go, and with them half of all but four biases.
    assert (found["groups"], found["recorded"], found["stay"], found["gone"]) == ("1", "0", "1", "49%")
    assert (found["same shapes"], found["trains"], found["verdict"]) == ("yes", "yes", COVERED)
    assert found["commonest reasons"] == "1× an axis of the model's output"


def test_a_model_that_did_not_train_before_is_not_blamed() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).detach()

    found = _row(lambda: (Detached().eval(), torch.randn(1, 3, 3, 3)))
    assert (found["trains"], found["verdict"]) == ("not before either", COVERED)


def test_what_fails_has_its_reason_and_what_was_known() -> None:
    found = _row(lambda: (nn.Linear(3, 4), torch.randn(2, 5)))
    assert found["parameters"] == "0.00M"
    assert found["verdict"].startswith("ModelError: the model does not run on the example inputs (tensor [2, 5])")
    assert (found["groups"], found["gone"]) == ("", "")


def test_a_large_model_is_skipped_unbuilt() -> None:
    found = _row(lambda: pytest.fail("it was built"), 800_000_000)
    assert (found["parameters"], found["verdict"]) == ("800M", "skipped: more than 700M parameters")


def test_a_model_that_never_ends_is_given_up_whatever_catches_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while True:
                try:
                    time.sleep(5)
                except Exception:  # noqa: BLE001  (as the library under test may do)
                    return x

    monkeypatch.setattr(architectures, "LIMIT", 1)
    assert _row(lambda: (Endless(), torch.ones(1)))["verdict"] == "takes more than 1 s"


@pytest.mark.parametrize(
    ("gone", "same", "trouble", "expected"),
    [
        (0.2, True, "", COVERED),
        (0.199, True, "", "only 19.9% of the parameters gone"),
        (0.5, False, "", "outputs of another shape"),
        (0.5, True, "no", "does not train after the cut: no"),
    ],
)
def test_verdicts(gone: float, same: bool, trouble: str, expected: str) -> None:
    assert architectures.verdict(gone, same, trouble) == expected


def test_training_troubles() -> None:
    x = torch.randn(1, 3, 3, 3)
    assert architectures.training_trouble(_net(), x) == ""
    net = _net()
    nn.init.constant_(net[4].weight, torch.inf)
    assert architectures.training_trouble(net, x) == "a gradient is not finite"
    assert all(p.grad is None for p in net.parameters())
    assert architectures.training_trouble(_net().requires_grad_(False), x) == "no output has a gradient"
    assert architectures.training_trouble(_net(), x[:, :2]).startswith("RuntimeError: ")


def test_a_batch_of_one_becomes_two_and_others_stay() -> None:
    one, three = torch.ones(1, 2), torch.ones(3, 2)
    first, second = architectures.doubled((one, three))
    assert (first.shape, second.shape) == ((2, 2), (3, 2))
    assert architectures.doubled({"x": one, "n": 3})["x"].shape == (2, 2)


def test_reasons_are_counted_without_their_places() -> None:
    reasons = ["reduced over: mean in a.0.b", "reduced over: mean in the model", "a.weight did not run on these inputs"]
    frozen = [Frozen("t", 0, 4, reason) for reason in reasons]
    assert architectures.commonest(frozen) == "2× reduced over: mean; 1× … did not run on these inputs"
    assert architectures.commonest(frozen, most=1) == "2× reduced over: mean"


def test_a_run_of_some_models_replaces_only_their_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = [Entry(f"m: {name}", lambda: (_net(), torch.ones(1))) for name in "abc"]
    said = iter(["first", "second", "third", COVERED])
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(architectures, "RESULTS", tmp_path)
    monkeypatch.setattr(architectures, "entries", lambda collection: every)
    monkeypatch.setattr(architectures, "row", lambda e: (e.name, *[""] * (len(COLUMNS) - 2), next(said)))
    architectures.run("timm", ["c"])
    assert json.loads((tmp_path / "architectures_timm.json").read_text())["held"].startswith(
        "Covered 0 of 1; 2 not run"
    )
    architectures.run("timm", ["a", "m: b"])
    architectures.run("timm", ["a"])
    content = json.loads((tmp_path / "architectures_timm.json").read_text())
    assert [(row[0], row[-1]) for row in content["rows"]] == [("m: a", COVERED), ("m: b", "third"), ("m: c", "first")]
    assert content["held"] == "Covered 1 of 3 (did not hold)."
    assert architectures.rows_on_file("architectures_timm", ("another", "table")) == {}
    with pytest.raises(SystemExit, match="called d or e"):
        architectures.run("timm", ["d", "a", "e"])
