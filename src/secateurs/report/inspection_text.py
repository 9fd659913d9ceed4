"""An inspection as plain text, and the words that its table, its text and its page share."""

from __future__ import annotations

from collections.abc import Sequence

from .inspection import Inspection, UnitGroup, UnitTime
from .reasons import Stay, stays
from .words import MINUS, count, duration, file_size, plural, share

__all__ = [
    "columns",
    "few",
    "group_cells",
    "headline",
    "measured",
    "reach",
    "shared",
    "spread",
    "stay_lines",
    "to_text",
    "unknown_lines",
]

# Lists of groups stop at ten in a text; the page has the rest.
FIRST = 10
_SPREAD = ("PQ index>", "needed>")
_COSTS, _TIMES = ("params a unit>", "MACs a unit>", "bytes a unit>"), ("layers' time>", "time a unit>")


def to_text(found: Inspection) -> str:
    """The inspection as lines of text without markup; lists of groups stop at ten."""
    rows = [tuple(c.rstrip(">") for c in columns(found)), *(group_cells(g) for g in found.groups[:FIRST])]
    more = len(found.groups) - FIRST
    blocks = [
        [headline(found)],
        [*_aligned(rows), *([f"and {plural(more, 'more group')}"] if more > 0 else [])] if found.groups else [],
        [*(["What stays:"] if found.frozen else []), *stay_lines(found)],
        unknown_lines(found),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def headline(found: Inspection) -> str:
    """One sentence: how large the model is, and how much of it can go."""
    sizes = f"{count(found.params)} parameters, {count(found.macs)} MACs, {file_size(found.bytes)}"
    return f"{found.model}: {sizes}; {reach(found)}"


def reach(found: Inspection) -> str:
    """How much can go: the number of groups, and the share of the parameters along them."""
    groups = f"{plural(len(found.groups), 'group')} of units can be pruned"
    return f"{groups}, {share(found.params_in_reach)} of the parameters lie along them" if found.groups else groups


def columns(found: Inspection) -> tuple[str, ...]:
    """Heads of the table of groups, with index and times if there are any; ">" at the end asks for the right side."""
    timed = any(group.time is not None for group in found.groups)
    told = any(group.index is not None for group in found.groups)
    known = (*(_SPREAD if told else ()), *_COSTS, *(_TIMES if timed else ()))
    return ("group", "kind", "units>", *known, "layers that share the width")


def group_cells(group: UnitGroup) -> tuple[str, ...]:
    """A row of the table of groups; index and times only if the group has them."""
    times = () if group.time is None else (share(group.time), measured(group.measured))
    costs = count(group.params_per_unit), count(group.macs_per_unit), file_size(group.bytes_per_unit)
    known = (*(() if group.index is None else spread(group)), *costs, *times)
    return (group.name, group.kind, str(group.size), *known, shared(group))


def spread(group: UnitGroup) -> tuple[str, str]:
    """How unevenly the units' magnitudes are spread, and how many units that says are needed.

    >>> spread(UnitGroup("a", "channel", 8, "a.weight", index=0.25, bound=6))
    ('0.250', '≥ 6')
    """
    if group.index is None or group.bound is None:
        return "—", "—"
    return "<0.001" if 1e-9 < group.index < 0.0005 else f"{group.index:.3f}", f"≥ {group.bound}"


def measured(time: UnitTime | None) -> str:
    """What a unit costs in time; said to be noisy, with half the spread, where that is larger than the figure.

    >>> measured(UnitTime(2e-5, 1e-5, 2.5e-5, 32)), measured(UnitTime(1e-5, 0.0, 3.2e-5, 32))
    ('20 µs', '10 µs, noisy: ± 16 µs')
    """
    if time is None:
        return "—"
    spread = f", noisy: ± {duration((time.p90 - time.p10) / 2)}" if time.noisy else ""
    return f"{duration(time.median)}{spread}".replace("-", MINUS)


def shared(group: UnitGroup, most: int = 3) -> str:
    """The layers that share a width, in a line: who makes it, who passes it on, who reads it."""
    parts = [
        f"{verb} {few(layers, most)}"
        for verb, layers in (("made by", group.makers), ("passed on by", group.passing), ("read by", group.readers))
        if layers
    ]
    return "; ".join(parts) or "—"


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    named = [name or "the model" for name in names]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def stay_lines(found: Inspection) -> list[str]:
    """One line a reason in plain words, with the number of widths and the first of them."""
    return [f"  {plural(len(stay.widths), 'width')}, {_widths(stay)}: {stay.reason}" for stay in stays(found.frozen)]


def _widths(stay: Stay) -> str:
    return few([f"{width.tensor} ({width.size})" for width in stay.widths])


def unknown_lines(found: Inspection) -> list[str]:
    """One line for each op without a rule."""
    return [
        f"no rule for {op} in {place or 'the model'}: what it touches is frozen" for op, place in found.unknown.items()
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
