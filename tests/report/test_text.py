from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given

from secateurs.report import GroupChange, LayerChange, Report, Side
from tests.report.sample import sample
from tests.report.strategies import reports

SMALL = """\
60.0% of the MACs and 50.0% of the parameters are left; latency was not measured; accuracy went from 90.0% to 85.0%.

macs<=70% asked, 60.0%: met
params<=40% asked, 50.0%: NOT MET
cut and masked model agree to a relative 2 × 10⁻⁷

Parameters  50     50.0% of 100
MACs        600    60.0% of 1.00 K
File        —      not measured
Latency     —      not measured
Accuracy    85.0%  −5.0 points from 90.0%

quality
  dense     accuracy 90.0%
  one-shot  accuracy 40.0%
  final     accuracy 85.0%

largest changes
  a  8×3 → 4×3   500 → 250 MACs
  b  4×8 → gone
  1 layer unchanged

groups: chosen, and what goes along
  a: 4 of 8 channels stay; also n, b inputs, c inputs and 1 more
  1 group left whole

warnings
  - Look out.

time taken
  score  1.50 s
  cut    20.0 ms

to do it again
  secateurs prune net
"""


def test_a_small_report_whole() -> None:
    along = ("a.weight", "n.weight", "n.bias", "b.weight inputs", "c.weight inputs", "d.weight inputs")
    report = Report(
        model="net",
        form="cut",
        budget="macs<=70%,params<=40%",
        before=Side(100, macs=1000, quality={"accuracy": 0.9}),
        after=Side(50, macs=600, quality={"accuracy": 0.85}),
        layers=(
            LayerChange("a", "Linear", (8, 3), (4, 3), 24, 12, 12, 500, 250),
            LayerChange("b", "Linear", (4, 8), (), 32, 0, 0),
            LayerChange("c", "Linear", (2, 2), (2, 2), 4, 4, 4, 10, 10),
        ),
        groups=(GroupChange("a", "channel", 8, 4, along), GroupChange("z", "channel", 8, 8)),
        proof=2e-7,
        warnings=("Look out.",),
        stages={"one-shot": {"accuracy": 0.4}},
        seconds={"score": 1.5, "cut": 0.02},
        command="secateurs prune net",
    )
    assert report.to_text() == SMALL


def test_long_lists_stop_at_ten() -> None:
    text = sample().to_text()
    assert "  and 44 more layers\n  2 layers unchanged\n" in text
    assert "  and 17 more groups\n  1 group left whole\n" in text
    assert len(text.splitlines()) < 75


def test_ten_are_shown_whole() -> None:
    rows = tuple(LayerChange(f"l{i}", "", (2, 2), (1, 2), 4, 2, 2, 4, 2) for i in range(11))
    tiny = Report(model="n", form="cut", before=Side(44), after=Side(22), layers=rows)
    assert "  and 1 more layer\n" in tiny.to_text()
    assert "more layer" not in replace(tiny, layers=rows[:10]).to_text()


def test_a_masked_layer_tells_its_zeros() -> None:
    rows = (LayerChange("fc", "Linear", (10, 10), (10, 10), 100, 100, 25, 100, 100),)
    text = Report(model="n", form="mask", before=Side(100), after=Side(100, 25), layers=rows).to_text()
    assert "  fc  10×10  25 of 100 not zero\n" in text
    assert re.search(r"^Parameters not zero +25 +25.0% of 100$", text, flags=re.MULTILINE)


@given(reports())
def test_any_report_has_a_text(report: Report) -> None:
    text = report.to_text()
    assert text.startswith(report.headline())
    assert text.endswith("\n")
    assert "{" not in text.replace(str(report), "")[:50]
