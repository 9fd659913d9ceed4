"""`secateurs inspect`: what of a model can go, what goes along, what a unit costs, and what stays and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import Granularity, Model, Opening, Output
from ._session import session, table

if TYPE_CHECKING:
    from ..report.inspection import Inspection

__all__ = ["inspect"]


def inspect(
    model: Model,
    *,
    granularity: Granularity = None,
    time: Annotated[
        bool, typer.Option("--time", help="Measure what a unit costs in time, and each layer's share.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Draw which layers share a width, into this page.")
    ] = None,
    opening: Opening,
    output: Output,
) -> None:
    """Show what of a model can go, what goes along with it, what a unit costs, and what stays and why."""
    with session(**vars(output), threads=opening.threads) as talk:
        from ..inspection import inspect

        source = opening.ready(model)
        if time:
            talk.say("measuring every group against the whole model; this takes a second or more for each")
        found = inspect(
            source.model, source.example_inputs, granularity=granularity or "channel", timed=time, name=source.name
        )
        page = None if html is None else str(found.to_html(html))
        data = {**found.to_dict(), **({} if page is None else {"page": page})}
        talk.result(data, *_shown(found), *([] if page is None else [f"page: {page}"]))


def _shown(found: Inspection) -> list[Any]:
    from ..report.inspection_text import columns, group_cells, headline, stay_lines, unknown_lines

    rows = [group_cells(group) for group in found.groups]
    return [
        headline(found),
        *([table(columns(found), rows)] if rows else []),
        *(["What stays:"] if found.frozen else []),
        *stay_lines(found),
        *unknown_lines(found),
    ]
