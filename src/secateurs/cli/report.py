"""`secateurs report`: what came of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._options import Debug, Json
from ._session import session

__all__ = ["report"]


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that secateurs saved, or a report.json.", show_default=False)
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Draw the page anew, into this file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the report of a pruned model, and where its page is."""
    with session(as_json=as_json, debug=debug) as talk:
        from ..report.data import Report

        found = Report.from_dict(_stored(folder)) if folder.is_dir() else Report.load(folder)
        page = _page(folder) if html is None else None
        page = page or found.to_html(html or _beside(folder))
        talk.result({**found.to_dict(), "page": str(page)}, found.to_text(), f"page: {page}")


def _stored(folder: Path) -> dict[str, object]:
    from ..deploy.store import load_extra

    stored: dict[str, object] = load_extra(folder, "report.json")
    return stored


def _page(folder: Path) -> Path | None:
    """The page that was saved with the model, if it is whole: drawn anew it could differ from its checksum."""
    from ..core.errors import FileError
    from ..deploy.store import load_extra

    try:
        load_extra(folder, "report.html")
    except FileError:
        return None
    return folder / "report.html"


def _beside(folder: Path) -> Path:
    return folder / "report.html" if folder.is_dir() else folder.with_suffix(".html")
