"""Small charts as inline SVG: pure functions of numbers and words.

A chart has no size of its own: it is as wide as its place and as tall as its `height`. Lines and areas live in an inner
coordinate system from 0 to 100 that stretches; words and dots are placed by percentages and do not. Colours and
font sizes belong to the page's style sheet, which knows the classes used here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "Curve",
    "Dumbbell",
    "Scale",
    "Svg",
    "bars",
    "dumbbells",
    "line_chart",
    "profile",
    "scores",
    "spark",
    "strip",
    "tag",
    "ticks",
    "words",
]

Point = tuple[float, float]


class Svg(str):
    """Markup that is already safe; template engines ask for `__html__` before they escape."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` as percentages from 0 to 100."""

    low: float
    high: float

    def at(self, number: float) -> float:
        """The percentage of `number`; the middle where the scale has no width."""
        width = self.high - self.low
        return 100 * (number - self.low) / width if width else 50.0


@dataclass(frozen=True)
class Curve:
    """One line with its points.

    Args:
        points: (x, y), x ascending.
        band: (x, low, high) of the area round it; empty for none.
        reference: y of a dashed line to compare with; None for none.
    """

    points: tuple[Point, ...]
    band: tuple[tuple[float, float, float], ...] = ()
    reference: float | None = None

    @property
    def heights(self) -> list[float]:
        """Every y that must be in the picture."""
        edges = [y for _, low, high in self.band for y in (low, high)]
        return [y for _, y in self.points] + edges + ([] if self.reference is None else [self.reference])

    def at(self, x: float) -> float | None:
        """y of the line at `x`; None beyond its ends."""
        for (x1, y1), (x2, y2) in zip(self.points, self.points[1:], strict=False):
            if x1 <= x <= x2:
                return y1 + (y2 - y1) * (x - x1) / (x2 - x1) if x2 > x1 else y1
        return None


@dataclass(frozen=True)
class Dumbbell:
    """Two x at one y, with a name: a full dot, a ring, and the line between; None leaves one out."""

    name: str
    y: float
    dot: float | None
    ring: float | None


def tag(name: str, *children: Svg, **attributes: str | float | None) -> Svg:
    """The element; `_` in attribute names is `-`, one at the end is dropped, and None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(item))}"'
        for key, item in attributes.items()
        if item is not None
    )
    body = "".join(children)
    return Svg(f"<{name}{written}>{body}</{name}>" if body else f"<{name}{written}/>")


def words(text: str, x: float, y: float, kind: str, dx: float = 0, dy: float = 0) -> Svg:
    """Text at percentages `x`, `y` of the chart, shifted by pixels."""
    return tag("text", Svg(html.escape(text)), x=_percent(x), y=_percent(y), dx=dx or None, dy=dy or None, class_=kind)


def ticks(low: float, high: float, wanted: int = 4) -> tuple[float, ...]:
    """Round numbers from `low` to `high`, about `wanted` of them: steps of 1, 2, 2.5 or 5 times a power of ten.

    >>> ticks(0.0, 1.0)
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    if not 1e-300 < high - low < 1e300:
        return (low,)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def bars(before: float, after: float, most: float, spans: Sequence[tuple[float, float]] = ()) -> Svg:
    """Two bars in one: what there was, and in front of it what is left; `spans` are drawn over them as whiskers.

    The longest thing drawn is `most`.
    """
    scale = Scale(0, most or 1)
    return _picture(
        "bars",
        10,
        tag("rect", class_="before", width=_percent(scale.at(before)), height="100%"),
        tag("rect", class_="after", width=_percent(scale.at(after)), height="100%"),
        *(mark for low, high in spans for mark in _whisker(scale.at(low), scale.at(high))),
    )


def _whisker(low: float, high: float) -> list[Svg]:
    ends = [tag("line", class_="span", x1=_percent(x), x2=_percent(x), y1="-20%", y2="120%") for x in (low, high)]
    return [tag("line", class_="span", x1=_percent(low), x2=_percent(high), y1="50%", y2="50%"), *ends]


