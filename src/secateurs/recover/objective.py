"""What is minimised: the task's loss, label smoothing, and a teacher's term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.batch import Loss, call, default_loss, device_of, main_output, split
from ..core.errors import DataError
from ..solvers.layerwise import seen_of
from .distill import (
    Distillation,
    distillation_loss,
    hidden_states,
    shared_blocks,
    squarehead,
    token_loss,
)

__all__ = ["training_objective"]


def training_objective(
    model: nn.Module,
    loss: Loss | None,
    label_smoothing: float,
    teacher: nn.Module | None,
    how: Distillation,
    autocast: torch.dtype | None,
) -> Callable[[Any], Tensor]:
    """The function `batch -> scalar` that training minimises.

    Args:
        model: called on the batch's inputs.
        loss: `(output, target) -> scalar`; None: as `core.batch.default_loss` chooses.
        label_smoothing: of the cross-entropy; 0 for none.
        teacher: adds `alpha` times its distillation term, and the task's loss counts `1 - alpha`; None for none.
        how: temperature, alpha, and the weights of hidden states.
        autocast: dtype of mixed precision, or None.
    """
    task = loss or (_smoothed(label_smoothing) if label_smoothing else default_loss)
    blocks = shared_blocks(model, teacher) if teacher is not None and (how.tokens or how.hidden) else []

    def objective(batch: Any) -> Tensor:
        inputs, target = split(batch)
        with torch.autocast(device_of(model).type, autocast) if autocast else nullcontext():
            with hidden_states(model, blocks) as learnt:
                output = call(model, inputs)
            if teacher is None:
                return task(output, target)
            with torch.no_grad(), hidden_states(teacher, blocks) as guides:
                guide = call(teacher, inputs)
            labels = target if isinstance(target, Tensor) else _labels(inputs)
            taught = distillation_loss(output, guide, how.temperature, labels)
            # With alpha 1 no labels are needed, so the task's loss is not asked for.
            total = taught if how.alpha == 1 else how.alpha * taught + (1 - how.alpha) * task(output, target)
            if how.tokens:
                total = total + how.tokens * token_loss(learnt, guides, seen_of([batch])[0])
            return total + how.hidden * squarehead(learnt, guides) if how.hidden else total

    return objective


def _labels(inputs: Any) -> Tensor | None:
    found = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _smoothed(amount: float) -> Loss:
    def loss(output: Any, target: Any) -> Tensor:
        if not isinstance(target, Tensor) or target.is_floating_point():
            raise DataError("label smoothing needs batches as (inputs, target) with integer targets.")
        logits = main_output(output)
        if logits.dim() <= 2 or logits.shape[:-1] == target.shape:
            logits, target = logits.reshape(-1, logits.shape[-1]), target.flatten()
        return F.cross_entropy(logits, target, label_smoothing=amount)

    return loss
