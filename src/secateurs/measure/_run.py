"""Running a model to measure it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import call, leaves, move
from ..core.errors import DataError, ModelError

__all__ = ["batches", "evaluating", "forward", "slow_attention", "watched"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the training flag of every module is put back afterwards, also after an error."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def forward(model: nn.Module, inputs: Any) -> Any:
    """The model's output for example inputs, which move to the model's device first if it has tensors of its own.

    Raises:
        ModelError: the forward pass fails; the message has the shapes given, the cause is chained.
    """
    try:
        placed = next(chain(model.parameters(), model.buffers()), None)
        return call(model, inputs if placed is None else move(inputs, placed.device))
    except Exception as error:
        # The forward pass is the user's code, which may raise anything.
        shapes = ", ".join(str(tuple(t.shape)) for t in leaves(inputs)) or "no tensor"
        raise ModelError(
            f"{type(model).__name__} fails on the inputs given (shapes: {shapes}): {str(error).rstrip('. ')}. "
            "Give inputs with which model(inputs) runs."
        ) from error


def batches(data: Iterable[Any] | None, what: str) -> Iterator[Any]:
    """The batches of `data` one by one; `what` names the data in errors.

    Raises:
        DataError: `data` is None, is itself one batch (a tensor or a mapping), or has no batch.
    """
    if data is None or isinstance(data, (Tensor, Mapping)) or hasattr(data, "keys"):
        given = "None" if data is None else f"one {type(data).__name__}"
        raise DataError(f"the {what} must be an iterable of batches, got {given}; put a single batch in a list.")
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise DataError(f"the {what} is empty: at least one batch is needed.")


@contextmanager
def watched(
    model: nn.Module,
    enter: Callable[[str, nn.Module], None] | None = None,
    leave: Callable[[str, nn.Module, Any], None] | None = None,
) -> Iterator[None]:
    """Hooks inside: `enter(name, module)` before and `leave(name, module, output)` after each module's forward.

    Names are qualified, "" is the model itself; a module with several names has its first. `leave` is called with
    None where the forward raises.
    """
    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            if enter is not None:
                handles.append(module.register_forward_pre_hook(_before(enter, name), prepend=True))
            if leave is not None:
                handles.append(module.register_forward_hook(_after(leave, name), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(enter: Callable[[str, nn.Module], None], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        enter(name, module)

    return hook


def _after(leave: Callable[[str, nn.Module, Any], None], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        leave(name, module, output)

    return hook


@contextmanager
def slow_attention() -> Iterator[None]:
    """Without PyTorch's fused encoder layer, which hides its products from hooks and from dispatch modes."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
