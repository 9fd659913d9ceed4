"""Models as ONNX files, with proof: the file is run by onnxruntime and must agree with the model."""

from __future__ import annotations

import importlib
import itertools
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import leaves
from ..core.errors import MissingExtraError, ModelError, OptionError
from ..core.folder import replace_file
from .agreement import agree_on, arguments, exported, exporting

__all__ = ["OnnxSession", "export_onnx", "onnx_session", "verify_onnx"]

# A protobuf file ends at 2 GiB; weights beyond that go into a second file beside it.
_ONE_FILE = 1_900_000_000


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    check: bool = True,
    tolerance: float | None = None,
) -> Path:
    """The path of the ONNX file that was written.

    Args:
        model: exported in evaluation mode; it is left as it was.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        path: the file. Models beyond 1.9 GB get a second one beside it, `<path>.data`.
        dynamic_batch: whether the file accepts other batch sizes than that of the example. Default: no.
        check: whether onnxruntime runs the file on the example inputs (with `dynamic_batch` also on one sample more)
            before it is put in place. Default: yes.
        tolerance: the largest difference that the check allows, as a share of the largest output. Default: 1e-4, or
            2e-2 in half precision.

    Raises:
        MissingExtraError: onnx, onnxscript or (for the check) onnxruntime is not installed.
        ModelError: PyTorch cannot export the model.
        ProofError: the file and the model disagree; nothing was written.
        OptionError: the check was asked for a model in bfloat16, which onnxruntime cannot return.

    >>> export_onnx(nn.Linear(4, 2).eval(), torch.ones(3, 4), "pruned.onnx").name
    'pruned.onnx'
    """
    _needed(check)
    place = Path(path)
    with exporting(model):
        if check:
            _refuse_bfloat16(model, example_inputs)
        program = _program(model, example_inputs, dynamic_batch)

        def write(fresh: Path) -> None:
            program.save(fresh, external_data=_size(model) > _ONE_FILE)
            if check:
                verify_onnx(fresh, model, example_inputs, dynamic_batch=dynamic_batch, tolerance=tolerance)

        replace_file(place, write)
    return place


def verify_onnx(
    path: str | Path,
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
) -> None:
    """Returns if onnxruntime makes of the file what the model gives.

    Args:
        path: of the file.
        model: run in evaluation mode; it is left as it was.
        example_inputs, dynamic_batch, tolerance: as in `export_onnx`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ModelError: onnxruntime does not run the file.
        ProofError: the file and the model disagree.
    """
    _package("onnxruntime")

    def run(inputs: Any) -> list[Tensor]:
        try:
            return _run(_session(path), inputs)
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run {Path(path).name}: {error}") from error

    with exporting(model):
        agree_on(model, run, example_inputs, dynamic_batch, "the ONNX file", tolerance)


class OnnxSession(nn.Module):
    """A file in onnxruntime on the CPU, called as the model that it was made of; see `onnx_session`."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The outputs, on the CPU."""
        return _run(self.session, kwargs or args)


def onnx_session(model: nn.Module, example_inputs: Any, *, threads: int | None = None) -> OnnxSession:
    """The model as onnxruntime runs it on the CPU, exported and checked, to time it beside the model; no file stays.

    Args:
        model, example_inputs: as in `export_onnx`, whose errors these are.
        threads: CPU threads within an op; default: as many as PyTorch uses now.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, example_inputs, Path(folder) / "model.onnx")
        return OnnxSession(_session(path, threads or torch.get_num_threads()))


def _session(path: str | Path, threads: int = 0) -> Any:
    """The file in onnxruntime; with 0 threads it takes as many as there are cores."""
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    # Its warnings are about the file's history, which is not the caller's business.
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _needed(check: bool) -> None:
    """The exporter's own packages are there, and for a check onnxruntime."""
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _package(name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(name, "onnx") from error


def _refuse_bfloat16(model: nn.Module, example_inputs: Any) -> None:
    tensors = itertools.chain(model.parameters(), model.buffers(), leaves(example_inputs))
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise OptionError("onnxruntime returns no bfloat16 to Python: export model.float(), or pass check=False.")


def _program(model: nn.Module, example_inputs: Any, dynamic_batch: bool) -> Any:
    def export(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
        with warnings.catch_warnings():
            # Deprecations inside the exporter are not the caller's business.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.onnx.export(
                model, args, None, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False
            )

    return exported(export, example_inputs, dynamic_batch, " to ONNX")


def _size(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _run(session: Any, inputs: Any) -> list[Tensor]:
    """The outputs of the file on the inputs, which it takes by name or, failing that, in order."""
    names = [node.name for node in session.get_inputs()]
    _, kwargs = arguments(inputs)
    tensors: Sequence[Tensor] = (
        [kwargs[name] for name in names] if kwargs.keys() >= set(names) else list(leaves(inputs))
    )
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]
