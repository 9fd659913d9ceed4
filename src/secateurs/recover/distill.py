"""Knowledge distillation: the unpruned model teaches the pruned one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.batch import main_output
from ..core.errors import OptionError

__all__ = ["Distillation", "distillation_loss"]

# The label that Hugging Face's collators and PyTorch's cross-entropy ignore.
_IGNORED = -100


@dataclass(frozen=True)
class Distillation:
    """How much to listen to the teacher.

    Args:
        temperature: softens both distributions; 4 (Hinton et al., arXiv 1503.02531, use 1 to 20).
        alpha: weight of the teacher's term in [0, 1], the labels get the rest; 0.9. With 1 no labels are needed.

    Raises:
        OptionError: a temperature that is not positive, or alpha outside [0, 1].
    """

    temperature: float = 4.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.alpha <= 1:
            raise OptionError(
                f"temperature must be positive and alpha in [0, 1], got {self.temperature} and {self.alpha}."
            )


def distillation_loss(student: Any, teacher: Any, temperature: float = 4.0, target: Tensor | None = None) -> Tensor:
    """`T² · KL(softmax(teacher/T) ‖ softmax(student/T))`, the mean over all rows of logits (Hinton et al., section 2).

    Args:
        student: output of the model that learns: logits [..., classes], or anything `main_output` understands. With
            more than two axes each token counts alike. Logits [batch, classes, ...] are known by their target's shape.
        teacher: output of the teacher for the same inputs; no gradient flows into it.
        temperature: T. The factor T² keeps the gradient's size when T changes.
        target: labels of the logits' leading shape; rows with label -100 (padding) are left out.

    Raises:
        OptionError: the two outputs differ in shape.
    """
    logits, guide = main_output(student), main_output(teacher).detach()
    if logits.shape != guide.shape:
        raise OptionError(
            f"the student's output has shape {list(logits.shape)}, the teacher's {list(guide.shape)}; they must agree."
        )
    classes = _class_axis(logits, target)
    log_p = F.log_softmax(logits.float() / temperature, classes)
    log_q = F.log_softmax(guide.float() / temperature, classes)
    rows = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(classes)
    if target is not None and target.shape == rows.shape and not target.is_floating_point():
        counted = target != _IGNORED
        return temperature**2 * torch.where(counted, rows, 0).sum() / counted.sum().clamp(min=1)
    return temperature**2 * rows.mean()


def _class_axis(logits: Tensor, target: Tensor | None) -> int:
    """The axis of the classes: 1 where the target has the shape of all others, as in segmentation, else the last."""
    if target is None or logits.dim() <= 2 or logits.shape[:-1] == target.shape:
        return -1
    return 1 if logits[:, 0].shape == target.shape else -1
