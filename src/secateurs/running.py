"""What a run of pruning does whatever it prunes: it tells and times its stages, keeps to its folder, hands over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from .core.errors import OptionError
from .core.state import read_state, write_state

__all__ = ["RUN", "Clock", "Stage", "checkpoint_folder", "claim", "other_run", "take_place"]

Stage = Callable[[str], None]
# Where a run says which it is; it is no work that was done.
RUN = "run.safetensors"


class Clock:
    """`with clock("cutting"):` tells the stage and notes its seconds."""

    def __init__(self, seconds: dict[str, float], tell: Stage | None) -> None:
        self._seconds, self._tell = seconds, tell or (lambda _name: None)
        self._name, self._start = "", 0.0

    def __call__(self, name: str) -> Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._tell(self._name)
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + perf_counter() - self._start


def checkpoint_folder(checkpoint: str | Path | None) -> Path | None:
    """Where a run is kept, if it is.

    Raises:
        OptionError: that is a file.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and folder.is_file():
        raise OptionError(f"checkpoint= is a folder, and {folder} is a file; give another.")
    return folder


def claim(folder: Path, run: dict[str, Any]) -> None:
    """None; the folder is from now on that of `run`, unless it is another's already.

    Raises:
        OptionError: it is.
    """
    file = folder / RUN
    if not file.exists():
        write_state(file, run, "run")
    elif read_state(file, "run") != run:
        raise other_run(folder)


def other_run(folder: Path) -> OptionError:
    """The error of a checkpoint folder that belongs to another run."""
    return OptionError(
        f"{folder} holds a run of another model, budget or options; give another folder, or delete it to start again."
    )


def take_place(model: nn.Module, made: nn.Module) -> nn.Module:
    """`model` with the class, attributes and submodules of `made`: whoever holds it holds the pruned one."""
    model.__class__ = made.__class__
    model.__dict__ = copy.copy(made.__dict__)
    return model
