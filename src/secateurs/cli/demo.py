"""`secateurs demo`: everything at once, on real data, in less than a minute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import Output, Seed, Threads
from ._session import Stages, session, table

if TYPE_CHECKING:
    from ..demo import Demonstration, Outcome

__all__ = ["demo"]


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", help="A folder for what is made.")] = Path("demo-out"),
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of the training; repairs take half as many.")] = 10,
    seed: Seed = 0,
    threads: Threads = None,
    output: Output,
) -> None:
    """Train a small network on handwritten digits, prune it and prove it: one minute."""
    with session(**vars(output), threads=threads) as talk:
        from ..demo import run

        with Stages(talk) as stages:
            found = run(out, seed=seed, epochs=epochs, tell=stages.begin, on_step=stages.step)
        talk.result(found.to_dict(), *_shown(found))


def _shown(found: Demonstration) -> list[Any]:
    columns = ("model", "budget", "accuracy>", "MACs>", "not zero>", "file>", "speed>")
    rows = [_row(outcome, found.outcomes[0]) for outcome in found.outcomes]
    return [
        table(columns, rows),
        *(f"{name}: {headline}" for name, headline in found.headlines.items()),
        f"half: the cut and the masked model agree to a relative {found.proof:.1e}; both models came back bit by bit.",
        *found.notes,
        f"{found.seconds:.0f} s in all; look at {found.files['half, report']} and {found.files['sparse, report']}",
    ]


def _row(outcome: Outcome, dense: Outcome) -> list[str]:
    from ..report.words import file_size

    return [
        outcome.name,
        outcome.budget or "–",
        f"{outcome.accuracy:.1%}",
        f"{outcome.macs / dense.macs:.1%}",
        f"{outcome.nonzero / dense.params:.1%}",
        file_size(outcome.disk_bytes),
        "1×" if outcome.speedup is None else f"{outcome.speedup:.2f}×",
    ]
