"""How unevenly magnitudes are spread, how many of them that says are needed, and how many go at once.

The PQ index (Diao et al., ICLR 2023, arXiv 2302.05601) is 0 for equal magnitudes and near 1 if a few hold everything.
It is defined for any vector: the weights of a neuron, a layer or a model, or the scores of channels. Of what was
pruned it must not know: an appended zero raises it, so it is taken over what is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import OptionError
from .finite import all_finite

__all__ = ["adaptive_keep", "check_orders", "fewest", "gini_index", "hoyer_index", "pq_bound", "pq_index", "share_keep"]

# Entries that are looked at in float64 at once.
_CHUNK = 2**22
# Products such as 0.9·30 or 4·(1 − I)² lie a rounding error beside the integer that is meant.
_EXACT = 1e-9


def pq_index(values: Tensor, p: float = 0.5, q: float = 1.0, *, keep: Tensor | None = None) -> Tensor:
    """The PQ index `1 − d^(1/q − 1/p)·‖w‖_p / ‖w‖_q` of each vector along the last axis: float64, without that axis.

    Between 0, all magnitudes equal, and `1 − d^(1/q − 1/p)`, one alone not zero; 0 too for a vector of zeros or of no
    entries, for which the formula says nothing.

    Args:
        values: [..., entries], of any real dtype; signs and scale do not matter.
        p, q: orders of the norms, 0 < p < q; the paper's pairs are (0.5, 1) and (1, 2).
        keep: bool [..., entries]; the index is that of the true entries alone, and d their number. None for all.

    Raises:
        OptionError: p or q outside their range, a mask of another shape, NaN or infinite values.

    >>> round(float(pq_index(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, 2)), 7)
    0.0871291
    """
    check_orders(p, q)
    largest = _largest(values, keep)
    sums = [torch.zeros_like(largest) for _ in (p, q)]
    for part in _magnitudes(values, keep):
        scaled = part / largest[..., None]
        sums = [total + scaled.pow(order).sum(-1) for total, order in zip(sums, (p, q), strict=True)]
    size = _sizes(values, keep).double().clamp(min=1)
    low, high = ((total / size).pow(1 / order) for total, order in zip(sums, (p, q), strict=True))
    # Of equal magnitudes rounding may leave a little less than nothing.
    return torch.where(high > 0, 1 - low / high.clamp(min=torch.finfo(torch.float64).tiny), 0.0).clamp(min=0)


def pq_bound(index: Tensor, size: Tensor | int, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> Tensor:
    """The fewest entries that can hold what matters, `d·(1 + η)^(−q/(q−p))·(1 − I)^(pq/(q−p))`: float64, no integers.

    If all but the r largest magnitudes have together at most η times the p-th powers of those r, then r is at least
    this (the paper's theorem).

    Args:
        index: as `pq_index` gives it.
        size: d, the number of entries that it was taken over.
        p, q: orders that it was taken with.
        eta: η, what may be lost against what is kept.

    Raises:
        OptionError: p, q or η outside their range.
    """
    check_orders(p, q)
    if not (0 <= eta < math.inf):
        raise OptionError(f"eta must be a number of at least 0, got {eta}.")
    bound: Tensor = size * (1 + eta) ** (-q / (q - p)) * (1 - index).pow(p * q / (q - p))
    return bound


def fewest(index: Tensor, size: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> Tensor:
    """`pq_bound` as a count: int64, rounded up, at most `size`; arguments and errors as there."""
    bound = pq_bound(index, size, p, q, eta)
    return torch.minimum((bound * (1 - _EXACT)).ceil().long(), size)


def adaptive_keep(
    values: Tensor,
    p: float = 0.5,
    q: float = 1.0,
    *,
    keep: Tensor | None = None,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> Tensor:
    """How many entries of each vector stay after one round of SAP: int64, without the last axis.

    With r = `fewest`, the rule takes `c = ⌊d·min(γ·(1 − r/d), β)⌋` of d entries. For (0.5, 1), η = 0 and γ = 1 the
    share that goes is the index itself.

    Args:
        values, p, q, keep: as for `pq_index`.
        eta: η of the bound (0, the paper).
        gamma: γ, how boldly the bound is followed (1, the paper).
        beta: β in (0, 1), the largest share that goes in a round (0.9, the paper).

    Raises:
        OptionError: as for `pq_index`, or η, γ or β outside their range.
    """
    if not (0 <= gamma < math.inf and 0 < beta < 1):
        raise OptionError(f"gamma must be a number of at least 0 and beta lie in (0, 1), got {gamma} and {beta}.")
    sizes = _sizes(values, keep)
    needed = fewest(pq_index(values, p, q, keep=keep), sizes, p, q, eta)
    return sizes - torch.minimum(gamma * (sizes - needed).double(), beta * sizes.double()).add(_EXACT).floor().long()


def share_keep(values: Tensor, share: float, *, keep: Tensor | None = None) -> Tensor:
    """How many entries of each vector stay if `share` of them goes, rounded down: int64, without the last axis.

    Args:
        values, keep: as for `pq_index`; only their shape and the true entries count.
        share: in [0, 1); 0.2 is that of the lottery ticket (Frankle and Carbin, arXiv 1803.03635).

    Raises:
        OptionError: `share` outside its range.
    """
    if not 0 <= share < 1:
        raise OptionError(f"the share that goes must lie in [0, 1), got {share}.")
    sizes = _sizes(values, keep)
    return sizes - (share * sizes.double() + _EXACT).floor().long()


def gini_index(values: Tensor) -> float:
    """The Gini index of the magnitudes of all entries: 0 for equal ones, `1 − 1/N` for one alone not zero.

    `Σ (2i − N − 1)·w_i / (N·Σ w)` over the magnitudes in ascending order; 0 for a tensor of zeros or of no entries.

    Raises:
        OptionError: NaN or infinite values.

    >>> gini_index(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    0.25
    """
    _check_finite(values)
    ordered = values.detach().abs().double().flatten().sort().values
    total, count = float(ordered.sum()), ordered.numel()
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=ordered.device)
    return float(((2 * ranks - count - 1) * ordered).sum()) / (count * total) if total else 0.0


def hoyer_index(values: Tensor) -> float:
    """Hoyer's sparseness `(√d − ‖w‖₁/‖w‖₂)/(√d − 1)` of all entries, the PQ index of (1, 2) over its largest value.

    0 for one entry or none, and for zeros.

    Raises:
        OptionError: NaN or infinite values.
    """
    count = values.numel()
    return float(pq_index(values.flatten(), 1, 2)) / (1 - count**-0.5) if count > 1 else 0.0


def check_orders(p: float, q: float) -> None:
    """None for 0 < p < q, with a warning where they are so close that the bound says little.

    Raises:
        OptionError: other orders.
    """
    if not 0 < p < q < math.inf:
        raise OptionError(f"the orders of a PQ index must follow 0 < p < q, got p = {p} and q = {q}.")
    if q - p < 0.1 - _EXACT:
        warnings.warn(
            f"p = {p} and q = {q} are less than 0.1 apart, so the exponents of the pruning bound are above "
            f"{p * q / (q - p):.0f} and it falls steeply with the index.",
            stacklevel=2,
        )


def _magnitudes(values: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
    """Magnitudes in float64, zero outside `keep`, in pieces along the last axis that a small machine can hold."""
    width = max(1, _CHUNK * max(1, values.shape[-1]) // max(1, values.numel()))
    stays = [None] * values.shape[-1] if keep is None else keep.split(width, -1)
    for piece, mask in zip(values.detach().split(width, -1), stays, strict=False):
        magnitudes = piece.double().abs()
        yield magnitudes if mask is None else magnitudes.masked_fill(~mask, 0)


def _largest(values: Tensor, keep: Tensor | None) -> Tensor:
    """The largest magnitude of each vector, 1 where there is none above 0.

    Dividing by it keeps small powers of small numbers from vanishing.
    """
    if not values.dim() or (keep is not None and (keep.shape != values.shape or keep.dtype != torch.bool)):
        told = "" if keep is None else f" and a {keep.dtype} mask {list(keep.shape)}"
        raise OptionError(
            f"a PQ index needs values [..., entries] and a bool mask of their shape, got {list(values.shape)}{told}."
        )
    _check_finite(values)
    largest = torch.zeros(values.shape[:-1], dtype=torch.float64, device=values.device)
    for part in _magnitudes(values, keep):
        if part.shape[-1]:
            largest = torch.maximum(largest, part.amax(-1))
    return largest.masked_fill(largest == 0, 1.0)


def _sizes(values: Tensor, keep: Tensor | None) -> Tensor:
    if keep is not None:
        return keep.sum(-1)
    return torch.full(values.shape[:-1], values.shape[-1], dtype=torch.int64, device=values.device)


def _check_finite(values: Tensor) -> None:
    bad = 0 if all_finite(values) else values.numel() - int(values.isfinite().sum())
    if bad:
        raise OptionError(
            f"{bad} of {values.numel()} values are NaN or infinite, and a sparsity index is of numbers: mend the model."
        )
