"""An order of the input channels under which an N:M pattern keeps more (RIA, Zhang et al. 2024, ICLR, section 4.2).

A pattern that meets all important channels in one group must remove some of them. Dealt out over the groups they stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Pattern
from ..core.errors import MissingExtraError, OptionError

__all__ = ["channel_order"]

# Differences that are held at a time: 64 MiB in float32.
_CHUNK = 2**24


def channel_order(scores: Tensor, pattern: Pattern, *, refine: bool = False) -> Tensor:
    """A permutation of the columns, int64 [columns]: `scores[:, order]` are those in the new order.

    Choose a mask there and bring it back: `n_of_m(scores[:, order], …)[:, order.argsort()]`. Columns are sorted by the
    sum of their scores and dealt to the M slots of the groups to and fro (the odd slots from the last group to the
    first). The refinement goes through the slots once; each time it takes the slot's channels out and hands them back,
    one a group, so that the sum of the scores that the pattern keeps is largest: it never falls.

    Args:
        scores: [rows, columns], at least 0.
        pattern: N:M.
        refine: whether to refine, with scipy; rows·(columns/M)² operations a slot.

    Raises:
        OptionError: scores that are no matrix, not finite or negative, or that M does not divide.
        MissingExtraError: scipy is not installed, and `refine`.

    >>> channel_order(torch.tensor([[9.0, 8.0, 2.0, 1.0]]), Pattern(1, 2)).tolist()
    [0, 3, 1, 2]
    """
    _check(scores, pattern)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    ranked = wide.double().sum(0).argsort(descending=True, stable=True)
    slots = ranked.view(pattern.of, -1)
    slots = torch.stack([slot.flip(0) if number % 2 else slot for number, slot in enumerate(slots)])
    if refine:
        slots = _refined(wide, slots, pattern)
    return slots.T.flatten()


def _refined(scores: Tensor, slots: Tensor, pattern: Pattern) -> Tensor:
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("scipy", "demo") from error
    for number in range(pattern.of):
        others = torch.cat([slots[:number], slots[number + 1 :]])
        # What a newcomer must beat to be kept, and loses by being kept: [rows, groups].
        bar = scores[:, others].topk(pattern.keep, dim=1).values[:, -1]
        gains = _gains(scores[:, slots[number]], bar)
        _, chosen = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
        slots[number] = slots[number][torch.as_tensor(chosen, device=slots.device)]
    return slots


def _gains(newcomers: Tensor, bar: Tensor) -> Tensor:
    """By how much the sum that is kept grows where a channel joins a group: float64 [groups, channels]."""
    rows, channels = newcomers.shape
    pieces = bar.T.split(max(_CHUNK // max(rows * channels, 1), 1))
    return torch.cat([(newcomers - piece[:, :, None]).clamp(min=0).sum(1, dtype=torch.float64) for piece in pieces])


def _check(scores: Tensor, pattern: Pattern) -> None:
    if scores.dim() != 2 or scores.shape[1] % pattern.of:
        raise OptionError(
            f"{pattern} needs scores [rows, columns] with a number of columns that {pattern.of} divides; got "
            f"{list(scores.shape)}."
        )
    if not bool((scores.isfinite() & (scores >= 0)).all()):
        raise OptionError(
            "the scores of a channel order must be finite and at least 0; mend the model or the criterion."
        )
