"""A module trained to give again the outputs it gave before it was pruned, on recorded inputs and without a task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..core.batch import call, device_of, main_output, move
from ..core.errors import DataError, ModelError, OptionError
from .context import modes_kept
from .schedules import Rate, get_rate
from .trainable import only_trained

__all__ = ["reconstruct"]


def reconstruct(
    block: nn.Module,
    calls: Sequence[Any],
    targets: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    train: str | Sequence[str] = ("biases", "norms", "adapters"),
    weight_decay: float = 0.0,
    schedule: str | Rate = "linear-warmup",
    autocast: torch.dtype | None = None,
) -> tuple[float, float]:
    """The mean squared error of the block's output to `targets` before and after the block, in place, is trained on it.

    PERP's reconstruction (arXiv 2312.15230): AdamW, one batch a step, in the given order and round again. The block may
    be one layer, half a block, a block or several; adapters that it carries are not merged. It runs in evaluation mode,
    without dropout and with the running statistics that it has, and its flags are afterwards as before.

    Args:
        block: any module; a tuple that it returns counts by its first floating-point tensor.
        calls: its inputs, batches as in `core.batch`; moved to the block's device one at a time.
        targets: the output wanted for each of them, as `main_output` gives it.
        steps: optimizer steps; a multiple of the number of batches uses all alike.
        lr: initial rate (5e-4 in the code's debug preset; tune it).
        train: what of the block trains, see `trainable_parameters`; PERP takes all but the head, which is in no block.
        weight_decay: 0, the code.
        schedule: "linear-warmup", the code, or another; see `fine_tune`.
        autocast: dtype of mixed precision, such as torch.bfloat16; the error is in float32 all the same.

    Raises:
        OptionError: steps below 1, a rate that is not positive, or an unknown selector.
        DataError: no call, or another number or shape of targets.
        ModelError: nothing to train, or an output or error that is not finite; then the block is as it was.
    """
    if steps < 1 or not 0 < lr < math.inf:
        raise OptionError(f"steps must be 1 or more and lr positive, got {steps} and {lr}.")
    if not calls or len(calls) != len(targets):
        raise DataError(f"each call needs one target, and there must be one; got {len(calls)} and {len(targets)}.")
    rate = get_rate(schedule)

    def error(batch: Any, target: Tensor) -> Tensor:
        return _squared_error(block, batch, target, autocast)

    pairs = list(zip(calls, targets, strict=True))
    with (
        modes_kept(block),
        only_trained(block, train) as chosen,
        _undone_on_error(list(chosen.values())),
    ):
        block.eval()
        before = _mean(error, pairs)
        optimizer = AdamW(chosen.values(), lr=lr, weight_decay=weight_decay)
        for step, (batch, target) in enumerate(islice(cycle(pairs), steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step / steps)
            optimizer.zero_grad()
            (error(batch, target) / target.numel()).backward()
            optimizer.step()
        optimizer.zero_grad()
        return before, _mean(error, pairs)


def _squared_error(block: nn.Module, batch: Any, target: Tensor, autocast: torch.dtype | None) -> Tensor:
    """Σ (output - target)², in float32 or wider."""
    device = device_of(block)
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        output = main_output(call(block, move(batch, device)))
    if output.shape != target.shape:
        raise DataError(f"the block gives {list(output.shape)} where the target is {list(target.shape)}.")
    wide = torch.promote_types(output.dtype, torch.float32)
    found = (output.to(wide) - target.to(device, wide)).square().sum()
    if not bool(found.isfinite()):
        raise ModelError(
            "the block's output or its error is not finite: look at the recorded inputs and targets, or lower lr."
        )
    return found


@torch.no_grad()
def _mean(error: Any, pairs: Sequence[tuple[Any, Tensor]]) -> float:
    return sum(float(error(batch, target)) for batch, target in pairs) / sum(target.numel() for _, target in pairs)


@contextmanager
def _undone_on_error(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        raise