def strip(value: float, reference: float | None, scale: Scale) -> Svg:
    """A dot on a line from the reference, which runs from top to bottom, so that strips in a column share it."""
    x = _percent(scale.at(value))
    marks = []
    if reference is not None:
        start = _percent(scale.at(reference))
        marks.append(tag("line", class_="reference", x1=start, x2=start, y1="-40%", y2="140%"))
        marks.append(tag("line", class_="reach", x1=start, x2=x, y1="50%", y2="50%"))
    return _picture("strip", 20, *marks, tag("circle", class_="after", cx=x, cy="50%", r=5))


def scores(low: float, median: float, high: float, threshold: float | None) -> Svg:
    """A line from the lowest to the highest score, strong from the threshold on, with a tick at the median."""
    scale = Scale(low, high)
    middle = _percent(scale.at(median))
    marks = [tag("line", class_="before", x1="0%", x2="100%", y1="50%", y2="50%")]
    if threshold is not None:
        marks.append(tag("line", class_="after", x1=_percent(scale.at(threshold)), x2="100%", y1="50%", y2="50%"))
    return _picture("scores", 14, *marks, tag("line", class_="median", x1=middle, x2=middle, y1="0%", y2="100%"))


def profile(pairs: Sequence[tuple[float, float]], label: str, height: int = 150) -> Svg:
    """A column per layer from first to last: what there was, and in front of it what is left."""
    most = max((max(pair) for pair in pairs), default=0) or 1
    before = _columns([pair[0] / most for pair in pairs], "before")
    return _picture("profile", height, _stretched(before, _columns([p[1] / most for p in pairs], "after")), label=label)


def line_chart(
    curve: Curve,
    label: str,
    *,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    last: str = "",
    height: int = 180,
) -> Svg:
    """A curve with its band, its reference and both axes; `last` is written beside the last point."""
    heights = [y for y in curve.heights if math.isfinite(y)]
    x, y = _scale([point[0] for point in curve.points], 0.0), _scale(heights, 0.08)
    points = [point for point in curve.points if math.isfinite(point[1])]
    marks = [*_y_axis(y, y_text), *_x_axis(x, x_text), _stretched(*_areas(curve, x, y))]
    if len(points) <= 40:
        marks += [_dot(x.at(px), y.at(py), "after", 3.5) for px, py in points]
    for px, py in points[-1:]:
        marks.append(words(last, x.at(px), 100 - y.at(py), "value", dx=9, dy=4))
    return _picture("chart", height, *marks, label=label)


def spark(curve: Curve, mark: float | None, x: Scale, y: Scale, label: str, height: int = 64) -> Svg:
    """A curve without axes on the scales given, and a dot where it reaches x = `mark`."""
    marks = [_stretched(*_areas(curve, x, y))]
    reached = None if mark is None else curve.at(mark)
    if mark is not None and reached is not None:
        at = _percent(x.at(mark))
        marks.append(tag("line", class_="mark", x1=at, x2=at, y1=_percent(100 - y.at(reached)), y2="100%"))
        marks.append(_dot(x.at(mark), y.at(reached), "after", 4))
    return _picture("spark", height, *marks, label=label)


def dumbbells(
    rows: Sequence[Dumbbell],
    label: str,
    *,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    reference: float | None = None,
    height: int = 280,
) -> Svg:
    """A scatter of named dumbbells, x from 0; each name stands over its own."""
    ends = [end for row in rows for end in (row.dot, row.ring) if end is not None]
    x = Scale(0, max([1.0, *ends]))
    y = _scale([row.y for row in rows] + ([] if reference is None else [reference]), 0.1)
    marks = [*_y_axis(y, y_text), *_x_axis(x, x_text)]
    if reference is not None:
        marks.append(_stretched(_path([(0, y.at(reference)), (100, y.at(reference))], "reference")))
    for row in rows:
        marks += _dumbbell(row, x, y)
    return _picture("chart front", height, *marks, label=label)


