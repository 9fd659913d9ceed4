"""What all commands share: results on the standard output, everything else beside it, and errors in one sentence."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import TaskID

# Where output is not a terminal, lines may be as long as their content.
_WIDE = 200


@dataclass(frozen=True)
class Session:
    """One run of a command.

    Args:
        out: the standard output, which holds nothing but the result.
        as_json: whether the result is JSON.
        quiet: whether only the result is wanted.
    """

    out: TextIO
    as_json: bool
    quiet: bool

    def say(self, text: str) -> None:
        """None; tells a person something that is no part of the result."""
        if not self.quiet:
            typer.echo(text, err=True)

    def result(self, data: Any, *shown: RenderableType) -> None:
        """None; prints the data as JSON if that was asked for, else what is shown of it."""
        if self.as_json:
            print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), file=self.out)
            return
        console = _console(self.out)
        for part in shown:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@contextlib.contextmanager
def session(*, as_json: bool, debug: bool, quiet: bool = False, threads: int | None = None) -> Iterator[Session]:
    """A `Session`. What libraries print inside goes to the standard error; an error ends the command with exit code 1.

    Args:
        as_json, quiet: see `Session`.
        debug: errors go through, with their traceback.
        threads: CPU threads within an op; as many as before afterwards.
    """
    current = Session(sys.stdout, as_json, quiet)
    try:
        with contextlib.redirect_stdout(sys.stderr), _threads(threads):
            yield current
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        # The outermost door: a person gets a sentence, which says so where the error was not foreseen.
        if debug:
            raise
        typer.echo(f"error: {_sentence(error)}", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    if number is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sentence(error: Exception) -> str:
    from ..core.errors import SecateursError

    text = " ".join(str(error).split())
    if isinstance(error, SecateursError):
        return text
    return f"unexpected {type(error).__name__}: {text.rstrip('.') or 'no message'}; --debug shows where."


def _console(file: TextIO) -> Console:
    from rich.console import Console

    return Console(file=file, width=None if file.isatty() else _WIDE)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> RenderableType:
    """A table for people; a column whose name ends in ">" is aligned on the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


class Stages:
    """The stages of a run and its training steps: a bar on a terminal, one line a stage elsewhere.

    `with Stages(session) as stages:` and then `stages.begin` and `stages.step` are what `prune` calls back.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._bar: Any = None
        self._task: TaskID | None = None

    def __enter__(self) -> Stages:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal and not self._session.quiet:
            columns = (
                *(SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()),
                *(TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn()),
            )
            self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, stage: str) -> None:
        """None; a stage begins."""
        if self._bar is None:
            self._session.say(f"  {stage}")
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(stage, total=None, detail="")

    def step(self, progress: Any) -> None:
        """None; a training step was taken (`recover.Progress`), or a block is done (`solvers.layerwise.BlockDone`)."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=1.0, completed=progress.share, detail=progress.detail)
