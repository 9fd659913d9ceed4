"""What a benchmark leaves behind: one JSON file with its figures, its verdict, and what they depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from secateurs.summary import environment

__all__ = ["RESULTS", "holds", "mean_std", "record"]

RESULTS = Path(__file__).parent / "results"


def mean_std(values: Sequence[float], scale: float = 100) -> str:
    """`values` as mean ± sample standard deviation, in per cent by default."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{scale * fmean(values):.2f} ± {scale * spread:.2f}"


def holds(claim: bool) -> str:
    """The verdict in words."""
    return "held" if claim else "did not hold"


def record(
    name: str,
    *,
    system: str,
    claim: str,
    held: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    data: str,
    seeds: Sequence[int] = (),
    note: str = "",
    command: str = "",
    show: bool = True,
) -> None:
    """Prints a table and writes `results/NAME.json`.

    Args:
        name: of the benchmark, its module's.
        system: of the catalogue, or a part of the library.
        claim: what the paper, or the library, says.
        held: whether it held here, with figures, one or two sentences.
        columns, rows: the table.
        data: data set, split and size.
        seeds: one run for each.
        note: what a reader must know to judge the figures.
        command: that gives them; default: the module of this name.
        show: whether the table is printed; a run that records after each row prints it once.
    """
    if show:
        table = Table(*columns, title=name)
        for row in rows:
            table.add_row(*map(str, row))
        Console(width=160).print(table, held)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "name": name, "system": system, "claim": claim, "held": held, "columns": list(columns),
        "rows": [list(map(str, row)) for row in rows], "data": data, "seeds": list(seeds), "note": note,
        "command": command or f"python -m benchmarks.{name}", "environment": environment(),
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
