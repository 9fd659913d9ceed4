"""What a sparse runtime made of a model, in the report: as data, as a sentence, as text and on the page."""

from __future__ import annotations

from dataclasses import replace

from secateurs.report import Report, RuntimeLayer, RuntimeSummary, Side
from secateurs.report.page import render
from tests.report.html_checks import Page, form_faults, label_faults

FAST = RuntimeSummary(
    "2.10 times faster than the dense model: 2 of 3 layers changed.",
    {"dense": 0.0042, "sparse": 0.002, "onnxruntime": 0.003},
    (2.1, 2.0, 2.2),
    32,
    (
        RuntimeLayer("a", "csr", (8, 4), 0.1, 0.002, 0.0005),
        RuntimeLayer("b", "bag", (8, 8), 0.25),
        RuntimeLayer("c", "dense", (2, 8), 1.0, reason="none of its <weights> is zero"),
    ),
)
REPORT = Report(model="net", form="mask", before=Side(100, 100), after=Side(100, 10), runtime=FAST)


def test_reports_from_before_the_runtime_are_read() -> None:
    old = REPORT.to_dict()
    del old["runtime"]
    assert Report.from_dict(old) == replace(REPORT, runtime=None)
    assert Report.from_dict(REPORT.to_dict()) == REPORT


def test_layers_that_changed() -> None:
    assert [layer.name for layer in FAST.changed] == ["a", "b"]


def test_the_sentence() -> None:
    assert REPORT.headline().endswith("; 2.10× faster in the sparse runtime.")
    for summary in (None, replace(FAST, speedup=None), replace(FAST, speedup=(1.04, 1.0, 1.1))):
        assert "runtime" not in replace(REPORT, runtime=summary).headline()
    assert "1.05× faster in" in replace(REPORT, runtime=replace(FAST, speedup=(1.05, 1.0, 1.1))).headline()


def test_the_text() -> None:
    section = """sparse runtime
  2.10 times faster than the dense model: 2 of 3 layers changed.
  a  csr  8×4  10.0% not zero  2.00 ms → 500 µs
  b  bag  8×8  25.0% not zero
  1 layer dense
"""
    assert section in REPORT.to_text()
    assert "sparse runtime" not in replace(REPORT, runtime=None).to_text()


def test_the_text_where_dense_wins() -> None:
    dense = RuntimeSummary("Dense wins.", layers=(RuntimeLayer("c", "dense", reason="why"),))
    assert "sparse runtime\n  Dense wins.\n" in replace(REPORT, runtime=dense).to_text() + "\n"


def test_the_page() -> None:
    text = render(REPORT)
    page = Page(text)
    assert (form_faults(page), label_faults(page)) == ([], [])
    assert '<a href="#runtime">Runtime</a>' in text
    assert FAST.verdict in text
    assert "none of its &lt;weights&gt; is zero" in text
    assert "dense 4.20\N{NO-BREAK SPACE}ms, sparse 2.00\N{NO-BREAK SPACE}ms" in text
    assert 'id="runtime"' not in render(replace(REPORT, runtime=None))
