"""What the page draws, as data: cards, stages, curves and lists cut to a length that a page can bear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import svg
from .data import GroupChange, LatencySummary, LayerChange, Report, Speedup
from .findings import key_metric, left, speedup, stages
from .words import count, difference, duration, factor, file_size, metric, module_of, number, share, tick, value

__all__ = [
    "Card",
    "Group",
    "Panel",
    "StageRow",
    "cards",
    "front",
    "group_rows",
    "has_times",
    "layer_pair",
    "layer_profile",
    "recovery",
    "sensitivity",
    "stage_rows",
]

# So many names of tensors, and so many small charts, may stand on one page: it stays below 2 MB whatever the model.
NAMES, PANELS = 4000, 60
_DASH = "—"


@dataclass(frozen=True)
class Card:
    """One figure before and after: what it is, its value now, how that compares, and a small picture."""

    label: str
    figure: str
    note: str
    picture: svg.Svg | None = None
    detail: str = ""


@dataclass(frozen=True)
class Panel:
    """A chart with its title and a line of words."""

    title: str
    picture: svg.Svg
    note: str = ""


@dataclass(frozen=True)
class StageRow:
    """Quality at one stage: values by metric, the key metric's difference from the dense model, and its place."""

    name: str
    values: tuple[str, ...]
    difference: str
    picture: svg.Svg | None


@dataclass(frozen=True)
class Group:
    """A group with the layers that go along, the first few and the rest, and how many more there are."""

    change: GroupChange
    first: tuple[str, ...]
    rest: tuple[str, ...]
    unnamed: int


def cards(report: Report) -> tuple[Card, ...]:
    """Parameters, MACs, file, latency and quality, before and after."""
    before, after = report.before, report.after
    disk = _sized("File", before.disk_bytes, after.disk_bytes, file_size)
    memory = _sized("Memory", before.bytes, after.bytes, file_size)
    return (
        _zeros(report) if report.form == "mask" else _sized("Parameters", before.params, after.params, count),
        _sized("MACs", before.macs, after.macs, count),
        memory if after.disk_bytes is None and after.bytes is not None else disk,
        _latency(before.latency, after.latency, speedup(report), report.predicted_speedup),
        _quality(report),
    )


def _sized(label: str, before: float | None, after: float | None, words: Callable[[float], str]) -> Card:
    if after is None:
        return Card(label, _DASH, "not measured")
    if before is None:
        return Card(label, words(after), "unknown before")
    note = "unchanged" if before == after else f"{share(left(before, after))} of {words(before)}"
    return Card(label, words(after), note, svg.bars(before, after, max(before, after)))


def _zeros(report: Report) -> Card:
    params, nonzero = report.after.params, report.after.nonzero
    if nonzero is None:
        return Card("Parameters", count(params), "zeros not counted")
    note = f"{share(left(params, nonzero))} of {count(params)}"
    return Card("Parameters not zero", count(nonzero), note, svg.bars(params, nonzero, params))


def _latency(
    before: LatencySummary | None, after: LatencySummary | None, times: Speedup | None, predicted: float | None
) -> Card:
    expected = "" if predicted is None else f"{factor(predicted)} the speed was predicted"
    if after is None:
        return Card("Latency", _DASH, "; ".join(filter(None, ("not measured", expected))))
    told = "" if times is None else f"{factor(times.median)} the speed"
    if told and predicted is not None:
        told, expected = f"{told}, {factor(predicted)} predicted", ""
    note = "; ".join(filter(None, (told, expected, "" if before is None else f"{duration(before.median)} before")))
    sides = [side for side in (before, after) if side is not None]
    most = max(side.p90 for side in sides)
    picture = svg.bars(sides[0].median, after.median, most, [(side.p10, side.p90) for side in sides])
    return Card("Latency", duration(after.median), note, picture, f"p10–p90 {_range(after)}")


def _range(latency: LatencySummary) -> str:
    low, high = duration(latency.p10), duration(latency.p90)
    number_low, _, unit = low.partition(" ")
    return f"{number_low}–{high}" if high.endswith(f" {unit}") else f"{low}–{high}"


