"""Batch-norm statistics for the weights that a pruned model has now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import call, device_of, move, split, take
from .context import modes_kept

__all__ = ["recalibrate_batch_norm"]


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, data: Iterable[Any], *, batches: int | None = None, by_size: bool = False
) -> int:
    """The number of batch norms whose running mean and variance were replaced by their average over `data`.

    Every batch counts alike, or by its size (a cumulative average, not an exponential one). Only these statistics
    change: weights, momentum and training flags are as before, dropout is off meanwhile, and an error in a forward pass
    leaves the old statistics. A model without batch norm with running statistics returns 0, and its data is not read.

    Args:
        model: changed in place.
        data: batches as in `core.batch`; labels are not needed.
        batches: at most this many; None for all.
        by_size: a batch counts by its number of samples, so that a smaller last one distorts nothing.

    Raises:
        DataError: there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    chosen = take(data, batches)
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        with modes_kept(model), ExitStack() as hooks:
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
                if by_size:
                    hooks.callback(norm.register_forward_pre_hook(_weigher(norm)).remove)
            for batch in chosen:
                call(model, move(split(batch)[0], device_of(model)))
    except BaseException:
        # Also where a person stops it: statistics of half the data are neither the old nor the new ones.
        for norm, buffers in zip(norms, before, strict=True):
            _restore(norm, buffers)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)


def _weigher(norm: nn.modules.batchnorm._BatchNorm) -> Callable[[nn.Module, Any], None]:
    seen = 0

    def weigh(_: nn.Module, args: Any) -> None:
        nonlocal seen
        seen += len(args[0])
        norm.momentum = len(args[0]) / seen

    return weigh


def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in norm.named_buffers():
        buffer.copy_(buffers[name])
