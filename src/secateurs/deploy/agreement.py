"""What every export does: how a model is handed to PyTorch, and whether the file still says what the model says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import call, leaves
from ..core.errors import DataError, ModelError, ProofError

__all__ = ["agree", "agree_on", "arguments", "batch_shapes", "enlarged", "exported", "exporting", "outputs"]

# Two runtimes sum in different orders: float32 outputs of deep networks differ by some 1e-6 of their size, half
# precision by its own rounding.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
_HALF = (torch.float16, torch.bfloat16)


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of example inputs: a tensor, a tuple, or a mapping of keywords."""
    if isinstance(example_inputs, Mapping) or hasattr(example_inputs, "keys"):
        return (), dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, Hugging Face caches off (they are no tensors), as it was before afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(config): config for module in modes if (config := getattr(module, "config", None)) is not None}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    model.eval()
    for config in cached:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in cached:
            config.use_cache = True


def exported(
    export: Callable[[tuple[Any, ...], dict[str, Any], Any], Any],
    example_inputs: Any,
    dynamic_batch: bool,
    to: str = "",
) -> Any:
    """What `export` returns.

    Args:
        export: PyTorch's exporter of one model; takes positional arguments, keyword arguments and dynamic shapes.
        example_inputs: a tensor, a tuple or a mapping.
        dynamic_batch: whether the batch size is free.
        to: the format, for the error, as " to ONNX".

    Raises:
        ModelError: PyTorch cannot export the model.
    """
    args, kwargs = arguments(example_inputs)
    shapes = batch_shapes(example_inputs) if dynamic_batch else None
    try:
        return export(args, kwargs, shapes)
    except (RuntimeError, ValueError, TypeError) as error:
        advice = "; give a batch of at least two, or dynamic_batch=False" if dynamic_batch else ""
        raise ModelError(f"PyTorch cannot export this model{to}{advice}: {error}") from error


def outputs(model: Any, example_inputs: Any) -> list[Tensor]:
    """The tensors of the model's output in order, on the CPU."""
    return [tensor.detach().cpu() for tensor in leaves(call(model, example_inputs))]


def agree(expected: Sequence[Tensor], found: Sequence[Tensor], what: str, tolerance: float | None) -> None:
    """Returns if the outputs agree.

    Args:
        expected: the model's.
        found: those of what was exported.
        what: its name in the error.
        tolerance: the largest difference allowed, as a share of the largest expected value, or of 1 if that is larger.
            Default: 1e-4, or 2e-2 where an output has half precision.

    Raises:
        ProofError: the numbers or shapes of outputs differ, or values by more than the tolerance.
    """
    if [tuple(tensor.shape) for tensor in expected] != [tuple(tensor.shape) for tensor in found]:
        shapes = [[list(tensor.shape) for tensor in side] for side in (expected, found)]
        raise ProofError(f"the model returns tensors of the shapes {shapes[0]}, {what} of {shapes[1]}: do not use it.")
    if tolerance is None:
        tolerance = _HALF_TOLERANCE if any(tensor.dtype in _HALF for tensor in expected) else _TOLERANCE
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        worst, allowed = _difference(left.double(), right.double()), tolerance * _size(left.double())
        if not worst <= allowed:
            raise ProofError(
                f"output {index} of the model and of {what} differ by up to {worst:.3g}, where {allowed:.3g} is "
                "allowed: do not use it; pass tolerance= if that is good enough."
            )


def agree_on(
    model: nn.Module,
    run: Callable[[Any], Sequence[Tensor]],
    example_inputs: Any,
    dynamic_batch: bool,
    what: str,
    tolerance: float | None,
) -> None:
    """Returns if the outputs agree on the example inputs and, with `dynamic_batch`, on one sample more.

    Args:
        model: that was exported.
        run: the outputs of what was exported, for inputs.
        what, tolerance: see `agree`.

    Raises:
        ProofError: see `agree`.
    """
    for inputs in (example_inputs, enlarged(example_inputs))[: 1 + dynamic_batch]:
        agree(outputs(model, inputs), run(inputs), what, tolerance)


def _difference(left: Tensor, right: Tensor) -> float:
    """The largest difference; equal infinities and two NaN count as equal."""
    same = (left == right) | (left.isnan() & right.isnan())
    return float((left - right).abs().where(~same, 0.0).max()) if left.numel() else 0.0


def _size(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return max(1.0, float(finite.abs().max())) if finite.numel() else 1.0


def _batch(example_inputs: Any) -> int:
    """The batch size: the first axis of the first input tensor."""
    for tensor in leaves(example_inputs):
        if tensor.dim():
            return int(tensor.shape[0])
    raise DataError("the example inputs hold no tensor with a batch axis: give at least one.")


def batch_shapes(example_inputs: Any) -> Any:
    """`dynamic_shapes` for torch.export: the first axis is free in every input that has the batch size there."""
    size = _batch(example_inputs)

    def free(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return {0: torch.export.Dim.DYNAMIC} if _carries(tree, size) else {}
        return _mapped(tree, free)

    args, kwargs = arguments(example_inputs)
    return free(kwargs) if kwargs else free(args)


def enlarged(example_inputs: Any) -> Any:
    """The inputs with their first sample once more at the end of the batch."""
    size = _batch(example_inputs)

    def longer(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return torch.cat([tree, tree[:1]]) if _carries(tree, size) else tree
        return _mapped(tree, longer)

    return longer(example_inputs)


def _carries(tensor: Tensor, size: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size


def _mapped(tree: Any, rule: Any) -> Any:
    """The rule applied inside tuples, lists and mappings; None for anything else that is no tensor."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(rule(item) for item in tree)
    if hasattr(tree, "items"):
        return {key: rule(item) for key, item in tree.items()}
    return tree
