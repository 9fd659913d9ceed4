"""The page: well-formed, complete in itself, labelled, escaped, small, and in its order."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from secateurs.report import FrozenWidth, GroupChange, LayerChange, Report, Side
from secateurs.report.page import render
from tests.report.html_checks import Element, Page, form_faults, label_faults, loads
from tests.report.sample import sample
from tests.report.strategies import reports

BARE = Report(model="net", form="cut", before=Side(100), after=Side(60))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(sample()))


# -- the checks themselves can fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<!doctype html><p></b></p>", "</b> closes <p>"),
        ("<!doctype html><div>", "<div> is never closed"),
        ("<p></p>", "no doctype"),
        ('<!doctype html><p id="a"></p><p id="a"></p>', "id a stands twice"),
        ('<!doctype html><a href="#b"></a>', "#b leads nowhere"),
        ('<!doctype html><p class="a" class="b"></p>', "<p> has class twice"),
    ],
)
def test_bad_form_is_seen(text: str, fault: str) -> None:
    assert form_faults(Page(text)) == [fault]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<img src="x.png">', ["<img>", "src=x.png"]),
        ("<script></script>", ["<script>"]),
        ('<a href="https://example.org"></a>', ["href=https://example.org"]),
        ('<p onclick="f()"></p>', ["onclick=f()"]),
        ("<style>@import 'a.css'; p { background: url(b.png) }</style>", ["@import 'a.css'", "url(b.png)"]),
        ('<p style="background: url(c)"></p>', ["background: url(c)"]),
    ],
)
def test_what_a_page_loads_is_seen(text: str, found: list[str]) -> None:
    assert loads(Page(text)) == found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<h1></h1><table></table>", "table  has no caption"),
        ("<h1></h1><th>a</th>", "header a has no scope"),
        ("<h1></h1><svg></svg>", "a picture has neither a label nor aria-hidden"),
        ("<h1></h1><h3></h3>", "h1 is followed by h3"),
        ("<h2></h2>", "0 first headings"),
    ],
)
def test_missing_labels_are_seen(text: str, fault: str) -> None:
    assert label_faults(Page(text)) == [fault]


# -- the sample --------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_complete_and_labelled(page: Page) -> None:
    assert form_faults(page) == []
    assert loads(page) == []
    assert label_faults(page) == []


# Sections in their order, and in each what a reader meets: headings, captions of tables and figures, folded parts.
STRUCTURE = {
    "budget": ["h2 Budget", *(f"h3 {card}" for card in ("Parameters", "MACs", "File", "Latency", "Accuracy"))],
    "quality": [
        "h2 Quality",
        "caption Accuracy through the stages; the upright line is the dense model",
        "h3 Recovery",
        "figcaption Accuracy by epoch",
        "figcaption Loss by epoch",
    ],
    "layers": [
        "h2 Layers",
        "figcaption MACs per layer, from the first to the last tallest: 2.36 M",
        "caption Largest changes first",
        "summary The other 44 layers that changed",
        "caption Smaller changes",
        "summary 2 layers unchanged",
    ],
    "groups": [
        "h2 Groups",
        "caption Largest share removed first",
        "summary The other 17 groups that changed",
        "caption Smaller shares",
        "summary 1 group left whole",
    ],
    "sensitivity": ["h2 Sensitivity", "summary The other 15 groups"],
    "front": ["h2 Front", "figcaption Accuracy against what is left", "caption All budgets"],
    "frozen": ["h2 Frozen", "caption Why a width stays"],
    "warnings": ["h2 Warnings"],
    "reproduce": ["h2 Reproduce", "h3 Recipe", "h3 Environment", "h3 Time taken"],
}


def test_structure(page: Page) -> None:
    wanted = {"h2", "h3", "caption", "figcaption", "summary"}
    found = {
        section.attributes["id"]: [
            f"{e.tag} {e.words}" for e in section.walk() if e.tag in wanted and "panels" not in place(e)
        ]
        for section in page.root.all("section")
    }
    assert found == STRUCTURE
    assert list(found) == list(STRUCTURE)
    assert [a.attributes["href"] for a in page.root.all("nav")[0].all("a")] == [f"#{name}" for name in STRUCTURE]


def place(element: Element, what: str = "class") -> list[str]:
    """Classes, or tags, of everything above an element."""
    above = element.parent
    if above is None:
        return []
    return [above.tag if what == "tag" else above.attributes.get("class", ""), *place(above, what)]


def section(page: Page, name: str) -> Element:
    (found,) = [e for e in page.root.all("section") if e.attributes["id"] == name]
    return found


def test_the_headline_comes_first(page: Page) -> None:
    assert page.root.all("h1")[0].words == sample().headline()
    assert page.root.all("title")[0].words == "resnet56, macs<=50%,latency<=40ms · pruning report"


def test_budget_and_cards(page: Page) -> None:
    budget = section(page, "budget")
    assert [li.words for li in budget.all("li")] == [
        "macs<=50% asked, 49.4%: met",
        "latency<=40ms asked, 44.0 ms: not met",
    ]
    cards = [e.words for e in budget.walk() if e.attributes.get("class") == "card"]
    assert cards[0] == "Parameters 422 K 49.5% of 853 K"
    assert cards[3] == "Latency 44.0 ms 1.71× the speed; 75.2 ms before p10–p90 43.3–47.8 ms"
    assert cards[4].startswith("Accuracy 93.1% −0.8 points from 93.9%")
    assert "agree to a relative 3.1 × 10⁻⁷" in budget.words


def test_a_predicted_speed_stands_beside_the_measured_one() -> None:
    found = replace(sample(), predicted_speedup=1.84)
    card = "1.71× the speed, 1.84× predicted; 75.2 ms before"
    assert found.to_dict()["predicted_speedup"] == 1.84
    assert found.to_dict()["speedup"]["median"] == 1.71
    assert card in found.to_text()
    assert card in section(Page(render(found)), "budget").words
    unmeasured = replace(found, speedup=None, after=replace(found.after, latency=None))
    assert "not measured; 1.84× the speed was predicted" in unmeasured.to_text()


def test_stages_layers_and_groups(page: Page) -> None:
    rows = [tr.words for tr in section(page, "quality").all("tr")]
    assert rows[2] == "one-shot 61.3% −32.6 points 1.402 12.0%"
    first, second = section(page, "layers").all("table")
    assert len(first.all("tr")) == 11
    assert len(second.all("tr")) == 45
    assert first.all("tr")[1].words == (
        "layer2.0.conv2 Conv2d 32×32×3×3 → 32×7×3×3 9.22 K → 2.02 K 2.36 M → 516 K 664 µs → 225 µs"
    )
    group = section(page, "groups").all("tr")[1].words
    assert group.startswith("layer2.0.conv1 7 of 32 channels stay layer2.0.bn1, layer2.0.conv2 inputs from")
    assert "(16 channels)" in section(page, "groups").words


def test_pictures_say_what_they_show(page: Page) -> None:
    labels = [e.attributes["aria-label"] for e in page.root.all("svg") if "aria-label" in e.attributes]
    assert "accuracy by epoch: 84.7% first, 93.0% at epoch 30" in labels
    assert "MACs of 56 layers before and after; the largest is layer1.0.conv1" in labels
    assert "layer3.0.conv1: accuracy from 93.9% to 70.9% at sparsity 87.5%" in labels
    assert len([label for label in labels if "at sparsity" in label]) == 27


def test_the_rest(page: Page) -> None:
    assert "macs<=50%,latency<=40ms this report 49.6% 58.5% 93.1%" in section(page, "front").words
    assert "an axis of the model's output fc.weight axis 0 (10)" in section(page, "frozen").words
    assert "which also chose the epoch" in section(page, "warnings").all("li")[1].words
    assert section(page, "reproduce").all("pre")[0].words == sample().command
    assert "criterion_options power = 2, reduce = sum" in section(page, "reproduce").words
    assert "recover 21 min 52 s" in section(page, "reproduce").words


# -- any report --------------------------------------------------------------------------------------------------------


def test_a_bare_report_says_what_is_unknown() -> None:
    page = Page(render(BARE))
    assert [e.attributes["id"] for e in page.root.all("section")] == ["budget", "quality", "warnings", "reproduce"]
    assert "No budget was asked" in section(page, "budget").words
    assert "was not checked against the masked original" in section(page, "budget").words
    assert "Quality was not measured" in section(page, "quality").words
    assert section(page, "warnings").words == "Warnings None."
    assert form_faults(page) + loads(page) + label_faults(page) == []


def test_a_masked_report_shows_zeros() -> None:
    rows = (LayerChange("fc", "Linear", (10, 10), (10, 10), 100, 100, 25, 100, 100),)
    report = Report(model="n", form="mask", before=Side(100), after=Side(100, 25), layers=rows)
    page = Page(render(report))
    assert [th.words for th in section(page, "layers").all("th")[:3]] == ["Layer", "Weight", "Parameters not zero"]
    assert "fc Linear 10×10 25 of 100" in section(page, "layers").words
    assert "Only a runtime with sparse kernels" in section(page, "budget").words
    assert "Proof" not in section(page, "budget").words


@settings(max_examples=30)
@given(reports())
def test_any_report_makes_a_good_page(report: Report) -> None:
    page = Page(render(report))
    assert form_faults(page) + loads(page) + label_faults(page) == []
    pictures = [e for picture in page.root.all("svg") for e in picture.walk()]
    drawn = [v for e in pictures for name, v in e.attributes.items() if name not in ("aria-label", "class")]
    assert drawn == [] or not re.search(r"inf|nan", " ".join(drawn))


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"


def poisoned(node: Any) -> Any:
    """A report in which every text that is free is hostile."""
    if is_dataclass(node):
        kept = {"form", "unit", "budget"}
        names = [f.name for f in fields(node) if f.name not in kept]
        return replace(node, **{name: poisoned(getattr(node, name)) for name in names})  # type: ignore[type-var]
    if isinstance(node, dict):
        return {EVIL + key: poisoned(item) for key, item in node.items()}
    if isinstance(node, tuple):
        return tuple(map(poisoned, node))
    return EVIL + node if isinstance(node, str) else node


def test_everything_is_escaped() -> None:
    evil = replace(poisoned(sample()), environment={**poisoned(sample().environment), "date": EVIL, "secateurs": EVIL})
    text = render(evil)
    page = Page(text)
    assert form_faults(page) + loads(page) + label_faults(page) == []
    assert text.count("alert") > 500
    assert EVIL in page.root.all("title")[0].words
    assert any(EVIL in e.attributes.get("aria-label", "") for e in page.root.all("svg"))
    assert EVIL in page.root.words
    assert "49" not in page.root.all("title")[0].words


def many(size: int) -> Report:
    names = [f"model.layers.{i // 7}.self_attention.some_long_projection_{i % 7}" for i in range(size)]
    base = sample()
    return replace(
        base,
        layers=tuple(replace(base.layers[i % 54 + 1], name=name) for i, name in enumerate(names)),
        groups=tuple(GroupChange(n, "channel", 999, 1 + i % 999, tuple(names[:60])) for i, n in enumerate(names)),
        frozen=tuple(FrozenWidth(n, 1, 64, f"reason {i % 50}") for i, n in enumerate(names)),
        sensitivity={name: ((0.0, 0.9), (0.5, 0.8 - i / 1e5), (0.9, 0.3)) for i, name in enumerate(names)},
    )


def test_a_page_stays_below_two_megabytes() -> None:
    text = render(many(1000))
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert form_faults(page) == []
    first, rest = section(page, "layers").all("table")
    assert (len(first.all("tr")), len(rest.all("tr"))) == (11, 991)
    assert "details" not in place(first, "tag")
    assert "The other 990 layers that changed" in section(page, "layers").words
    assert "940 more less sensitive groups in the report" in section(page, "sensitivity").words
    assert " more layers in the report as a file" not in text


def test_a_longer_model_does_not_make_a_longer_page() -> None:
    text = render(many(1500))
    assert len(text.encode()) < 2_000_000
    assert "The other 1490 layers that changed" in text
    assert "500 more layers in the report as a file" in text


def test_the_page_is_written_as_a_file(tmp_path: Path) -> None:
    path = sample().to_html(tmp_path / "deep" / "page.html")
    assert path.read_text(encoding="utf-8") == render(sample())
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


# -- the style sheet ---------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def palettes() -> list[dict[str, str]]:
    style = (files("secateurs.report") / "templates" / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", re.sub(r"#fff\b", "#ffffff", block))) for block in blocks]


def test_words_can_be_read_on_screen_in_the_dark_and_on_paper() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    found = palettes()
    assert len(found) == 3
    for colours in found:
        for word in ("soft", "plant"):
            assert contrast(colours[word], colours["paper"]) >= 4.5
        assert contrast(colours["plant"], colours["pale"]) >= 3


def test_a_page_is_styled_for_the_dark_for_paper_and_for_small_screens() -> None:
    text = render(BARE)
    for query in ("(prefers-color-scheme: dark)", "@media print", "(max-width: 40rem)"):
        assert query in text
    assert "default-src 'none'" in text


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("then", "expected"), [("", "False"), ("; page.render(r)", "True")])
def test_jinja2_is_imported_when_a_page_is_drawn(then: str, expected: str) -> None:
    code = (
        "import sys; from secateurs.report import Report, Side, page; before = 'jinja2' in sys.modules;"
        "r = Report(model='n', form='cut', before=Side(2), after=Side(1)); r.to_dict(); r.to_text()"
        f"{then}; print('jinja2' in sys.modules and not before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
