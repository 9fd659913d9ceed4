"""Running a model to measure it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import check_batches, move, run
from ..core.errors import DataError

__all__ = ["batches", "evaluating", "forward", "slow_attention", "watched"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags and buffers are put back afterwards, also after an error.

    Some models write to their buffers in evaluation mode, too.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, b, b.detach().clone()) for module, name, b in _own_buffers(model)]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer if buffer.is_inference() else buffer.copy_(value)


def _own_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        yield from ((module, name, b) for name, b in module._buffers.items() if b is not None)


def forward(model: nn.Module, inputs: Any) -> Any:
    """The model's output for example inputs, which move to the model's device first if it has tensors of its own.

    Raises:
        ModelError: the forward pass fails; the message has the shapes given, the cause is chained.
    """
    placed = next(chain(model.parameters(), model.buffers()), None)
    return run(model, inputs if placed is None else move(inputs, placed.device))


def batches(data: Iterable[Any] | None, what: str) -> Iterator[Any]:
    """The batches of `data` one by one; `what` names the data in errors.

    Raises:
        DataError: `data` is None, is itself one batch (a tensor or a mapping), or has no batch.
    """
    if data is None:
        raise DataError(f"the {what} must be an iterable of batches, got None; put a single batch in a list.")
    check_batches(data, what)
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
