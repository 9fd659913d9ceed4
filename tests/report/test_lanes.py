"""The lane diagram: where rows, lanes and marks stand."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from secateurs.report.lanes import Lane, Row, drawing, tracks

SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda s: (min(s), max(s))), max_size=12)


def drawn(rows: list[Row], lanes: list[Lane]) -> ElementTree.Element:
    return ElementTree.fromstring(drawing(rows, lanes, "a label"))


def of(picture: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [e for e in picture.iter() if kind in e.attrib.get("class", "").split()]


@given(SPANS)
def test_lanes_on_one_track_never_touch(spans: list[tuple[int, int]]) -> None:
    places = tracks(spans)
    for i, (first, last) in enumerate(spans):
        for j in range(i):
            if places[i] == places[j]:
                # The row before a lane is for its label.
                assert spans[j][1] < first - 1 or last < spans[j][0] - 1


@given(SPANS)
def test_no_more_tracks_than_lanes_meet_in_a_row(spans: list[tuple[int, int]]) -> None:
    crowd = max((sum(a - 1 <= row <= b for a, b in spans) for row in range(-1, 21)), default=0)
    assert len(set(tracks(spans))) == crowd


def test_marks_stand_in_their_rows() -> None:
    rows = [Row("a.one"), Row("a.two"), Row("b", note="why")]
    lane = Lane("7", 3, "seven", {0: "makes", 1: "passes", 2: "reads"})
    picture = drawn(rows, [lane])
    (group,) = of(picture, "lane")
    assert group.attrib["class"] == "lane lane3"
    assert [e.text for e in group.iter("title")] == ["seven"]
    (maker,), (reader,) = of(group, "makes"), of(group, "reads")
    x = maker.attrib["cx"]
    assert (maker.attrib["cy"], reader.attrib["cy"], reader.attrib["cx"]) == ("30", "70", x)
    trunk, passing = group.iter("line")
    assert (trunk.attrib["y1"], trunk.attrib["y2"], trunk.attrib["x1"]) == ("30", "70", x)
    assert float(passing.attrib["x1"]) < float(x) < float(passing.attrib["x2"])
    assert passing.attrib["y1"] == "50"
    assert [e.text for e in of(picture, "note")] == ["why"]
    assert of(picture, "again")[0].text == "a."
    assert picture.attrib["aria-label"] == "a label"


def test_long_words_are_cut_and_the_picture_is_as_wide_as_they_are() -> None:
    long = "model." + "layers." * 12 + "projection"
    picture = drawn([Row(long, note="because " * 20), Row(long.replace("proj", "inj"))], [])
    names = ["".join(e.itertext()) for e in of(picture, "row")]
    assert [len(name) for name in names] == [46, 46]
    assert names[0].startswith("…")
    assert names[0].endswith("projection")
    assert of(picture, "note")[0].text[-1] == "…"  # type: ignore[index]
    right = max(float(e.attrib["x"]) for e in of(picture, "note"))
    assert float(picture.attrib["width"]) >= right + 72 * 6


def test_words_are_escaped() -> None:
    evil = "<script>&\"'"
    picture = drawn([Row(f"{evil}.x", evil, evil), Row(f"{evil}.y")], [Lane(evil, 0, evil, {0: "hidden"})])
    assert "".join(of(picture, "row")[1].itertext()) == f"{evil}.y"
    assert {e.text for e in picture.iter("title")} == {evil}
    assert not list(picture.iter("script"))
