"""A train-time pruner inside a training loop that another library runs: what Lightning and the Trainer share.

Everything hangs on the optimizer: the pruner steps in a hook after each optimizer step that was really taken, so
gradient accumulation and steps skipped by a gradient scaler are counted right whoever writes the loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import OptionError

__all__ = ["Attached", "Build", "TrainPruner", "untouched"]


class Due(Protocol):
    """When masks change."""

    def due(self, step: int) -> bool:
        """Whether they change after so many optimizer steps."""


class TrainPruner(Protocol):
    """What every pruner of `secateurs.train` offers."""

    @property
    def schedule(self) -> Due:
        """When masks change."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def sparsity(self) -> float:
        """The share removed now."""

    def step(self) -> None:
        """None; see `Pruner.step`."""

    def finalize(self) -> dict[str, Tensor]:
        """The final masks; see `Pruner.finalize`."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; the pruner goes on from `state`."""


Build = Callable[[Any, Optimizer], Any]


class Attached:
    """A pruner that is stepped after every step of an optimizer until `finalize`.

    Args:
        build: from (model, optimizer) to the pruner.
        model: pruned in place.
        optimizer: the one that trains it; a wrapper of Accelerate or Lightning is taken off.
        state: of `state_dict`, to go on from. The weights of the model, and the state of the optimizer if it has one,
            are then those of the checkpoint already: they are kept as they are while the pruner is built.

    Attributes:
        pruner: what `build` made.

    Raises:
        OptionError: parameters that are shards, and whatever `build` refuses.
        PlanError: the state is of another pruner.
    """

    def __init__(
        self, build: Build, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any] | None = None
    ) -> None:
        inner = _unwrapped(optimizer)
        _refuse_shards(model)
        self._last: dict[str, Any] | None = None
        self._sparsity: float | None = None
        # Before the hooks of the pruner, which is why it cannot wait until there is one.
        self._hooks = [inner.register_step_pre_hook(_closure_first)]
        try:
            self.pruner: TrainPruner = build(model, inner) if state is None else _resumed(build, model, inner, state)
        except Exception:
            self._detach()
            raise
        self._hooks.append(inner.register_step_post_hook(self._after))

    @property
    def sparsity(self) -> float:
        """The share removed now; counted anew only where the schedule says that it may have changed."""
        if self._sparsity is None:
            self._sparsity = self.pruner.sparsity
        return self._sparsity

    @property
    def finalized(self) -> bool:
        """Whether the training is over."""
        return self._last is not None

    def state_dict(self) -> dict[str, Any]:
        """The state of the pruner; once finalized, the last that it had before, so that training may go on from it."""
        return self.pruner.state_dict() if self._last is None else self._last

    def finalize(self) -> None:
        """None; the masks are in the weights for good and no hook is left. A second call does nothing."""
        if self._last is None:
            self._last = self.pruner.state_dict()
            self._detach()
            self.pruner.finalize()
            self._sparsity = None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = self.pruner.steps
        self.pruner.step()
        if any(self.pruner.schedule.due(step) for step in range(before + 1, self.pruner.steps + 1)):
            self._sparsity = None

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside what Accelerate and Lightning put round it."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise OptionError(f"a pruner needs an optimizer of torch, got a {type(optimizer).__name__}.")
        optimizer = inner
    return optimizer


def _refuse_shards(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        # DTensor of FSDP2 and tensor parallelism, FlatParameter of FSDP1, ZeRO-3 of DeepSpeed.
        kinds = {kind.__name__ for kind in type(parameter).__mro__} | {type(parameter.data).__name__}
        if kinds & {"DTensor", "FlatParameter"} or hasattr(parameter, "ds_id"):
            raise OptionError(
                f"{name} is only a shard of a parameter (FSDP, DeepSpeed or tensor parallelism), and masks need whole "
                "ones: train on one device or with plain data parallelism (DDP)."
            )


def _closure_first(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a step without its closure, which has been run: hooks then see gradients before the step.

    Lightning hands forward and backward pass to `optimizer.step` as a closure, but for float16 does just this.
    """
    closure = kwargs.get("closure") if len(args) < 2 else args[1]
    if not callable(closure):
        return None
    with torch.enable_grad():
        closure()
    if len(args) > 1:
        return (args[0], None, *args[2:]), kwargs
    return args, {name: value for name, value in kwargs.items() if name != "closure"}


@contextmanager
def untouched(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context after which the tensors are what they were before it, in place; copies wait in host memory."""
    held = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in held:
                tensor.copy_(before)


def _resumed(build: Build, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> TrainPruner:
    """A pruner that goes on from `state`, whose building has changed neither weights nor optimizer nor random state."""
    slots = [value for kinds in optimizer.state.values() for value in kinds.values() if isinstance(value, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *slots]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with untouched(tensors), torch.random.fork_rng(devices):
        pruner: TrainPruner = build(model, optimizer)
    try:
        pruner.load_state_dict(state)
    except Exception:
        # No hook stays of a pruner that nobody gets to hold; it has no training to warn about.
        with untouched(tensors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner.finalize()
        raise
    return pruner
