"""DSnoT: a mask made better by swaps that bring the expected output back (Zhang et al. 2024, arXiv 2310.08915).

A row that lost the weights P is off by r = Σ_P w_j·E[x_j] on average. A swap grows a removed weight whose effect
w_j·E[x_j] has the sign of r and prunes a kept one of the opposite effect: both bring r nearer to 0. As r may not change
its sign, neither list changes on the way: the best to grow and the best to prune are sorted once, and the swaps that a
loop would make one after the other are the first few pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Pattern
from ..core.errors import ModelError, OptionError
from ..core.finite import all_finite
from .problem import check_mask

__all__ = ["dsnot"]


def dsnot(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    pattern: Pattern | None = None,
    cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    where: str = "the layer",
) -> Tensor:
    """A mask with as many weights in each row, and in each group of a pattern, and a smaller expected error.

    Grown is the weight with the largest |w_j·E[x_j]|/Var[x_j]^power, pruned the one with the smallest |w_j|·‖x_j‖. Of a
    pattern both come from one group, so that it holds after each swap, and the group is that of the best weight to
    grow that still has a partner. Equal values: the earlier column.

    Args:
        weight: [rows, columns], the dense one.
        mask: bool [rows, columns], what stays so far.
        mean, variance, norm: [columns], of the inputs over all observations.
        pattern: what the mask obeys; None where a swap may join any two columns of a row.
        cycles: swaps a row at most, 50 (the released code's, as are the next two).
        threshold: a row whose |r| is not above this is left alone, 0.1; in the units of the output.
        power: of the variance, 1.
        where: the layer, for messages.

    Raises:
        OptionError: sizes that do not fit, or a mask that breaks the pattern's length.
        ModelError: NaN or infinite entries, or a negative variance.

    >>> ones = torch.ones(4)
    >>> kept = torch.tensor([[False, False, True, True]])
    >>> dsnot(torch.tensor([[2.0, 3.0, -1.0, 1.0]]), kept, ones, ones, ones).tolist()
    [[False, True, False, True]]
    """
    _check(weight, mask, (mean, variance, norm), pattern, where)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    mean, variance, norm = (v.to(wide) for v in (mean, variance, norm))
    effect = wide * mean
    error = effect.masked_fill(mask, 0).sum(1, keepdim=True)
    helps = effect * error.sign()
    never = torch.full_like(effect, torch.inf)
    gain = torch.where(~mask & (helps > 0), helps / variance.pow(power), -never)
    price = torch.where(mask & (helps < 0), wide.abs() * norm, never)
    grown, pruned, gains = _pairs(gain, price, weight.shape[1] if pattern is None else pattern.of, cycles)
    moved = effect.gather(1, grown) - effect.gather(1, pruned)
    after = error - moved.cumsum(1)
    before = after + moved
    fine = (gains > -torch.inf) & (before.abs() > threshold) & (after.sign() == error.sign())
    made = fine.to(torch.uint8).cumprod(1).bool()
    swaps = torch.zeros_like(mask).scatter(1, grown, made) | torch.zeros_like(mask).scatter(1, pruned, made)
    return mask ^ swaps


def _pairs(gain: Tensor, price: Tensor, of: int, cycles: int) -> tuple[Tensor, Tensor, Tensor]:
    """The columns to grow and to prune, in the order of the swaps, and the gains; -inf for a pair that is none.

    Inside a group the best to grow meets the cheapest to prune, the second best the second cheapest, and so on; the
    pairs of a row then follow one another by gain. Each is [rows, pairs].
    """
    rows, columns = gain.shape
    best = gain.view(-1, of).sort(dim=1, descending=True, stable=True)
    cheapest = price.view(-1, of).sort(dim=1, stable=True)
    deep = min(of, cycles)
    whole = cheapest.values[:, :deep] < torch.inf
    gains = best.values[:, :deep].masked_fill(~whole, -torch.inf).reshape(rows, -1)
    offset = torch.arange(0, columns, of, device=gain.device).repeat_interleave(deep)
    order = gains.sort(dim=1, descending=True, stable=True)
    chosen = order.indices[:, :cycles]
    grown, pruned = (
        (found.indices[:, :deep].reshape(rows, -1) + offset).gather(1, chosen) for found in (best, cheapest)
    )
    return grown, pruned, order.values[:, :cycles]


def _check(weight: Tensor, mask: Tensor, inputs: tuple[Tensor, ...], pattern: Pattern | None, where: str) -> None:
    if weight.dim() != 2:
        raise OptionError(f"a weight is [rows, columns]; {where} got {list(weight.shape)}.")
    check_mask(weight, mask, where)
    if any(values.shape != weight.shape[1:] for values in inputs):
        shapes = ", ".join(str(list(values.shape)) for values in inputs)
        raise OptionError(f"mean, variance and norm must be [{weight.shape[1]}], as {where} has inputs; got {shapes}.")
    if pattern is not None and weight.shape[1] % pattern.of:
        raise OptionError(
            f"{pattern} needs a number of inputs that {pattern.of} divides; {where} has {weight.shape[1]}: leave it "
            "out with ignore=."
        )
    if not all_finite(weight) or not all(all_finite(values) for values in inputs):
        raise ModelError(
            f"NaN or infinite values in the weight or the inputs of {where}: look at the model and the data."
        )
    if bool((inputs[1] < 0).any()):
        raise ModelError(f"a variance of the inputs of {where} is negative: accumulate it in float32 or float64.")
