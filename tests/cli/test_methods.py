from __future__ import annotations

import pytest

from secateurs.core import catalogue
from secateurs.criteria import criteria
from tests.cli.running import run, run_json


def test_the_catalogue_as_records() -> None:
    records = run_json("methods")
    assert [record["name"] for record in records] == [method.name for method in catalogue.catalogue()]
    assert all({"name", "title", "units", "when", "needs", "run", "summary"} <= set(record) for record in records)


def test_an_empty_catalogue_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_METHODS", {})
    assert run_json("methods") == []
    assert run("methods").out == "The catalogue of methods is empty in this release.\n"


def test_criteria_and_allocations() -> None:
    found = run_json("methods", "--criteria")
    assert [record["name"] for record in found["criteria"]] == [criterion.name for criterion in criteria()]
    rules = {record["name"]: record for record in found["allocations"]}
    assert rules["erk"]["needs"] == ["shapes"]
    assert rules["lamp"]["needs"] == ["scores"]
    assert all(record["summary"] for record in (*found["criteria"], *found["allocations"]))


def test_tables_name_everything() -> None:
    shown = run("methods", "--criteria").out
    assert all(name in shown for name in ("magnitude", "taylor", "wanda", "global", "erk", "uniform"))
    assert "data, labels" in shown
