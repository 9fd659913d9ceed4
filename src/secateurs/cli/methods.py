"""`secateurs methods`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._options import Debug, Json
from ._session import session, table

__all__ = ["methods"]


def methods(
    criteria: Annotated[bool, typer.Option("--criteria", help="List criteria and allocations instead.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the published systems, or the criteria and allocations."""
    with session(as_json=as_json, debug=debug) as talk:
        if criteria:
            scores, rules = _criteria(), _allocations()
            talk.result(
                {"criteria": scores, "allocations": rules},
                _table("criteria", scores, ("name", "needs", "groups", "summary")),
                _table("allocations", rules, ("name", "needs", "summary")),
            )
            return
        records = _methods()
        shown = _table("methods", records, ("name", "units", "when", "needs", "summary"))
        talk.result(records, shown if records else "The catalogue of methods is empty in this release.")


def _methods() -> list[dict[str, Any]]:
    from .. import methods as _room  # noqa: F401  (registers them)
    from ..core.catalogue import catalogue

    return [method.to_dict() for method in catalogue()]


def _criteria() -> list[dict[str, Any]]:
    from ..criteria import criteria

    names = ("name", "summary", "needs", "groups", "options", "paper")
    return [{name: getattr(entry, name) for name in names} for entry in criteria()]


def _allocations() -> list[dict[str, Any]]:
    from ..core.allocate import allocations

    return [
        {
            "name": entry.name,
            "summary": (entry.rule.__doc__ or "").strip().partition("\n")[0],
            "needs": [what for what, needed in _needs(entry) if needed],
            "options": entry.options,
        }
        for entry in allocations()
    ]


def _needs(entry: Any) -> tuple[tuple[str, bool], ...]:
    return ("scores", entry.needs_scores), ("shapes", entry.needs_shapes)


def _table(title: str, records: list[dict[str, Any]], names: tuple[str, ...]) -> Any:
    rows = [[_text(record[name]) for name in names] for record in records]
    return table(names, rows, title)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value)
