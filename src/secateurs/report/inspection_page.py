"""An inspection as one HTML page: no script, nothing fetched, every word escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import lanes, svg
from .inspection import Inspection, ModelLayer, UnitGroup
from .inspection_text import few, measured, reach, spread
from .page import FIRST, MOST, environment
from .reasons import plain, stays
from .views import Card
from .words import count, file_size, listed, plural, shape, share

__all__ = ["GROUPS", "Numbered", "picture", "render"]

# More lanes than this nobody can follow; the table below the drawing has all.
GROUPS = 30
# From so many layers on, those that no lane needs are folded; of a group with many members only the ends are needed.
_LAYERS, _ENDS = 100, 6
# So many names of layers stand in one cell.
_NAMES = 6
# And so many in what hovering shows of a row that stands for several.
_TOLD = 12
_SELF = "the model"


@dataclass(frozen=True)
class Numbered:
    """A group with its number in drawing and table, and the hue of its lane; None if it is not drawn."""

    number: int
    group: UnitGroup
    hue: int | None = None


def render(found: Inspection) -> str:
    """The page as text."""
    return environment().get_template("inspection.html").render(_view(found))


def _view(found: Inspection) -> dict[str, Any]:
    """Everything that the template names."""
    drawn = {one.number: one for one in _largest(found.groups)}
    numbered = tuple(drawn.get(i, Numbered(i, group)) for i, group in enumerate(found.groups, 1))
    reasons = stays(found.frozen)
    view = {
        "found": found,
        "headline": f"{found.model}: {reach(found)}",
        "first": FIRST,
        "many": MOST,
        "most": _NAMES,
        "cards": _cards(found),
        "picture": picture(found.layers, tuple(drawn.values())),
        "left_out": len(numbered) - len(drawn),
        "groups": numbered[:MOST],
        "unlisted": max(0, len(numbered) - MOST),
        "timed": any(group.time is not None for group in found.groups),
        "noisy": any(group.measured is not None and group.measured.noisy for group in found.groups),
        "measured": measured,
        "spread": spread,
        "reasons": reasons,
        "stay_count": len(found.frozen),
    }
    sections = {
        "widths": ("Shared widths", view["picture"] is not None),
        "groups": ("Groups", True),
        "frozen": ("What stays", True),
        "unknown": ("Unknown ops", bool(found.unknown)),
    }
    shown = {name: title for name, (title, is_shown) in sections.items() if is_shown}
    return {**view, "sections": shown, "counts": dict.fromkeys(shown, 0)}


def _cards(found: Inspection) -> tuple[Card, ...]:
    reach = f"{share(found.params_in_reach)} lie along a width that can go"
    work = f"{share(found.macs_in_reach)} lie along a width that can go"
    units = sum(group.size for group in found.groups)
    return (
        Card("Groups", count(len(found.groups)), f"{count(units)} units in all" if found.groups else "nothing can go"),
        Card("Parameters", count(found.params), reach, svg.bars(1, found.params_in_reach, 1)),
        Card("MACs", count(found.macs), work, svg.bars(1, found.macs_in_reach, 1)),
        Card("Memory", file_size(found.bytes), "parameters and buffers"),
    )


def _largest(groups: Sequence[UnitGroup]) -> tuple[Numbered, ...]:
    """The groups with most parameters, in the order of the forward pass; the hues take turns."""
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].params_per_unit * groups[i].size, i))
    return tuple(Numbered(i + 1, groups[i], turn % lanes.HUES) for turn, i in enumerate(sorted(order[:GROUPS])))


def picture(layers: Sequence[ModelLayer], groups: Sequence[Numbered]) -> svg.Svg | None:
    """Layers in forward order with a lane for each group; None if no width is shared by two of them."""
    if not any(len({*one.group.makers, *one.group.passing, *one.group.readers}) > 1 for one in groups):
        return None
    ends = {name for one in groups for name in (*one.group.makers, *one.group.readers)}
    drawn = [layer for layer in layers if len(layer.shape) > 1 or layer.name in ends]
    runs = _folded(drawn, groups)
    at = {layer.name: i for i, run in enumerate(runs) for layer in run}
    found = [
        lanes.Lane(str(one.number), one.hue or 0, _group_title(one), _marks(one.group, at, runs)) for one in groups
    ]
    label = f"{plural(len(drawn), 'layer')} in forward order, and which of them share {plural(len(groups), 'width')}"
    return lanes.drawing([_row(run) for run in runs], [lane for lane in found if lane.marks], label)


def _folded(layers: Sequence[ModelLayer], groups: Sequence[Numbered]) -> list[list[ModelLayer]]:
    """Runs of layers that share a row: of a long model, those next to each other that no lane needs."""
    needed = {name for one in groups for name in _needed(one.group)} if len(layers) > _LAYERS else None
    runs: list[list[ModelLayer]] = []
    for layer in layers:
        is_free = needed is not None and layer.name not in needed
        if is_free and runs and runs[-1][0].name not in (needed or ()):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _needed(group: UnitGroup) -> tuple[str, ...]:
    """Layers at either end of the group that must be seen."""
    names = (*group.makers, *group.readers)
    return names if len(names) <= 2 * _ENDS else (*names[:_ENDS], *names[-_ENDS:])


def _marks(group: UnitGroup, at: dict[str, int], runs: Sequence[Sequence[ModelLayer]]) -> dict[int, lanes.Mark]:
    """What the group does in each row; where one layer both makes and reads the width, that it makes it."""
    roles: tuple[tuple[lanes.Mark, tuple[str, ...]], ...]
    roles = (("passes", group.passing), ("reads", group.readers), ("makes", group.makers))
    return {
        at[name]: role if len(runs[at[name]]) == 1 else "hidden"
        for role, names in roles
        for name in names
        if name in at
    }


def _row(run: Sequence[ModelLayer]) -> lanes.Row:
    if len(run) == 1:
        return lanes.Row(run[0].name or _SELF, _layer_title(run[0]), _note(run[0]))
    names = [layer.name or _SELF for layer in run]
    notes = {_note(layer) for layer in run}
    title = f"{', '.join(names[:_TOLD])}{' …' if len(names) > _TOLD else ''}"
    return lanes.Row(f"{len(run)} more layers", title, notes.pop() if len(notes) == 1 else "", folded=True)


def _note(layer: ModelLayer) -> str:
    """Why the layer's width stays, in plain words; empty if it can go."""
    return "; or ".join(dict.fromkeys(plain(reason) for reason in layer.stays))


def _layer_title(layer: ModelLayer) -> str:
    facts = f"{layer.name or _SELF}: {layer.kind} {shape(layer.shape)}, {count(layer.params)} parameters"
    work = f", {count(layer.macs)} MACs" if layer.macs else ""
    return f"{facts}{work}{f'. Its width stays: {listed(layer.stays)}' if layer.stays else ''}"


def _group_title(one: Numbered) -> str:
    group = one.group
    unit = (f"{count(group.params_per_unit)} parameters", f"{count(group.macs_per_unit)} MACs")
    parts = [
        f"{what} {few(names, _NAMES)}"
        for what, names in (("made by", group.makers), ("passed on by", group.passing), ("read by", group.readers))
        if names
    ]
    return f"{one.number}: {group.size} {group.kind}s of {group.name}; one is {listed(unit)}; {'; '.join(parts)}"
