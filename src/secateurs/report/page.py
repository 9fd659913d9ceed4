"""The report as one HTML page: no script, nothing fetched, every word escaped."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from . import svg, views, words
from .data import LayerChange, Report
from .findings import by_reason, changed_groups, changed_layers, checks, key_metric
from .headline import headline

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["FIRST", "MOST", "environment", "render"]

# Lists stop at ten; the rest is folded away, and what is beyond a thousand is left to the report as a file.
FIRST, MOST = 10, 1000
_FILTERS = ("agreement", "metric", "number", "plural", "shape", "share", "value")
_WITH_UNITS = ("count", "duration", "file_size")


def render(report: Report) -> str:
    """The page as text."""
    return environment().get_template("report.html").render(_view(report))


@cache
def environment() -> Environment:
    """Templates with the filters of the house; built once."""
    # Imported when a page is drawn, so that reports as data cost nothing.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("secateurs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(words, name) for name in _FILTERS}
    environment.filters |= {name: _together(getattr(words, name)) for name in _WITH_UNITS}
    environment.filters["breakable"] = _breakable
    return environment


def _together(words_for: Callable[[float | None], str]) -> Callable[[float | None], str]:
    """The same words with blanks at which a line does not end."""
    return lambda amount: words_for(amount).replace(" ", "\N{NO-BREAK SPACE}")


def _breakable(name: str) -> svg.Svg:
    """A qualified name that may continue on the next line after each dot."""
    return svg.Svg(".<wbr>".join(map(html.escape, name.split("."))))


def _view(report: Report) -> dict[str, Any]:
    """Everything that the template names."""
    layers, whole_layers = changed_layers(report)
    groups, whole_groups = changed_groups(report)
    metrics, stages = views.stage_rows(report)
    panels, undrawn = views.sensitivity(report)
    masked = report.form == "mask"
    most = max((max(views.layer_pair(layer, masked)) for layer in report.layers), default=0.0)
    view = {
        "report": report,
        "masked": masked,
        "headline": headline(report),
        "first": FIRST,
        "many": MOST,
        "checks": checks(report),
        "cards": views.cards(report),
        "key": key_metric(report),
        "metrics": metrics,
        "stages": stages,
        "recovery": views.recovery(report),
        "profile": views.layer_profile(report),
        "layers": [_layer(layer, masked, most) for layer in layers[:MOST]],
        "unlisted_layers": max(0, len(layers) - MOST),
        "whole_layers": whole_layers,
        "timed": views.has_times(report),
        "erred": any(layer.error is not None for layer in report.layers),
        "groups": views.group_rows(groups[:MOST]),
        "unlisted_groups": max(0, len(groups) - MOST),
        "whole_groups": whole_groups,
        "scored": any(group.scores for group in groups),
        "sensitivity": panels,
        "undrawn": undrawn,
        "front": views.front(report),
        "frozen": list(by_reason(report.frozen).items()),
        "bars": svg.bars,
        "scores": svg.scores,
    }
    sections = _sections(view)
    return {**view, "sections": sections, "counts": dict.fromkeys(sections, 0) | {"warnings": len(report.warnings)}}


def _sections(view: dict[str, Any]) -> dict[str, str]:
    """Identifier and title of the sections that have something to say, in the order of the page."""
    report: Report = view["report"]
    found = {
        "budget": ("Budget", True),
        "quality": ("Quality", True),
        "layers": ("Layers", bool(report.layers)),
        "runtime": ("Runtime", report.runtime is not None),
        "groups": ("Groups", bool(report.groups)),
        "sensitivity": ("Sensitivity", bool(view["sensitivity"])),
        "front": ("Front", bool(report.front)),
        "frozen": ("Frozen", bool(report.frozen) or (report.form == "cut" and bool(report.groups))),
        "warnings": ("Warnings", True),
        "reproduce": ("Reproduce", True),
    }
    return {name: title for name, (title, shown) in found.items() if shown}


def _layer(layer: LayerChange, masked: bool, most: float) -> dict[str, Any]:
    """A layer's row: its change, its bar, and each axis of the shape after with whether it changed."""
    before, after = layer.shape_before, layer.shape_after
    moved = [len(before) != len(after) or old != new for old, new in zip(before, after, strict=False)]
    return {
        "change": layer,
        "picture": svg.bars(*views.layer_pair(layer, masked), most),
        "before": before,
        "after": list(zip(after, moved + [True] * (len(after) - len(moved)), strict=True)),
        "same": before == after,
    }