def _quality(report: Report) -> Card:
    name = key_metric(report)
    after = None if name is None else report.after.quality.get(name)
    if name is None or after is None:
        return Card("Quality", _DASH, "not measured")
    before = report.before.quality.get(name)
    label = metric(name)
    note = "unknown before"
    if before is not None:
        note = f"{difference(name, before, after)} from {value(name, before)}".strip()
    others = [f"{metric(other)} {value(other, v)}" for other, v in report.after.quality.items() if other != name]
    return Card(label[:1].upper() + label[1:], value(name, after), note, detail=", ".join(others))


def stage_rows(report: Report) -> tuple[tuple[str, ...], tuple[StageRow, ...]]:
    """`(metrics, rows)`: the metric names that any stage knows, the key one first, and one row per stage."""
    found, key = stages(report), key_metric(report)
    names = tuple(dict.fromkeys(name for name in (key, *(n for s in found for n in s.quality)) if name is not None))
    if key is None:
        return (), ()
    known = [s.quality[key] for s in found if math.isfinite(s.quality.get(key, math.nan))]
    scale, dense = _padded(known), report.before.quality.get(key)
    rows = []
    for stage in found:
        at = stage.quality.get(key)
        change = "" if at is None or dense is None or stage.name == "dense" else difference(key, dense, at)
        picture = None if at is None or not math.isfinite(at) else svg.strip(at, _finite(dense), scale)
        values = tuple(value(n, stage.quality[n]) if n in stage.quality else _DASH for n in names)
        rows.append(StageRow(stage.name, values, change, picture))
    return names, tuple(rows)


def recovery(report: Report) -> tuple[Panel, ...]:
    """A chart per metric of the recovery."""
    if report.history is None:
        return ()
    unit, entries = report.history.unit, report.history.values
    names = dict.fromkeys(name for entry in entries for name in entry if name != unit)
    bases = [name for name in names if name.rpartition("_")[2] not in ("low", "high") or _base(name) not in names]
    at = [entry.get(unit, i) for i, entry in enumerate(entries, 1)]
    return tuple(_recovery_panel(name, unit, at, entries, report.before.quality.get(name)) for name in bases)


def _base(name: str) -> str:
    return name.rpartition("_")[0]


def _recovery_panel(
    name: str, unit: str, at: Sequence[float], entries: Sequence[Mapping[str, float]], dense: float | None
) -> Panel:
    points = tuple((x, e[name]) for x, e in zip(at, entries, strict=True) if name in e)
    sides = (f"{name}_low", f"{name}_high")
    band = tuple(
        (x, e[sides[0]], e[sides[1]]) for x, e in zip(at, entries, strict=True) if all(side in e for side in sides)
    )
    last = points[-1]
    ends = f"{value(name, points[0][1])} first, {value(name, last[1])} at {unit} {number(last[0])}"
    label = f"{metric(name)} by {unit}: {ends}"
    curve = svg.Curve(points, band, _finite(dense))
    chart = svg.line_chart(curve, label, x_text=number, y_text=lambda y: tick(name, y), last=value(name, last[1]))
    dashed = "" if dense is None else f"; dashed: dense, {value(name, dense)}"
    return Panel(f"{metric(name)} by {unit}", chart, f"ends at {value(name, last[1])}{dashed}")


def sensitivity(report: Report) -> tuple[tuple[Panel, ...], int]:
    """`(panels, left_out)`: a small chart per group, most sensitive first, and how many are not drawn."""
    curves = {name: tuple(p for p in points if math.isfinite(p[1])) for name, points in report.sensitivity.items()}
    curves = {name: points for name, points in curves.items() if points}
    key = key_metric(report) or "quality"
    dense = _finite(report.before.quality.get(key))
    x = svg.Scale(0, max((at for points in curves.values() for at, _ in points), default=1.0))
    y = _padded([q for points in curves.values() for _, q in points] + ([] if dense is None else [dense]))
    chosen = {group.name: group.sparsity for group in report.groups}
    order = sorted(curves, key=lambda name: -_swing(curves[name], dense))
    panels = [_sensitivity_panel(name, key, curves[name], dense, chosen.get(name), x, y) for name in order[:PANELS]]
    return tuple(panels), len(order) - len(panels)


