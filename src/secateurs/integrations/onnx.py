"""ONNX files pruned to ONNX files."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..core.budget import Budget
from ..core.errors import OptionError
from ..deploy.onnx import verify_onnx
from ..onnx import OnnxModule, example_inputs, read_onnx, write_onnx
from ..pruning import Pruned, prune

__all__ = ["files_of", "prune_onnx", "write_verified"]


def prune_onnx(
    path: str | Path,
    budget: str | Budget,
    out: str | Path,
    *,
    inputs: Any = None,
    data: Iterable[Any] | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Pruned:
    """What pruning made of the ONNX file `path`; the smaller file is `out`, and onnxruntime agrees with the model.

    The cut is proven equal to zeros on the example inputs, as for any model, and then the file is run by onnxruntime on
    the same inputs and must agree with the cut model. The graph keeps its names, inputs, outputs and metadata, and axes
    of any size stay so.

    Args:
        path: a file that any exporter wrote.
        budget: as in `prune`.
        out: the new file; it may be `path`, which is then replaced.
        inputs: example inputs, a mapping by the names in the file, or a tuple in their order; default: random ones of
            the declared shapes, see `onnx.example_inputs`.
        data: batches, as in `prune`.
        tolerance: the largest difference between the file and the model; see `export_onnx`.
        options: of `prune`.

    Raises:
        FileError: the file cannot be read, or the new one cannot be written.
        ModelError: an op that is not supported, or whatever else `prune` finds.
        ProofError: the cut and the zeros, or the file and the model, disagree; nothing is written.
        MissingExtraError: onnx, onnx-ir or onnxruntime is not installed.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> torch.onnx.export(net, (torch.ones(1, 4),), "net.onnx", dynamo=False)
    >>> prune_onnx("net.onnx", "macs<=50%", "smaller.onnx").plan.cost("macs")
    0.5
    """
    module = read_onnx(path)
    given = example_inputs(module) if inputs is None else inputs
    made = prune(module, given, budget, data=data, **{"name": Path(path).name, **options})
    write_verified(made.model, given, out, tolerance=tolerance)
    return made


def write_verified(model: nn.Module, inputs: Any, path: str | Path, *, tolerance: float | None = None) -> Path:
    """The path of the ONNX file written, which onnxruntime has run on the inputs with the model's result.

    Args:
        model: from `read_onnx`, or pruned from such a one; run in evaluation mode.

    Raises:
        OptionError: the model does not come from an ONNX file.
        ProofError: the file and the model disagree; nothing is written.
    """
    if not isinstance(model, OnnxModule):
        raise OptionError(f"{type(model).__name__} does not come from an ONNX file: use export_onnx for it.")
    return write_onnx(model, path, check=partial(verify_onnx, model=model, example_inputs=inputs, tolerance=tolerance))


def files_of(model: nn.Module, inputs: Any) -> dict[str, bytes]:
    """`model.onnx`, and what belongs beside it, as `write_verified` makes them; nothing for other models."""
    if not isinstance(model, OnnxModule):
        return {}
    with TemporaryDirectory() as drafts:
        write_verified(model, inputs, Path(drafts) / "model.onnx")
        return {file.name: file.read_bytes() for file in sorted(Path(drafts).iterdir())}
