"""A lane diagram: rows from top to bottom, and beside them a line for each group through the rows that share it.

Unlike the charts of `svg`, it has a size of its own, in pixels, so that its words stay as large as they are. Colours
belong to the page's style sheet, which knows six hues as the classes `lane0` to `lane5`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .svg import Svg, tag

__all__ = ["HUES", "Lane", "Mark", "Row", "drawing", "tracks"]

Mark = Literal["makes", "passes", "reads", "hidden"]
HUES = 6
_ROW, _TOP, _PITCH, _GAP = 20, 20, 20, 16
# Widths of one letter of a name and of a note, a little more than the fonts have.
_NAME, _NOTE = 7.0, 6.4
_LONGEST_NAME, _LONGEST_NOTE = 46, 72


@dataclass(frozen=True)
class Row:
    """One line of the diagram.

    Args:
        name: what stands at its left; the part before the last dot is written softly where it repeats.
        title: shown on hovering.
        note: at its right, why the row is grey; a row without is not.
        folded: whether the row stands for several that no lane needs.
    """

    name: str
    title: str = ""
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Lane:
    """One group.

    Args:
        label: short, over its first mark.
        hue: from 0 to 5.
        title: shown on hovering over any part of it.
        marks: by row, what the group does there.
    """

    label: str
    hue: int
    title: str
    marks: Mapping[int, Mark]

    @property
    def span(self) -> tuple[int, int]:
        """Its first and its last row."""
        return min(self.marks), max(self.marks)


def tracks(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """A track for each span, the first in which the rows of the span and the one before it are free.

    >>> tracks([(0, 2), (1, 3), (4, 5)])
    (0, 1, 0)
    """
    ends: list[int] = []
    found: dict[int, int] = {}
    for i in sorted(range(len(spans)), key=lambda i: (spans[i], i)):
        first, last = spans[i]
        free = next((t for t, end in enumerate(ends) if end < first - 1), len(ends))
        ends[free : free + 1] = [last]
        found[i] = free
    return tuple(found[i] for i in range(len(spans)))


def drawing(rows: Sequence[Row], lanes: Sequence[Lane], label: str) -> Svg:
    """The diagram as an image with a label; wide ones need a place that scrolls."""
    left = _NAME * min(_LONGEST_NAME, max((len(row.name) for row in rows), default=0)) + _GAP
    places = tracks([lane.span for lane in lanes])
    right = left + _PITCH * (max(places, default=-1) + 1) + _GAP / 2
    width = right + _NOTE * min(_LONGEST_NOTE, max((len(row.note) for row in rows), default=0))
    before = ["", *(row.name for row in rows)]
    marks = [_row(row, before[i], i, left, right) for i, row in enumerate(rows)]
    marks += [_lane(lane, left + _PITCH * (place + 0.5)) for lane, place in zip(lanes, places, strict=True)]
    width, height = round(width), _TOP + _ROW * len(rows)
    box = f"0 0 {width} {height}"
    return tag("svg", *marks, class_="lanes", role="img", aria_label=label, width=width, height=height, viewBox=box)


def _row(row: Row, before: str, i: int, left: float, right: float) -> Svg:
    y = _middle(i)
    kind = "folded" if row.folded else "stays" if row.note else None
    rule = tag("line", class_="grid", x1=left - _GAP / 2, x2=right - _GAP / 2, y1=y, y2=y)
    parts = [_title(row.title), rule, _text(_name(row, before), 0, y + 4, "row")]
    if row.note:
        short = row.note if len(row.note) <= _LONGEST_NOTE else f"{row.note[: _LONGEST_NOTE - 1]}…"
        parts.append(_text(Svg(html.escape(short)), right, y + 4, "note"))
    return tag("g", *parts, class_=kind)


def _name(row: Row, before: str) -> Svg:
    """The name, its beginning cut off if it is too long, and softly what it has in common with the row before."""
    name = row.name if len(row.name) <= _LONGEST_NAME else f"…{row.name[1 - _LONGEST_NAME :]}"
    stem, dot, leaf = name.rpartition(".")
    if row.folded or not dot or stem != _stem(before, len(row.name) > _LONGEST_NAME, len(stem)):
        return Svg(html.escape(name))
    return Svg(f'<tspan class="again">{html.escape(stem + dot)}</tspan>{html.escape(leaf)}')


def _stem(before: str, is_cut: bool, length: int) -> str:
    stem = before.rpartition(".")[0]
    return f"…{stem[1 - length :]}" if is_cut else stem


def _lane(lane: Lane, x: float) -> Svg:
    first, last = lane.span
    line = tag("line", x1=x, x2=x, y1=_middle(first), y2=_middle(last))
    label = _text(Svg(html.escape(lane.label)), x, _middle(first) - 8, "number")
    marks: Iterable[Svg] = (_MARKS[mark](x, _middle(row)) for row, mark in lane.marks.items())
    return tag("g", _title(lane.title), line, *marks, label, class_=f"lane lane{lane.hue}")


def _made(x: float, y: float) -> Svg:
    return tag("circle", class_="makes", cx=x, cy=y, r=4.5)


def _read(x: float, y: float) -> Svg:
    return tag("circle", class_="reads", cx=x, cy=y, r=4)


def _passed(x: float, y: float) -> Svg:
    return tag("line", x1=x - 5, x2=x + 5, y1=y, y2=y)


def _hidden(x: float, y: float) -> Svg:
    return tag("circle", class_="some", cx=x, cy=y, r=2)


_MARKS = {"makes": _made, "passes": _passed, "reads": _read, "hidden": _hidden}


def _middle(row: int) -> float:
    return _TOP + _ROW * (row + 0.5)


def _text(content: Svg, x: float, y: float, kind: str) -> Svg:
    return tag("text", content, x=x, y=y, class_=kind)


def _title(text: str) -> Svg:
    return tag("title", Svg(html.escape(text))) if text else Svg("")
