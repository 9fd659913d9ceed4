"""The command line: one file a command. Nothing here imports PyTorch before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from . import advise, bench, demo, inspect, methods, prune, report, stream, worth
from ._options import flat

__all__ = ["app", "main"]

app = typer.Typer(
    name="secateurs",
    help="Prune PyTorch models: smaller and faster on real hardware, with proof.",
    no_args_is_help=True,
    add_completion=False,
    # An error is one sentence; --debug shows where it came from.
    pretty_exceptions_enable=False,
)
for _command in (
    *(prune.prune, stream.stream, inspect.inspect, methods.methods, report.report, bench.bench, worth.worth),
    demo.demo,
):
    app.command()(flat(_command))
app.add_typer(advise.advise, name="advise")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"secateurs {version('secateurs')}")
        raise typer.Exit


@app.callback()
def _before(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def main() -> None:
    """None; runs the command line. Exits with 0 if the command succeeded, 1 if it failed, 2 if it was misused."""
    app(prog_name="secateurs")
