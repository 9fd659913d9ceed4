"""An inspection as a page and as text: complete, labelled, escaped, and readable whatever the model's size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from secateurs.report.data import FrozenWidth
from secateurs.report.inspection import Inspection, ModelLayer, UnitGroup, UnitTime
from secateurs.report.inspection_page import GROUPS, render
from secateurs.report.inspection_text import few, measured, shared, spread
from tests.report.html_checks import Element, Page, form_faults, label_faults, loads
from tests.report.test_page import EVIL, contrast, palettes, poisoned

OUTPUT = "an axis of the model's output"


def chain(groups: int) -> Inspection:
    """Layers in a row, each of which reads the width of the one before it; the last stays. Later widths are larger."""
    layers = [ModelLayer(f"body.{i}.conv", "Conv2d", (8, 8, 3, 3), 576, 1e5) for i in range(groups)]
    head = ModelLayer("head", "Linear", (9, 8), 81, 72.0, (OUTPUT,))
    names = [layer.name for layer in (*layers, head)]
    return Inspection(
        model="chain",
        params=1e6,
        macs=1e9,
        bytes=4e6,
        groups=tuple(
            UnitGroup(
                name,
                "channel",
                8 + i,
                f"{name}.weight",
                (f"{name}.bias", f"{names[i + 1]}.weight"),
                makers=(name,),
                passing=(f"body.{i}.norm",),
                readers=(names[i + 1],),
                params_per_unit=145.0,
                macs_per_unit=2e4,
                bytes_per_unit=580.0,
            )
            for i, name in enumerate(names[:-1])
        ),
        layers=(*layers, head),
        frozen=(FrozenWidth("head.weight", 0, 9, OUTPUT),),
        params_in_reach=0.9,
        macs_in_reach=0.8,
    )


def timed(found: Inspection) -> Inspection:
    times = UnitTime(2e-5, 1e-5, 2.5e-5, 4), UnitTime(1e-6, -4e-6, 6e-6, 4), None
    groups = [replace(g, time=0.1, measured=times[i % 3]) for i, g in enumerate(found.groups)]
    return replace(found, groups=tuple(groups))


def indexed(found: Inspection) -> Inspection:
    return replace(found, groups=tuple(replace(g, index=0.1234, bound=7) for g in found.groups))


def lanes(page: Page) -> list[Element]:
    return [e for e in page.root.all("g") if e.attributes.get("class", "").startswith("lane ")]


def texts(page: Page, kind: str) -> list[str]:
    return [e.words for e in page.root.all("text") if e.attributes.get("class") == kind]


@pytest.mark.parametrize(
    "found",
    [
        chain(5),
        chain(120),
        timed(chain(5)),
        indexed(timed(chain(5))),
        replace(chain(5), unknown={"_fft_r2c": "mixer", "sort": ""}),
        replace(chain(0), frozen=()),
        Inspection(model="empty", params=0, macs=0, bytes=0),
    ],
    ids=["five", "many", "timed", "indexed", "unknown", "nothing can go", "empty"],
)
def test_a_page_is_well_formed_complete_and_labelled(found: Inspection) -> None:
    page = Page(render(found))
    assert form_faults(page) + loads(page) + label_faults(page) == []


def test_a_small_model_is_drawn_whole() -> None:
    page = Page(render(chain(5)))
    assert texts(page, "row") == [*(f"body.{i}.conv" for i in range(5)), "head"]
    assert texts(page, "number") == ["1", "2", "3", "4", "5"]
    assert texts(page, "note") == ["it is an axis of the model's output, on which others rely"]
    first = lanes(page)[0]
    assert [e.attributes["class"] for e in first.all("circle")] == ["reads", "makes"]
    (title,) = first.all("title")
    assert title.words == (
        "1: 8 channels of body.0.conv; one is 145 parameters and 20.0 K MACs; made by body.0.conv; "
        "passed on by body.0.norm; read by body.1.conv"
    )
    (grey,) = (e for e in page.root.all("g") if e.attributes.get("class") == "stays")
    assert grey.all("title")[0].words.endswith(f"Its width stays: {OUTPUT}")
    assert "not drawn" not in page.root.words


def test_of_many_groups_the_largest_are_drawn_and_the_rest_is_counted() -> None:
    text = render(chain(120))
    page = Page(text)
    assert len(text.encode()) < 1_000_000
    assert texts(page, "number") == [str(i) for i in range(91, 121)]
    assert f"{120 - GROUPS} more are not drawn" in page.root.words
    # 90 layers that no lane needs make one row.
    assert texts(page, "row") == ["90 more layers", *(f"body.{i}.conv" for i in range(90, 120)), "head"]
    tables = [t for t in page.root.all("table") if "units" in t.attributes.get("class", "")]
    assert [len(t.all("tr")) - 1 for t in tables] == [10, 110]


def test_a_width_of_many_layers_shows_its_ends() -> None:
    layers = tuple(ModelLayer(f"block.{i}", "Linear", (8, 8), 64, 64.0) for i in range(400))
    names = tuple(layer.name for layer in layers)
    stream = UnitGroup("block.0", "channel", 8, "block.0.weight", makers=names[::2], readers=names[1::2])
    page = Page(render(replace(chain(0), groups=(stream,), layers=layers)))
    rows = texts(page, "row")
    assert len(rows) < 30
    assert rows[0] == "block.0"
    assert rows[-1] == "block.399"
    assert sum(int(row.split()[0]) if row.endswith("more layers") else 1 for row in rows) == 400
    assert any(e.attributes.get("class") == "some" for e in lanes(page)[0].all("circle"))
    assert "and 194 more" in page.root.words


def test_lanes_and_their_numbers_in_the_table_have_one_hue() -> None:
    page = Page(render(chain(40)))
    drawn = {e.all("text")[0].words: e.attributes["class"].split()[1] for e in lanes(page)}
    tags = {e.words: e.attributes["class"].split()[1:] for e in page.root.all("i") if "tag" in e.attributes["class"]}
    assert len(tags) == 40
    assert {number: hues for number, hues in tags.items() if hues} == {n: [hue] for n, hue in drawn.items()}


def test_single_weights_share_nothing_so_nothing_is_drawn() -> None:
    alone = replace(chain(3), groups=tuple(replace(g, passing=(), readers=()) for g in chain(3).groups))
    page = Page(render(alone))
    assert lanes(page) == []
    assert "Shared widths" not in page.root.words


def test_times_stand_in_the_table_when_they_were_measured() -> None:
    words = Page(render(timed(chain(3)))).root.words
    assert "20 µs layers 10.0%" in words
    assert "1 µs, noisy: ± 5 µs layers 10.0%" in words
    assert "It is called noisy where" in words
    assert "noisy" not in render(chain(3))


def test_everything_is_escaped() -> None:
    evil = replace(poisoned(chain(3)), unknown={EVIL: EVIL})
    text = render(evil)
    page = Page(text)
    assert form_faults(page) + loads(page) + label_faults(page) == []
    assert text.count("alert") > 40
    assert EVIL in page.root.all("title")[0].words


def test_the_page_is_written_as_a_file(tmp_path: Path) -> None:
    path = chain(3).to_html(tmp_path / "deep" / "page.html")
    assert path.read_text(encoding="utf-8") == render(chain(3))


def test_lanes_can_be_seen_on_screen_in_the_dark_and_on_paper() -> None:
    for colours in palettes():
        hues = [colour for name, colour in colours.items() if re.fullmatch(r"lane\d", name)]
        assert len(set(hues)) == 6
        # The tags in the table write on them in the colour of the paper.
        assert min(contrast(hue, colours["paper"]) for hue in hues) >= 4.5


def test_the_text() -> None:
    found = replace(timed(chain(12)), unknown={"_fft_r2c": "mixer", "sort": ""})
    lines = str(found).splitlines()
    assert lines[0] == (
        "chain: 1.00 M parameters, 1.00 G MACs, 4.00 MB; "
        "12 groups of units can be pruned, 90.0% of the parameters lie along them"
    )
    assert re.split("  +", lines[2]) == [
        *("group", "kind", "units", "params a unit", "MACs a unit", "bytes a unit"),
        *("layers' time", "time a unit", "layers that share the width"),
    ]
    assert re.split("  +", lines[3]) == [
        *("body.0.conv", "channel", "8", "145", "20.0 K", "580 B", "10.0%", "20 µs"),
        "made by body.0.conv; passed on by body.0.norm; read by body.1.conv",
    ]
    assert lines[13:] == [
        "and 2 more groups",
        "",
        "What stays:",
        "  1 width, head.weight (9): it is an axis of the model's output, on which others rely",
        "",
        "no rule for _fft_r2c in mixer: what it touches is frozen",
        "no rule for sort in the model: what it touches is frozen",
    ]
    assert str(chain(0)).splitlines()[0].endswith("0 groups of units can be pruned")


def test_index_and_bound_have_columns_where_they_are_known() -> None:
    found = indexed(chain(2))
    lines = str(found).splitlines()
    assert re.split("  +", lines[2])[:6] == ["group", "kind", "units", "PQ index", "needed", "params a unit"]
    assert re.split("  +", lines[3])[:6] == ["body.0.conv", "channel", "8", "0.123", "≥ 7", "145"]
    assert "PQ index" not in str(chain(2))
    cells = [cell.words for cell in Page(render(found)).root.all("td") if "needs" in cell.words]
    assert [cell.split() for cell in cells] == [["0.123", "needs", "≥", "7"]] * 2


@pytest.mark.parametrize(
    ("index", "words"), [(0.0, "0.000"), (1e-4, "<0.001"), (6e-4, "0.001"), (0.1234, "0.123"), (None, "—")]
)
def test_a_small_index_is_not_zero(index: float | None, words: str) -> None:
    bound = None if index is None else 3
    assert spread(UnitGroup("g", "channel", 4, "t", index=index, bound=bound)) == (words, "≥ 3" if bound else "—")


def test_fifty_layers_are_told_as_three_and_a_count() -> None:
    names = [f"layer{i}" for i in range(50)]
    assert few(names) == "layer0, layer1, layer2 and 47 more"
    assert few(["", "a"]) == "the model, a"
    assert shared(UnitGroup("g", "channel", 4, "t", readers=tuple(names))) == f"read by {few(names)}"
    assert shared(UnitGroup("g", "channel", 4, "t")) == "—"


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (None, "—"),
        (UnitTime(2e-3, 1e-3, 2.5e-3, 4), "2.00 ms"),
        (UnitTime(-2e-6, -2.5e-6, -1e-6, 4), "−2 µs"),
        (UnitTime(1e-6, -1e-6, 3e-6, 4), "1 µs, noisy: ± 2 µs"),
    ],
)
def test_times_in_words(time: UnitTime | None, words: str) -> None:
    assert measured(time) == words