def _swing(points: Sequence[tuple[float, float]], dense: float | None) -> float:
    start = points[0][1] if dense is None else dense
    return max(abs(quality - start) for _, quality in points)


def _sensitivity_panel(
    name: str,
    key: str,
    points: tuple[tuple[float, float], ...],
    dense: float | None,
    chosen: float | None,
    x: svg.Scale,
    y: svg.Scale,
) -> Panel:
    (_, first), (most, last) = points[0], points[-1]
    label = f"{name}: {metric(key)} from {value(key, first)} to {value(key, last)} at sparsity {share(most)}"
    curve = svg.Curve(points, reference=dense)
    reached = None if chosen is None else curve.at(chosen)
    if chosen is None or reached is None:
        note = f"{value(key, last)} at {share(most)}"
    else:
        note = f"{value(key, reached)} at the {share(chosen)} chosen"
    return Panel(name, svg.spark(curve, chosen, x, y, label), note)


def front(report: Report) -> svg.Svg | None:
    """The scatter of budgets, MACs and latency left against quality; None if no point has all it takes."""
    points = [(p, p.quality) for p in report.front if p.quality is not None and math.isfinite(p.quality)]
    rows = [svg.Dumbbell(p.budget, q, p.macs_left, p.latency_left) for p, q in points]
    rows = [row for row in rows if row.dot is not None or row.ring is not None]
    if not rows:
        return None
    key = key_metric(report) or "quality"
    label = f"{metric(key)} against what is left of MACs and latency for {len(rows)} budgets; the table has the figures"
    return svg.dumbbells(
        rows,
        label,
        x_text=lambda x: tick("accuracy", x),
        y_text=lambda y: tick(key, y),
        reference=_finite(report.before.quality.get(key)),
    )


def layer_profile(report: Report) -> Panel | None:
    """What each layer had and has, from the first to the last; None without layers."""
    pairs, noun = _pairs(report)
    if not pairs:
        return None
    most = max(range(len(pairs)), key=lambda i: (pairs[i][0], -i))
    label = f"{noun} of {len(pairs)} layers before and after; the largest is {report.layers[most].name}"
    title = f"{noun} per layer, from the first to the last"
    return Panel(title, svg.profile(pairs, label), f"tallest: {count(max(map(max, pairs)))}")


def layer_pair(layer: LayerChange, masked: bool) -> tuple[float, float]:
    """What a layer's bar shows: its MACs before and after, in a masked model its parameters and those not zero."""
    if masked:
        return layer.params_before, layer.params_after if layer.nonzero_after is None else layer.nonzero_after
    return layer.macs_before, layer.macs_after


def _pairs(report: Report) -> tuple[list[tuple[float, float]], str]:
    if report.form == "mask":
        return [layer_pair(layer, True) for layer in report.layers], "Parameters that are not zero,"
    if any(layer.macs_before for layer in report.layers):
        return [layer_pair(layer, False) for layer in report.layers], "MACs"
    return [(layer.params_before, layer.params_after) for layer in report.layers], "Parameters"


def has_times(report: Report) -> bool:
    """Whether any layer was timed."""
    return any(layer.seconds_after is not None for layer in report.layers)


def group_rows(groups: Sequence[GroupChange]) -> tuple[Group, ...]:
    """Each group with the layers that go along, merged from their tensors; at most six first, fewer on a long page."""
    allowed = max(2, NAMES // max(len(groups), 1))
    most = min(6, allowed)
    rows = []
    for group in groups:
        names = tuple(name for name in dict.fromkeys(map(module_of, group.layers)) if name != group.name)
        rows.append(Group(group, names[:most], names[most:allowed], max(0, len(names) - allowed)))
    return tuple(rows)


def _padded(numbers: Sequence[float]) -> svg.Scale:
    """A scale with a margin of a twelfth, so that dots at the ends are whole."""
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    room = (high - low) / 12 or 1.0
    return svg.Scale(low - room, high + room)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
