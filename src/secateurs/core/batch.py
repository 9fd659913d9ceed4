"""What a batch is: the one place that knows how to feed a model and how to take its loss.

A batch is a tensor (inputs), a tuple or list `(inputs, target)`, or a dict of keyword arguments as Hugging Face
collators make them. Example inputs are a tensor, a tuple of positional arguments or a dict of keyword arguments.
A `Call` is both: all that one call of a module was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .errors import DataError, ModelError, SecateursError

__all__ = [
    "Call",
    "Loss",
    "call",
    "check_batches",
    "default_loss",
    "device_of",
    "double",
    "leaves",
    "main_output",
    "move",
    "run",
    "split",
    "take",
]

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of a module, as recorded: positional ones and keywords."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` called on example inputs: a tensor, a tuple of positional arguments, keywords or a `Call`."""
    if isinstance(inputs, Call):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, dict) or (hasattr(inputs, "keys") and hasattr(inputs, "__getitem__")):
        return model(**dict(inputs))
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def run(model: nn.Module, inputs: Any) -> Any:
    """`call(model, inputs)`; what the model's code raises becomes a sentence.

    Raises:
        ModelError: the forward pass fails; the message has the shapes given, the cause is chained.
    """
    try:
        return call(model, inputs)
    except SecateursError:
        raise
    except Exception as error:
        # The forward pass is the user's code, which may raise anything.
        shapes = ", ".join(str(tuple(t.shape)) for t in leaves(inputs))
        advice = (
            "Give inputs with which model(inputs) runs."
            if shapes
            else ("Give tensors; of text a tokenizer makes them, with return_tensors='pt'.")
        )
        raise ModelError(
            f"{type(model).__name__} fails on the inputs given (shapes: {shapes or 'no tensor'}): "
            f"{str(error).rstrip('. ')}. {advice}"
        ) from error


def split(batch: Any) -> tuple[Any, Any]:
    """`(inputs, target)` of a batch; target is None where the batch has none, or carries it among its keywords."""
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
        return tuple(batch[:-1]), batch[-1]
    if hasattr(batch, "keys"):
        return dict(batch), None
    return batch, None


def default_loss(output: Any, target: Any) -> Tensor:
    """The output's own `.loss` if it has one, else cross-entropy for integer targets, mean squared error for others.

    Classes are the last axis where the other axes are those of the target (tokens), else axis 1 (pixels).

    Raises:
        DataError: there is neither a loss in the output nor a target, or a label is no class.
    """
    own = getattr(output, "loss", None)
    if own is None and isinstance(output, dict):
        own = output.get("loss")
    if isinstance(own, Tensor):
        return own
    if target is None:
        raise DataError("the loss needs labels: give batches as (inputs, target), or with `labels`, or pass loss=.")
    logits = main_output(output)
    if target.is_floating_point():
        return F.mse_loss(logits, target)
    if logits.dim() <= 2 or logits.shape[:-1] == target.shape:
        logits, target = logits.reshape(-1, logits.shape[-1]), target.flatten()
    try:
        return F.cross_entropy(logits, target)
    except IndexError as error:
        raise DataError(f"a label is none of the model's {logits.shape[1]} classes: {error}") from error


def main_output(output: Any) -> Tensor:
    """The tensor that matters in a model's output: `.logits`, else the first floating-point tensor inside."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for leaf in leaves(output):
        if leaf.is_floating_point():
            return leaf
    raise DataError("the model's output contains no floating-point tensor.")


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors inside nested tuples, lists, mappings and output dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif hasattr(tree, "items"):
        for _, value in tree.items():
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from leaves(value)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from leaves(getattr(tree, field.name))
    elif hasattr(tree, "__dict__"):
        for value in vars(tree).values():
            if isinstance(value, (Tensor, tuple, list, dict)) or is_dataclass(value):
                yield from leaves(value)


def move(tree: Any, device: torch.device | str) -> Any:
    """`tree` with every tensor inside tuples, lists, mappings and calls moved to `device`."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Call):
        return Call(move(tree.args, device), move(tree.kwargs, device))
    if isinstance(tree, tuple):
        moved = tuple(move(v, device) for v in tree)
        return type(tree)(*moved) if hasattr(tree, "_fields") else moved
    if isinstance(tree, list):
        return [move(v, device) for v in tree]
    if hasattr(tree, "items"):
        return {k: move(v, device) for k, v in tree.items()}
    return tree


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def double(tensor: Tensor) -> Tensor:
    """`tensor` in float64; moved to the CPU where its device has no such type."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def check_batches(data: Iterable[Any] | None, what: str = "calibration data") -> None:
    """Refuse what is often given in the place of an iterable of batches; None passes.

    Raises:
        DataError: one batch, a data set of single samples, or nothing that can be gone through.
    """
    found = type(data).__name__
    if isinstance(data, (Tensor, Mapping)) or hasattr(data, "keys"):
        raise DataError(f"the {what} must be an iterable of batches, got one {found}; put a single batch in a list.")
    if isinstance(data, Dataset) and not isinstance(data, Iterable):
        raise DataError(f"the {what} must be batches, got the single samples of a {found}; use a DataLoader.")
    if not (data is None or isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise DataError(f"the {what} must be an iterable of batches, got {data!r}.")


def take(data: Iterable[Any] | None, limit: int | None = None, what: str = "calibration data") -> list[Any]:
    """The first `limit` batches of `data` as a list.

    Raises:
        DataError: there is no data, or it is empty, or holds no batches.
    """
    if data is None:
        raise DataError(f"this needs {what}: pass data=, an iterable of batches.")
    check_batches(data, what)
    batches = list(islice(data, limit))
    if not batches:
        raise DataError(f"the {what} is empty: at least one batch is needed.")
    return batches
