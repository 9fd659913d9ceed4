"""Charts are checked by reading back what they drew."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.report import svg
from secateurs.report.svg import Curve, Dumbbell, Scale


def drawn(picture: svg.Svg) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def of(picture: svg.Svg, tag: str, kind: str | None = None) -> list[dict[str, str]]:
    """Attributes of all elements with this tag and, if given, this class."""
    found = [e.attrib for e in drawn(picture).iter(tag)]
    return [a for a in found if kind is None or a.get("class") == kind]


def percent(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


def number(text: float) -> str:
    return f"{text:g}"


def test_markup_is_escaped_once_and_trusted_afterwards() -> None:
    mark = svg.tag("g", svg.words("<a> & b", 0, 0, "x"), aria_label='"quoted" <b>', nothing=None)
    assert '<g aria-label="&quot;quoted&quot; &lt;b&gt;">' in mark
    assert "&lt;a&gt; &amp; b" in mark
    assert mark.__html__() == mark
    assert svg.tag("rect", class_="after") == '<rect class="after"/>'


def test_scales() -> None:
    assert [Scale(2, 6).at(x) for x in (2, 3, 6)] == [0, 25, 100]
    assert Scale(3, 3).at(3) == 50


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 0.25, 0.5, 0.75, 1)),
        (0.83, 0.94, (0.85, 0.9)),
        (1, 30, (10, 20, 30)),
        (0, 0, (0,)),
        (-3, 3, (-2, 0, 2)),
        (0, 1e6, (0, 250000, 500000, 750000, 1000000)),
    ],
)
def test_ticks(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 6))
def test_ticks_are_few_even_and_inside(low: float, width: float, wanted: int) -> None:
    found = svg.ticks(low, low + width, wanted)
    assert 1 <= len(found) <= wanted + 1
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)
    steps = [b - a for a, b in pairwise(found)]
    assert all(step == pytest.approx(steps[0], rel=1e-5) for step in steps)


@pytest.mark.parametrize(("low", "high"), [(0, 5e-324), (-1e308, 1e308), (2, 1), (math.nan, 1)])
def test_a_range_beyond_arithmetic_has_one_tick(low: float, high: float) -> None:
    assert len(svg.ticks(low, high)) == 1


def test_bars_show_before_and_after_and_spread() -> None:
    picture = svg.bars(80, 20, 100, [(15, 25)])
    assert percent(of(picture, "rect", "before")[0]["width"]) == 80
    assert percent(of(picture, "rect", "after")[0]["width"]) == 20
    assert {(percent(a["x1"]), percent(a["x2"])) for a in of(picture, "line", "span")} == {(15, 25), (15, 15), (25, 25)}
    assert drawn(picture).attrib["aria-hidden"] == "true"
    assert of(svg.bars(0, 0, 0), "rect", "after")[0]["width"] == "0%"


def test_strips_start_at_the_reference() -> None:
    picture = svg.strip(0.5, 0.75, Scale(0, 1))
    assert [(a["x1"], a["x2"]) for a in of(picture, "line")] == [("75%", "75%"), ("75%", "50%")]
    assert of(picture, "circle")[0]["cx"] == "50%"
    assert of(svg.strip(0.5, None, Scale(0, 1)), "line") == []


def test_scores_that_stay() -> None:
    picture = svg.scores(1, 2, 5, 3)
    assert [a["x1"] for a in of(picture, "line", "after")] == ["50%"]
    assert [a["x1"] for a in of(picture, "line", "median")] == ["25%"]
    assert of(svg.scores(1, 2, 5, None), "line", "after") == []


def columns(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(h)) for x, h in re.findall(r"M([\d.]+) 100v-([\d.]+)h[\d.]+V100z", path)]


def test_profiles_have_a_column_per_layer() -> None:
    picture = svg.profile([(4, 1), (2, 2), (0, 0), (1, 0)], "four layers")
    assert columns(of(picture, "path", "before")[0]["d"]) == [(0, 100), (25, 50), (75, 25)]
    assert columns(of(picture, "path", "after")[0]["d"]) == [(0, 25), (25, 50)]
    assert drawn(picture).attrib["aria-label"] == "four layers"
    assert len(of(svg.profile([(1, 0.5)] * 1000, ""), "path")) == 2


def test_line_charts_draw_points_band_reference_and_axes() -> None:
    points = ((1, 0.2), (2, 0.4), (3, 1.0))
    band = ((1, 0.1, 0.3), (3, 0.9, 1.1))
    picture = svg.line_chart(Curve(points, band, 0.6), "rises", x_text=number, y_text=number, last="here")
    dots = [(percent(a["cx"]), 100 - percent(a["cy"])) for a in of(picture, "circle")]
    low, high = 0.1 - 0.08, 1.1 + 0.08
    slow = [(50 * (x - 1), 100 * (y - low) / (high - low)) for x, y in points]
    assert dots == [pytest.approx(pair, abs=0.01) for pair in slow]
    line = [float(v) for v in of(picture, "path", "line")[0]["d"][1:].split()]
    assert line == pytest.approx([v for x, y in slow for v in (x, 100 - y)], abs=0.01)
    assert of(picture, "path", "band")[0]["d"].endswith("z")
    assert len(of(picture, "path", "reference")) == 1
    assert [e.text for e in drawn(picture).iter("text")][-1] == "here"
    texts = {e.text for e in drawn(picture).iter("text")}
    assert texts == {"1", "1.5", "2", "2.5", "3", "0.5", "here"}


def test_long_curves_have_no_dots_and_gaps_are_left_out() -> None:
    long = Curve(tuple((i, i) for i in range(50)))
    assert of(svg.line_chart(long, "", x_text=number, y_text=number), "circle") == []
    broken = Curve(((0, 1.0), (1, math.inf), (2, 3.0)))
    picture = svg.line_chart(broken, "", x_text=number, y_text=number)
    assert len(of(picture, "circle")) == 2
    assert not re.search("inf|nan", picture)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=6, unique=True), st.floats(-9, 9))
def test_a_curve_between_its_points_is_linear(xs: list[float], at: float) -> None:
    xs = sorted(xs)
    curve = Curve(tuple((x, math.sin(x)) for x in xs))
    if xs[0] <= at <= xs[-1]:
        assert curve.at(at) == pytest.approx(float(numpy.interp(at, xs, [math.sin(x) for x in xs])), abs=1e-6)
    else:
        assert curve.at(at) is None


def test_sparks_mark_the_choice_only_on_the_curve() -> None:
    curve = Curve(((0.0, 1.0), (1.0, 0.0)), reference=1.0)
    picture = svg.spark(curve, 0.25, Scale(0, 1), Scale(0, 1), "falls")
    assert [(a["cx"], a["cy"]) for a in of(picture, "circle")] == [("25%", "25%")]
    assert of(svg.spark(curve, None, Scale(0, 1), Scale(0, 1), ""), "circle") == []
    assert of(svg.spark(Curve(((0.0, 1.0), (0.5, 0.5))), 0.9, Scale(0, 1), Scale(0, 1), ""), "circle") == []


def test_dumbbells() -> None:
    rows = [Dumbbell("a", 0.9, 0.5, 0.6), Dumbbell("b", 0.8, 0.2, None), Dumbbell("c", 0.8, None, None)]
    picture = svg.dumbbells(rows, "front", x_text=number, y_text=number, reference=0.95)
    assert [a["cx"] for a in of(picture, "circle", "after")] == ["50%", "20%"]
    assert [a["cx"] for a in of(picture, "circle", "ring")] == ["60%"]
    assert [(a["x1"], a["x2"]) for a in of(picture, "line", "reach")] == [("50%", "60%"), ("20%", "20%")]
    names = {e.text: (e.attrib["class"], e.attrib["x"]) for e in drawn(picture).iter("text") if e.text in ("a", "b")}
    assert names == {"a": ("name end", "60%"), "b": ("name", "20%")}
