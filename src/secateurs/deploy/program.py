"""Models as `torch.export` programs: the graph itself, for runtimes that have no Python class to fill.

The file is PyTorch's own format (`.pt2`); read it with `torch.export.load`, and only from those you trust.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import OptionError
from ..core.folder import replace_file
from .agreement import agree_on, exported, exporting, outputs

__all__ = ["export_program"]


def export_program(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    check: bool = True,
    tolerance: float | None = None,
) -> Path:
    """The path of the exported program that was written.

    Args:
        model: exported in evaluation mode; it is left as it was.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        path: the file; PyTorch reads programs from names that end in `.pt2`.
        dynamic_batch: whether the program accepts other batch sizes than that of the example. Default: no.
        check: whether the file is loaded and run on the example inputs (with `dynamic_batch` also on one sample more)
            before it is put in place. Default: yes.
        tolerance: the largest difference that the check allows, as a share of the largest output. Default: 1e-4, or
            2e-2 in half precision.

    Raises:
        ModelError: PyTorch cannot export the model.
        ProofError: the file and the model disagree; nothing was written.
        OptionError: the path has another suffix.

    >>> export_program(nn.Linear(4, 2).eval(), torch.ones(3, 4), "pruned.pt2").name
    'pruned.pt2'
    """
    place = Path(path)
    if place.suffix != ".pt2":
        raise OptionError(f"{str(path)!r} does not end in .pt2, and PyTorch reads programs from such names only.")
    with exporting(model):
        program = _program(model, example_inputs, dynamic_batch)

        def write(fresh: Path) -> None:
            torch.export.save(program, fresh)
            if check:
                run = partial(outputs, torch.export.load(fresh).module())
                agree_on(model, run, example_inputs, dynamic_batch, "the exported program", tolerance)

        replace_file(place, write)
    return place


def _program(model: nn.Module, example_inputs: Any, dynamic_batch: bool) -> Any:
    def export(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)

    return exported(export, example_inputs, dynamic_batch)
