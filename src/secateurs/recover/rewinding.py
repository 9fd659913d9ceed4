"""Going back: to the weights a network once had, or to the learning rates it was once trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..core.errors import OptionError, PlanError
from .schedules import get_rate

__all__ = ["restore", "rewind", "rewound_rate", "snapshot"]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all parameters and persistent buffers, to come back to with `restore` or `rewind`.

    Take it before training for the lottery ticket's initial weights (Frankle & Carbin, arXiv 1803.03635), or a few
    epochs in for late rewinding. To keep it on disk: `core.state.write_state`.
    """
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


@torch.no_grad()
def restore(model: nn.Module, saved: Mapping[str, Tensor], *, buffers: bool = True) -> None:
    """None; parameters, and unless `buffers` is False the persistent buffers, have the values in `saved`.

    Raises:
        PlanError: `saved` misses a name of the model, or has another shape for it; nothing was changed.
    """
    state = model.state_dict()
    wrong = [name for name, value in state.items() if name not in saved or saved[name].shape != value.shape]
    if wrong:
        raise PlanError(
            f"the saved weights are of another model: {', '.join(wrong[:3])} missing or of another shape; for a cut "
            "model, cut the saved one by the same plan first."
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in state.items():
        if buffers or name in parameters:
            value.copy_(saved[name])


@torch.no_grad()
def rewind(
    model: nn.Module, saved: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, *, buffers: bool = True
) -> None:
    """None; the model has its saved weights, zero where `masks` say so: the lottery ticket.

    Args:
        model: changed in place.
        saved: from `snapshot`.
        masks: per parameter a bool mask that broadcasts to it, True stays; None for no masking.
        buffers: also bring back running statistics.

    Raises:
        PlanError: `saved` is of another model.
        OptionError: a mask is of no parameter of the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    strange = [name for name in masks or {} if name not in parameters]
    if strange:
        raise OptionError(f"masks are given for {', '.join(strange[:3])}, which the model does not have.")
    restore(model, saved, buffers=buffers)
    for name, keep in (masks or {}).items():
        parameters[name].masked_fill_(~keep.to(parameters[name].device), 0)


def rewound_rate(rate: str | Callable[[float], float] = "cosine", *, to: float) -> Callable[[float], float]:
    """A learning-rate rule for `fine_tune` that replays the original one from the share `to` of training on.

    Learning-rate rewinding keeps the pruned weights and repeats the end of the training (Renda et al., ICLR 2020,
    arXiv 2003.02389); train for `(1 - to) · epochs`.

    Args:
        rate: the original rule, a name or a function of progress in [0, 1].
        to: where to resume, in [0, 1); 0 repeats all of it.

    Raises:
        OptionError: `to` outside [0, 1), or an unknown rule.

    >>> round(rewound_rate("cosine", to=0.5)(0.0), 9)
    0.5
    """
    if not 0 <= to < 1:
        raise OptionError(f"to must lie in [0, 1), got {to}.")
    rule = get_rate(rate)
    return lambda progress: rule(to + (1 - to) * progress)
