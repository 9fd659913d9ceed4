"""The sentence, case by case, as whole sentences: it is the part of a report that everybody reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from secateurs.report import LatencySummary, Report, Side, Speedup
from secateurs.report.headline import setting
from tests.report.sample import sample
from tests.report.strategies import reports

CPU = {"threads": 2, "batch": 64}
DENSE = Side(
    1000, 1000, 2000.0, 4000, 3_400_000, LatencySummary(0.0171, 0.0168, 0.0180, **CPU), {"accuracy": 0.939, "nll": 0.2}
)
SMALL = Side(
    380, 380, 992.0, 1520, 1_400_000, LatencySummary(0.0100, 0.0099, 0.0105, **CPU), {"accuracy": 0.931, "nll": 0.3}
)
FAST = Speedup(1.71, 1.66, 1.75)


def said(before: Side = DENSE, after: Side = SMALL, form: str = "cut", **more: Any) -> str:
    return Report(model="net", form=form, before=before, after=after, **more).headline()  # type: ignore[arg-type]


def test_smaller_and_faster() -> None:
    assert said(speedup=FAST) == (
        "49.6% of the MACs and 38.0% of the parameters are left; the file shrank from 3.40 MB to 1.40 MB; measured "
        "1.71× faster on this CPU (2 threads, batch 64); accuracy went from 93.9% to 93.1%."
    )


def test_without_a_comparison_the_two_latencies_count() -> None:
    assert "; measured 1.71× faster on this CPU (2 threads, batch 64);" in said()


def test_smaller_but_not_faster_says_why_where_macs_promised_more() -> None:
    assert said(speedup=Speedup(1.02, 0.97, 1.06)) == (
        "Smaller, but not faster: 49.6% of the MACs and 38.0% of the parameters are left; the file shrank from 3.40 MB "
        "to 1.40 MB; measured 1.02× the speed on this CPU (2 threads, batch 64), which is within the noise (between "
        "0.97× and 1.06×); small widths and memory-bound layers take time that MACs do not count; accuracy went from "
        "93.9% to 93.1%."
    )
    few = said(after=replace(SMALL, macs=1800.0), speedup=Speedup(1.03, 1.02, 1.04))
    assert few.startswith("Smaller, but not faster: 90.0% of the MACs")
    assert "measured 1.03× the speed on this CPU (2 threads, batch 64), which nobody would notice; accuracy" in few


def test_slower() -> None:
    text = said(speedup=Speedup(0.8, 0.77, 0.86))
    assert text.startswith("Smaller, but not faster: ")
    assert "measured 1.25× slower on this CPU" in text


def test_a_speedup_within_the_noise_is_no_speedup() -> None:
    assert "measured 1.20× the speed" in said(speedup=Speedup(1.2, 0.9, 1.5))
    assert "faster" not in said(speedup=Speedup(1.2, 0.9, 1.5))


@pytest.mark.parametrize(
    ("lost", "end"),
    [
        ({"latency": None}, "1.40 MB; latency was not measured; accuracy went from 93.9% to 93.1%."),
        ({"quality": {}}, "(2 threads, batch 64); quality was not measured."),
        ({"latency": None, "quality": {}}, "1.40 MB; latency and quality were not measured."),
    ],
)
def test_what_was_not_measured_is_said(lost: dict[str, Any], end: str) -> None:
    assert said(after=replace(SMALL, **lost)).endswith(end)


def test_quality_without_a_before_and_without_a_change() -> None:
    assert said(before=replace(DENSE, quality={})).endswith("; accuracy is 93.1%.")
    assert said(after=replace(SMALL, quality={"accuracy": 0.9391})).endswith("; accuracy stays at 93.9%.")


def test_files() -> None:
    assert "; the file stays at 3.40 MB;" in said(after=replace(SMALL, disk_bytes=3_400_100))
    assert "; the file grew from 3.40 MB to 3.60 MB;" in said(after=replace(SMALL, disk_bytes=3_600_000))
    assert "; its memory shrank from 4.00 KB to 1.52 KB;" in said(after=replace(SMALL, disk_bytes=None))
    assert "MB" not in said(after=replace(SMALL, disk_bytes=None, bytes=None))


def test_sizes() -> None:
    assert said(after=replace(SMALL, params=1000)).startswith("49.6% of the MACs and all parameters are left;")
    assert said(after=replace(SMALL, macs=None)).startswith("38.0% of the parameters are left;")
    nothing = said(after=DENSE, speedup=Speedup(1.0, 0.98, 1.02))
    assert nothing.startswith("Nothing was removed: all MACs and all parameters are left; the file stays")
    assert said(before=Side(0), after=Side(0)).startswith("What is left of the model is unknown;")


MASKED = replace(DENSE, nonzero=100, quality={"accuracy": 0.93})


def test_masked() -> None:
    assert said(after=MASKED, form="mask") == (
        "Masked, not smaller: 90.0% of the parameters are zero, but the file and the latency are those of the dense "
        "model; accuracy went from 93.9% to 93.0%."
    )
    uncounted = said(after=replace(MASKED, nonzero=None, quality={}), form="mask")
    assert uncounted.startswith("Masked, not smaller: the pruned parameters are zero, but the file and the latency are")
    assert uncounted.endswith("; quality was not measured.")


def test_masked_where_a_runtime_or_a_format_uses_the_zeros() -> None:
    fast = said(after=MASKED, form="mask", speedup=Speedup(1.4, 1.3, 1.5))
    assert "90.0% of the parameters are zero; but the file is that of the dense model; measured 1.40× faster" in fast
    small = said(after=replace(MASKED, disk_bytes=700_000, latency=None), form="mask")
    assert "are zero; the file shrank from 3.40 MB to 700 KB; latency was not measured; accuracy" in small


@pytest.mark.parametrize(
    ("latency", "text"),
    [
        (None, ""),
        (LatencySummary(1, 1, 1), " on this CPU"),
        (LatencySummary(1, 1, 1, threads=1), " on this CPU (1 thread)"),
        (LatencySummary(1, 1, 1, batch=8, device="cuda:0"), " on device cuda:0 (batch 8)"),
    ],
)
def test_settings(latency: LatencySummary | None, text: str) -> None:
    assert setting(latency) == text


@given(reports())
def test_any_report_has_one_sentence(report: Report) -> None:
    text = report.headline()
    assert text.endswith(".")
    assert text[0].isupper() or text[0].isdigit() or text[0] in "<>"
    assert "\n" not in text
    assert text.startswith("Masked, not smaller: ") == (report.form == "mask")


def test_the_sample() -> None:
    assert sample().headline().startswith("49.4% of the MACs and 49.5% of the parameters are left; the file shrank")