def _dumbbell(row: Dumbbell, x: Scale, y: Scale) -> list[Svg]:
    ends = [x.at(end) for end in (row.dot, row.ring) if end is not None]
    if not ends:
        return []
    height = _percent(100 - y.at(row.y))
    line = tag("line", class_="reach", x1=_percent(min(ends)), x2=_percent(max(ends)), y1=height, y2=height)
    dots = [] if row.ring is None else [_dot(x.at(row.ring), y.at(row.y), "ring", 5)]
    dots += [] if row.dot is None else [_dot(x.at(row.dot), y.at(row.y), "after", 5)]
    # A name on the right grows to the left, so that none leaves the chart.
    at, kind, dx = (min(ends), "name", -4) if min(ends) < 50 else (max(ends), "name end", 4)
    return [line, *dots, words(row.name, at, 100 - y.at(row.y), kind, dx=dx, dy=-10)]


def _areas(curve: Curve, x: Scale, y: Scale) -> list[Svg]:
    """Band, reference and line, in the stretched system."""
    marks = []
    if curve.band:
        upper = [(x.at(at), y.at(high)) for at, _, high in curve.band]
        lower = [(x.at(at), y.at(low)) for at, low, _ in reversed(curve.band)]
        marks.append(_path(upper + lower, "band", closed=True))
    if curve.reference is not None:
        marks.append(_path([(0, y.at(curve.reference)), (100, y.at(curve.reference))], "reference"))
    pieces = [(x.at(px), y.at(py)) for px, py in curve.points if math.isfinite(py)]
    return [*marks, _path(pieces, "line")]


def _y_axis(scale: Scale, text: Callable[[float], str]) -> list[Svg]:
    marks = []
    for at in ticks(scale.low, scale.high):
        height = 100 - scale.at(at)
        marks.append(tag("line", class_="grid", x1="0%", x2="100%", y1=_percent(height), y2=_percent(height)))
        marks.append(words(text(at), 0, height, "y tick", dx=-8, dy=4))
    return marks


def _x_axis(scale: Scale, text: Callable[[float], str]) -> list[Svg]:
    return [words(text(at), scale.at(at), 100, "x tick", dy=20) for at in ticks(scale.low, scale.high, 5)]


def _scale(numbers: Sequence[float], margin: float) -> Scale:
    """From the smallest to the largest number and a share more on either side; never without width."""
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    room = (high - low) * margin if high > low else (abs(low) * 0.05 or 1.0) * (margin > 0)
    return Scale(low - room, high + room)


def _columns(shares: Sequence[float], kind: str) -> Svg:
    """One path for all columns: a thousand layers make one element."""
    width = 100 / max(len(shares), 1)
    body = width * (0.8 if len(shares) <= 150 else 1)
    shown = [(i * width, 100 * part) for i, part in enumerate(shares) if part]
    return tag("path", class_=kind, d="".join(f"M{_text(x)} 100v{_text(-y)}h{_text(body)}V100z" for x, y in shown))


def _path(points: Sequence[Point], kind: str, closed: bool = False) -> Svg:
    """A path through points whose y runs upwards."""
    steps = " ".join(f"{_text(x)} {_text(100 - y)}" for x, y in points)
    return tag("path", class_=kind, d=f"M{steps}{'z' if closed else ''}" if steps else "")


def _dot(x: float, y: float, kind: str, radius: float) -> Svg:
    return tag("circle", class_=kind, cx=_percent(x), cy=_percent(100 - y), r=radius)


def _stretched(*marks: Svg) -> Svg:
    return tag("svg", *marks, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")


def _picture(kind: str, height: int, *marks: Svg, label: str | None = None) -> Svg:
    """The outer element: with a label it is an image to a screen reader, without one it is decoration."""
    if label is None:
        return tag("svg", *marks, class_=kind, width="100%", height=height, aria_hidden="true")
    return tag("svg", *marks, class_=kind, width="100%", height=height, role="img", aria_label=label)


def _percent(number: float) -> str:
    return f"{_text(number)}%"


def _text(item: str | float) -> str:
    """Numbers with at most two decimals: a tenth of a pixel on the widest page."""
    if isinstance(item, str):
        return item
    if not math.isfinite(item):
        return "0"
    return f"{item:.2f}".rstrip("0").rstrip(".") or "0"
