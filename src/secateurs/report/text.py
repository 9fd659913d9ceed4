"""The report as plain text: the same order as the page, cut to what a terminal can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .data import FrontPoint, FrozenWidth, GroupChange, LayerChange, Report
from .findings import by_reason, changed_groups, changed_layers, checks, key_metric, stages
from .headline import headline
from .runtime import RuntimeLayer
from .views import cards
from .words import agreement, count, duration, metric, module_of, number, plural, shape, share, value

__all__ = ["to_text"]

# Lists stop at ten; the page and the file have the rest.
FIRST = 10


def to_text(report: Report) -> str:
    """The report as lines of text without markup; long lists stop at ten."""
    blocks = [
        [headline(report)],
        _budget(report),
        _table([(c.label, c.figure, "; ".join(filter(None, (c.note, c.detail)))) for c in cards(report)]),
        _stages(report),
        _section("largest changes", _layers(report)),
        _section("sparse runtime", _runtime(report)),
        _section("groups: chosen, and what goes along", _groups(report)),
        _section("other budgets", _front(report)),
        _section("frozen", _frozen(report)),
        _section("warnings", [f"- {warning}" for warning in report.warnings]),
        _section("time taken", _table([(name, duration(taken)) for name, taken in report.seconds.items()])),
        [] if report.command is None else ["to do it again", f"  {report.command}"],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with their columns aligned on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _stopped(lines: Iterable[str], total: int, noun: str) -> list[str]:
    """The first ten, and how many more there are."""
    shown = [line for _, line in zip(range(FIRST), lines, strict=False)]
    return [*shown, f"and {plural(total - FIRST, f'more {noun}')}"] if total > FIRST else shown


def _budget(report: Report) -> list[str]:
    verdicts = {True: ": met", False: ": NOT MET", None: ""}
    found = [f"{check.asked} asked, {check.got}{verdicts[check.met]}" for check in checks(report)]
    if not found and report.budget:
        found = [f"{report.budget} asked"]
    if report.proof is not None:
        found.append(f"cut and masked model agree {agreement(report.proof)}")
    return found


def _stages(report: Report) -> list[str]:
    rows = [(s.name, ", ".join(f"{metric(n)} {value(n, v)}" for n, v in s.quality.items())) for s in stages(report)]
    return _section("quality", _table(rows))


def _layers(report: Report) -> list[str]:
    changed, whole = changed_layers(report)
    if not report.layers:
        return []
    rows = _table([_layer(layer, report.form == "mask") for layer in changed[:FIRST]])
    lines = _stopped(rows, len(changed), "layer")
    return [*lines, f"{plural(len(whole), 'layer')} unchanged"] if whole else lines


def _layer(layer: LayerChange, masked: bool) -> tuple[str, ...]:
    if masked and layer.nonzero_after is not None:
        error = "" if layer.error is None else f", output error {number(layer.error)}"
        stays = f"{count(layer.nonzero_after)} of {count(layer.params_before)} not zero{error}"
        return layer.name, shape(layer.shape_before), stays
    after = shape(layer.shape_after) if layer.shape_after else "gone"
    macs = f"{count(layer.macs_before)} → {count(layer.macs_after)} MACs" if layer.macs_before else ""
    return layer.name, f"{shape(layer.shape_before)} → {after}" if layer.shape_before else "", macs


def _runtime(report: Report) -> list[str]:
    if report.runtime is None:
        return []
    changed, every = report.runtime.changed, report.runtime.layers
    rows = _table([_form(layer) for layer in changed[:FIRST]])
    lines = [report.runtime.verdict, *_stopped(rows, len(changed), "layer")]
    dense = len(every) - len(changed)
    return [*lines, f"{plural(dense, 'layer')} dense"] if changed and dense else lines


def _form(layer: RuntimeLayer) -> tuple[str, ...]:
    timed = layer.dense_seconds is not None and layer.seconds is not None
    times = f"{duration(layer.dense_seconds)} → {duration(layer.seconds)}" if timed else ""
    return layer.name, layer.format, shape(layer.shape), f"{share(layer.density)} not zero", times


def _groups(report: Report) -> list[str]:
    changed, whole = changed_groups(report)
    lines = _stopped(map(_group, changed), len(changed), "group")
    return [*lines, f"{plural(len(whole), 'group')} left whole"] if whole else lines


def _group(group: GroupChange) -> str:
    names = [name for name in dict.fromkeys(map(module_of, group.layers)) if name != group.name]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    also = f"; also {', '.join(names[:3])}{rest}" if names else ""
    return f"{group.name}: {count(group.kept)} of {count(group.size)} {group.kind}s stay{also}"


def _front(report: Report) -> list[str]:
    key = key_metric(report) or "quality"
    return _stopped(_table([tuple(_point(point, key)) for point in report.front]), len(report.front), "budget")


def _point(point: FrontPoint, key: str) -> Iterator[str]:
    yield point.budget
    for noun, left in (("MACs", point.macs_left), ("latency", point.latency_left)):
        yield "" if left is None else f"{share(left)} of the {noun}"
    yield "" if point.quality is None else f"{metric(key)} {value(key, point.quality)}"


def _frozen(report: Report) -> list[str]:
    reasons = by_reason(report.frozen)
    return _stopped((f"{_tensors(widths)}: {why}" for why, widths in reasons.items()), len(reasons), "reason")


def _tensors(widths: Sequence[FrozenWidth]) -> str:
    rest = f" and {len(widths) - 3} more" if len(widths) > 3 else ""
    return f"{', '.join(width.tensor for width in widths[:3])}{rest}"
