"""Looking at a model without leaving a trace: one context manager for every criterion that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["preserved"]


@contextmanager
def preserved(
    model: nn.Module, *, train: bool = False, differentiate: Iterable[nn.Parameter] | None = None, seed: int = 0
) -> Iterator[None]:
    """Inside, `model` is in eval (or train) mode and random numbers follow `seed`; afterwards all is as it was.

    What is brought back, also when the body raises: training flags, `requires_grad`, the `.grad` objects, buffers, and
    the random state.

    Args:
        model: what to look at.
        train: train mode instead of eval mode.
        differentiate: inside, exactly these parameters require gradients; None leaves the flags alone.
        seed: of the random numbers inside (dropout, noisy routing).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_cuda(model)))
        stack.callback(_Snapshot.of(model).restore)
        _seed(model, seed)
        model.train(train)
        for parameter in model.parameters():
            parameter.grad = None
        if differentiate is not None:
            wanted = {id(p) for p in differentiate}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in wanted)
        yield


@dataclass(frozen=True)
class _Snapshot:
    """The state of a model that forward and backward passes may change."""

    modes: list[tuple[nn.Module, bool]]
    parameters: list[tuple[nn.Parameter, bool, Tensor | None]]
    buffers: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]]

    @classmethod
    def of(cls, model: nn.Module) -> _Snapshot:
        return cls(
            [(m, m.training) for m in model.modules()],
            [(p, p.requires_grad, p.grad) for p in model.parameters()],
            [(m, dict(m._buffers), _copies(m._buffers)) for m in model.modules() if m._buffers],
        )

    def restore(self) -> None:
        for module, training in self.modes:
            module.training = training
        for parameter, requires_grad, grad in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, tensors, copies in self.buffers:
            module._buffers.clear()
            module._buffers.update(tensors)
            _put_back(tensors, copies)


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in buffers.items() if tensor is not None}


@torch.no_grad()
def _put_back(tensors: Mapping[str, Tensor | None], copies: Mapping[str, Tensor]) -> None:
    for name, copy in copies.items():
        tensor = tensors[name]
        # Only where something changed: an expanded buffer cannot be written to, nor could the model have done so.
        if tensor is not None and not torch.equal(tensor, copy):
            tensor.copy_(copy)


def _cuda(model: nn.Module) -> list[int]:
    return sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})


def _seed(model: nn.Module, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for index in _cuda(model):
        torch.cuda.default_generators[index].manual_seed(seed)
