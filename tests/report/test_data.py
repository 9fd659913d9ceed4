"""Reports as data: forgiving to whoever fills them, strict to whoever reads the file."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given

from secateurs.core.budget import Budget
from secateurs.core.errors import FileError, OptionError
from secateurs.report import GroupChange, LatencySummary, LayerChange, Recovery, Report, Side, Speedup
from tests.report.sample import sample
from tests.report.strategies import reports

TINY = Report(model="net", form="cut", before=Side(100), after=Side(60))


@given(reports())
def test_what_is_written_is_read(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == report


def test_the_sample_survives_its_file(tmp_path: Path) -> None:
    path = sample().save(tmp_path / "new" / "report.json")
    assert Report.load(path) == sample()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    quality = {"perplexity": math.inf, "gain": -math.inf, "loss": math.nan}
    report = Report(model="net", form="mask", before=Side(1), after=Side(1, quality=quality), recipe={"cap": math.inf})
    read = Report.load(report.save(tmp_path / "r.json"))
    assert read.after.quality["perplexity"] == math.inf
    assert read.after.quality["gain"] == -math.inf
    assert math.isnan(read.after.quality["loss"])
    assert read.recipe == report.recipe == {"cap": "Infinity"}


class Kind(str, enum.Enum):
    HEAD = "head"


def test_constructors_take_what_callers_have() -> None:
    report = Report(
        model="net",
        form="cut",
        budget=Budget.parse("macs<=50%"),  # type: ignore[arg-type]
        before=Side(numpy.int64(100), quality={"accuracy": torch.tensor(0.5)}),  # type: ignore[arg-type, dict-item]
        after=Side(60, latency=LatencySummary(1, 1, 1, device=torch.device("cpu"))),  # type: ignore[arg-type]
        layers=[LayerChange("a", shape_before=torch.Size([2, 3]))],  # type: ignore[arg-type]
        groups=[GroupChange("g", Kind.HEAD, 8, 4, ["a.weight"])],  # type: ignore[arg-type, list-item]
        speedup=(1.5, 1.4, 1.6),  # type: ignore[arg-type]
        recipe={"out": Path("x"), "dtype": torch.float16, "shares": [0.5, numpy.float32(0.25)]},
    )
    assert report.budget == "macs<=50%"
    assert report.layers[0].shape_before == (2, 3)
    assert report.groups[0] == GroupChange("g", "head", 8, 4, ("a.weight",))
    assert report.speedup == Speedup(1.5, 1.4, 1.6)
    assert report.recipe == {"out": "x", "dtype": "torch.float16", "shares": (0.5, 0.25)}
    assert json.loads(json.dumps(report.to_dict()))["after"]["latency"]["device"] == "cpu"
    assert Report.from_dict(report.to_dict()) == report


def test_what_callers_hand_over_is_copied() -> None:
    quality = {"accuracy": 0.5}
    side = Side(1, quality=quality)
    quality["accuracy"] = 0.1
    assert side.quality == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Report(model="n", form="both", before=Side(1), after=Side(1)), "is 'cut' or 'mask', got 'both'."),  # type: ignore[arg-type]
        (lambda: GroupChange("g", "head", 4, 5), "group g of 4 units keeps 5: it must be 0 to 4."),
        (lambda: Speedup(1.0, 0.0, 2.0), "a speed-up is how many times faster, so finite and more than 0; got 0.0."),
        (
            lambda: Report(model="n", form="cut", before=Side(1), after=Side(1), predicted_speedup=0.0),
            "a predicted speed-up is finite and more than 0; got 0.0.",
        ),
        (lambda: Recovery("hour"), "the unit of a recovery is 'epoch' or 'step', got 'hour'."),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError) as error:
        make()
    assert str(error.value).endswith(message)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The sample's JSON with one place replaced; `...` deletes it."""
    data = json.loads(json.dumps(sample().to_dict()))
    *above, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    node = data
    for key in above:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


WRITER = "; the report was written by secateurs 0.1.0."


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "secateurs plan", "this is not a report of secateurs: make one with Report.save."),
        ("version", 2, "format version 2, written by secateurs 0.1.0; this release reads version 1: install the"),
        ("version", ..., "format version None"),
        ("colour", "green", "report has the unknown field 'colour'" + WRITER),
        ("layers/3/colour", "green", "report.layers[3] has the unknown field 'colour'" + WRITER),
        ("model", ..., "report lacks the field 'model'" + WRITER),
        ("before/params", ..., "report.before lacks the field 'params'" + WRITER),
        ("before", [], "report.before should be a JSON object, not list" + WRITER),
        ("layers", {}, "report.layers should be a JSON array, not dict" + WRITER),
        ("layers/0/macs_before", "9", "report.layers[0].macs_before should be of type float, not str" + WRITER),
        ("before/params", 1.5, "report.before.params should be of type int, not float" + WRITER),
        ("before/params", True, "report.before.params should be of type int, not bool" + WRITER),
        ("form", "both", "report.form should be 'cut' or 'mask', not 'both'" + WRITER),
        (
            "groups/1/kept",
            99,
            "report.groups[1]: group layer1.0.conv1 of 16 units keeps 99: it must be 0 to 16" + WRITER,
        ),
        ("sensitivity/layer1.0.conv1/0", [1.0], "report.sensitivity['layer1.0.conv1'][0] should have 2 entries, not 1"),
        ("stages", {"one-shot": 0.5}, "report.stages['one-shot'] should be a JSON object, not float" + WRITER),
    ],
)
def test_other_files_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(FileError) as error:
        Report.from_dict(changed(path, value))
    assert message in str(error.value)


def test_a_field_with_a_default_may_be_missing() -> None:
    assert Report.from_dict(changed("seconds", ...)).seconds == {}


@pytest.mark.parametrize(
    ("text", "fact"), [('{"format": "secat', "cannot be read as a report"), ("[]", "not a report")]
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, fact: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(FileError, match=fact) as error:
        Report.load(path)
    assert str(path) in str(error.value)
    with pytest.raises(FileError, match="cannot be read"):
        Report.load(tmp_path / "missing.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TINY.save(tmp_path / "report.json")
    old = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        sample().save(path)
    assert path.read_text() == old
    assert len(list(tmp_path.iterdir())) == 1
