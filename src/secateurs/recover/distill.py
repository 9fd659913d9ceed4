"""Knowledge distillation: the unpruned model teaches the pruned one, by its outputs and by its hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.batch import leaves, main_output
from ..core.errors import ModelError, OptionError
from ..solvers.blocks import blocks_of

__all__ = ["Distillation", "distillation_loss", "hidden_states", "shared_blocks", "squarehead", "token_loss"]

# The label that Hugging Face's collators and PyTorch's cross-entropy ignore.
_IGNORED = -100
# The spacing of bfloat16 at 1.
_EPSILON = 2.0**-7


@dataclass(frozen=True)
class Distillation:
    """How much to listen to the teacher.

    Args:
        temperature: softens both distributions; 4 (Hinton et al., arXiv 1503.02531, use 1 to 20).
        alpha: weight of the teacher's term in [0, 1], the labels get the rest; 0.9. With 1 no labels are needed.
        tokens: weight of `token_loss` over the blocks of both models, beside these two; 0 for none.
        hidden: weight of `squarehead` over them; 0 for none.

    Raises:
        OptionError: a temperature that is not positive, alpha outside [0, 1], or a negative weight of another term.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    tokens: float = 0.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.alpha <= 1:
            raise OptionError(
                f"temperature must be positive and alpha in [0, 1], got {self.temperature} and {self.alpha}."
            )
        if not 0 <= self.tokens < float("inf"):
            raise OptionError(f"the weight of the token loss must be a number of at least 0, got {self.tokens}.")
        if not 0 <= self.hidden < float("inf"):
            raise OptionError(f"the weight of hidden states must be a number of at least 0, got {self.hidden}.")


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


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over layers of `mean((s - t)²) / (mean(t²) + ε)`, ε = 2⁻⁷ (Kurtic et al., arXiv 2310.06927; ε as AST's).

    Args:
        student, teacher: hidden states, layer by layer and of equal shapes; no gradient flows into the teacher's.

    Raises:
        OptionError: the two differ in number or shape, or there are none.
    """
    shapes = [[list(state.shape) for state in states] for states in (student, teacher)]
    if shapes[0] != shapes[1] or not student:
        raise OptionError(f"hidden states of student and teacher must agree, got {shapes[0]} and {shapes[1]}.")
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs.detach().float()
        terms.append((ours.float() - wanted).square().mean() / (wanted.square().mean() + _EPSILON))
    return torch.stack(terms).sum()


def _class_axis(logits: Tensor, target: Tensor | None) -> int:
    """The axis of the classes: 1 where the target has the shape of all others, as in segmentation, else the last."""
    if target is None or logits.dim() <= 2 or logits.shape[:-1] == target.shape:
        return -1
    return 1 if logits[:, 0].shape == target.shape else -1


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], seen: Tensor | None = None) -> Tensor:
    """The mean over layers and tokens of ‖h_student - h_teacher‖² (ZipLM, arXiv 2302.04089, token distillation).

    Nothing is projected: pruning leaves the width of the residual stream as it is.

    Args:
        student, teacher: hidden states [samples, tokens, width] at equal depths, one a layer; no gradient flows into
            the teacher's.
        seen: bool [samples, tokens], False for padding, which does not count; None where all tokens do.

    Raises:
        OptionError: their numbers or shapes differ.
    """
    if not student or [h.shape for h in student] != [h.shape for h in teacher]:
        raise OptionError(
            f"hidden states must agree: the student has {[list(h.shape) for h in student]}, the teacher "
            f"{[list(h.shape) for h in teacher]}."
        )
    losses = []
    for learnt, guide in zip(student, teacher, strict=True):
        errors = (learnt.float() - guide.detach().float()).square().sum(-1)
        if seen is not None and seen.shape == errors.shape:
            errors = errors[seen.to(errors.device)]
        losses.append(errors.sum() / max(errors.numel(), 1))
    return torch.stack(losses).mean()


def shared_blocks(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The names of the blocks that both models have, in order.

    Raises:
        ModelError: there is none.
    """
    names = [name for name in blocks_of(teacher) if name in dict(student.named_modules())]
    if names in ([], [""]):
        raise ModelError(
            f"tokens are compared at the ends of blocks, and {type(student).__name__} has no list of blocks in common "
            "with its teacher: leave tokens= at 0."
        )
    return names


@contextmanager
def hidden_states(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Inside, a list that each call of the modules called `names` extends by what it returns first."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _given: Any, output: Any) -> None:
        found.extend(leaf for leaf in [next(leaves(output), None)] if leaf is not None)

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(note).remove)
        yield found
