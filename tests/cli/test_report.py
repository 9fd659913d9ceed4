from __future__ import annotations

from pathlib import Path

import pytest

import secateurs as sec
from secateurs.deploy import load_extra
from tests.cli.running import run, run_json


@pytest.fixture
def smaller(workplace: Path) -> Path:
    words = ("--budget", "macs<=50%", "--out", "smaller", "--input", "1,1,8,8", "--no-measure", "--quiet")
    assert run("prune", "things:net", *words).code == 0
    return Path("smaller")


def test_the_report_of_a_folder(smaller: Path) -> None:
    page = (smaller / "report.html").read_bytes()
    ran = run("report", smaller)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(sec.load(smaller).report.to_text())
    assert ran.out.endswith("page: smaller/report.html\n")
    assert (smaller / "report.html").read_bytes() == page
    assert load_extra(smaller, "report.html") == page


def test_the_report_as_json(smaller: Path) -> None:
    found = run_json("report", smaller)
    assert found.pop("page") == "smaller/report.html"
    assert sec.Report.from_dict(found) == sec.load(smaller).report


def test_a_lost_page_is_drawn_again(smaller: Path) -> None:
    page = (smaller / "report.html").read_bytes()
    (smaller / "report.html").unlink()
    assert run("report", smaller).code == 0
    assert (smaller / "report.html").read_bytes() == page


def test_a_page_elsewhere(smaller: Path) -> None:
    assert run("report", smaller, "--html", "pages/here.html").out.endswith("page: pages/here.html\n")
    assert Path("pages/here.html").read_bytes() == (smaller / "report.html").read_bytes()


def test_a_report_alone(smaller: Path) -> None:
    sec.load(smaller).report.save("run.json")
    assert run("report", "run.json").out.endswith("page: run.html\n")
    assert Path("run.html").exists()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [("nowhere", "nowhere cannot be read as a report"), (".", "holds no saved model: model.json is missing")],
)
def test_where_there_is_no_report(workplace: Path, place: str, sentence: str) -> None:
    ran = run("report", place)
    assert (ran.code, ran.out) == (1, "")
    assert sentence in ran.error


def test_a_report_that_was_changed(smaller: Path) -> None:
    file = smaller / "report.json"
    file.write_text(file.read_text().replace("macs<=50%", "macs<=10%"))
    ran = run("report", smaller)
    assert ran.code == 1
    assert "was changed after it was saved" in ran.error
