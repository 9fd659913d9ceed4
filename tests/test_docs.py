"""The generated pages of docs/ are what the catalogue and the results say now, and no page links to a missing one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.architectures import COLLECTIONS, COLUMNS
from tools import docs
from tools.docs import ROOT, pages

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_page_is_not_stale(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def _architectures(name: str, *verdicts: tuple[str, str]) -> dict:
    rows = [[model, *[""] * (len(COLUMNS) - 2), verdict] for model, verdict in verdicts]
    about = {"claim": "c", "held": "h", "command": "x", "data": "d", "seeds": [], "note": ""}
    machine = {"date": "today", "torch": "2", "cpu": "this", "threads": 1}
    return {"name": name, "system": "core", "columns": list(COLUMNS), "rows": rows, "environment": machine, **about}


def test_architectures_are_counted_and_every_failure_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _architectures("architectures_timm", ("a", "covered"), ("b", "it broke"), ("c", "skipped: large"))
    others = {**_architectures("rivals_timm"), "columns": ["model", "tp"], "rows": [["a", "hangs"], ["b", "covered"]]}
    monkeypatch.setattr(docs, "results_on_file", lambda: [ours, others])
    page = docs.architectures_page()
    assert "| timm | 1 | 2 | 50.0% | 95% | 1 | 0 |" in page
    assert "| models | of | secateurs, no hints | tp |\n| --- | --- | --- | --- |\n| timm | 2 | 1 | 1 |" in page
    failures = page.partition("## Not covered")[2].partition("\n## ")[0]
    assert re.findall(r"^\| timm \| (\w+) \| (.+) \|$", failures, re.MULTILINE) == [
        ("b", "it broke"),
        ("c", "skipped: large"),
    ]
    assert "## What a model must be" in page


def test_tables_of_architectures_stand_on_their_own_page_only() -> None:
    evidence = pages()[ROOT / "docs" / "evidence.md"]
    for collection in COLLECTIONS:
        assert f"## architectures {collection}" not in evidence
        assert f"## rivals {collection}" not in evidence
