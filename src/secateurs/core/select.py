"""Which ones: exact selections from scores.

One tie rule for every granularity: higher scores first, among equals the earlier index. Asked for k, exactly k stay.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import OptionError

__all__ = ["knapsack", "n_of_m", "n_of_m_inputs", "per_row", "staying_first", "top", "top_across"]

# From this length on the k-th highest of a row is looked for near where a sample of every 257th entry has it.
_LONG, _STRIDE = 2**16, 257
# Runs up to this length are ranked entry against entry.
_SHORT = 8
# Entries of the decision table of `knapsack`, one byte each.
_KNAPSACK_TABLE = 2**31


def top(scores: Tensor, k: int) -> Tensor:
    """The `k` highest of all scores: a bool mask of the same shape with exactly `k` true.

    Equal scores: the earlier in row-major order stays. Linear in time; about one second for 10⁷ scores on one core.

    Args:
        scores: any shape, any real dtype; infinite is allowed.
        k: 0 … number of scores.

    Raises:
        OptionError: NaN among the scores, or `k` outside its range.

    >>> top(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist()
    [False, True, True, False]
    """
    return _keep(_without_nan(scores).reshape(1, -1), k).view(scores.shape)


def staying_first(scores: Tensor, stays: Sequence[int]) -> Tensor:
    """`scores` [units], in which those of the units that must stay are above all others.

    >>> staying_first(torch.tensor([1.0, 5.0, 2.0]), [0]).argmax()
    tensor(0)
    """
    if not len(stays):
        return scores
    above = torch.nextafter(scores.max(), scores.new_tensor(torch.inf))
    return scores.index_fill(0, torch.tensor(stays, device=scores.device), float(above))


def top_across(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The `k` highest of all groups together: per group a bool mask of its shape, with exactly `k` true in total.

    Equal scores: the earlier group stays, within a group the earlier index.

    Raises:
        OptionError: NaN in a group's scores, or `k` outside 0 … number of scores.
    """
    if not scores:
        raise OptionError("there are no scores to choose from: give at least one group.")
    parts = [_without_nan(values, name).reshape(-1) for name, values in scores.items()]
    mask = _keep(torch.cat([part.to(parts[0].device) for part in parts])[None], k).view(-1)
    chosen = mask.split([part.numel() for part in parts])
    return {
        name: piece.view(values.shape).to(values.device)
        for (name, values), piece in zip(scores.items(), chosen, strict=True)
    }


def per_row(scores: Tensor, k: int | Tensor) -> Tensor:
    """The `k` highest of every row: a bool mask [rows, columns] with exactly `k` true in each, earlier columns first.

    Args:
        scores: [rows, columns].
        k: 0 … columns, one number for all rows or an integer tensor [rows].

    Raises:
        OptionError: scores of another rank, NaN among them, or `k` outside its range.
    """
    rows = _matrix(scores)
    if not isinstance(k, Tensor):
        return _keep(rows, k)
    if k.shape != rows.shape[:1]:
        raise OptionError(f"{list(rows.shape)} scores need one count a row, got counts {list(k.shape)}.")
    mask = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    for count in k.unique().tolist():
        mask[k == count] = _keep(rows[k == count], count)
    return mask


def n_of_m(scores: Tensor, keep: int, of: int) -> Tensor:
    """The `keep` highest of every `of` consecutive columns: a bool mask [rows, columns], earlier columns first.

    Args:
        scores: [rows, columns]; the columns are the inputs of a weight.
        keep: how many stay (N of N:M counts what stays), 0 … `of`.
        of: length of each run of columns; must divide their number.

    Raises:
        OptionError: `of` does not divide the columns, NaN among the scores, or `keep` outside its range.
    """
    rows, columns = _matrix(scores).shape
    if of < 1 or columns % of:
        raise OptionError(f"{keep}:{of} needs a number of columns that {of} divides, got scores [{rows}, {columns}].")
    return _keep(scores.reshape(-1, of), keep).view(rows, columns)


def n_of_m_inputs(scores: Tensor, keep: int, of: int, axis: int = 1) -> Tensor:
    """The `keep` highest of every `of` consecutive inputs of a weight: a bool mask of its shape, earlier inputs first.

    Args:
        scores: of the weight's shape, outputs first and inputs second; each position of a kernel has patterns of its
            own.
        keep, of: see `n_of_m`.
        axis: of the inputs, where it is not the second.

    Raises:
        OptionError: as for `n_of_m`.
    """
    rows = scores.movedim(axis, -1)
    return n_of_m(rows.flatten(0, -2), keep, of).view(rows.shape).movedim(-1, axis)


def knapsack(values: Tensor, costs: Tensor, capacity: int) -> Tensor:
    """The most valuable set of units that costs at most `capacity`: a bool mask [units], exact.

    Dynamic programming over integer costs: units·capacity time and bytes, after division by the costs' common divisor.
    Units without a positive value never stay; among equally valuable sets the one with the earlier units stays.

    Args:
        values: [units], what each unit is worth; summed in float64.
        costs: [units], integers of at least 0.
        capacity: what may be spent, at least 0.

    Raises:
        OptionError: NaN values, costs that are negative, fractional or of another length, a negative capacity, or a
            table of more than 2³¹ entries.
    """
    worth, prices = _without_nan(values).double().cpu(), _integers(costs, values.shape)
    if capacity < 0:
        raise OptionError(f"the capacity of a knapsack must be at least 0, got {capacity}.")
    divisor = math.gcd(*prices) or 1
    prices = [price // divisor for price in prices]
    room = min(capacity // divisor, sum(prices))
    if len(prices) * (room + 1) > _KNAPSACK_TABLE:
        raise OptionError(f"a knapsack of {len(prices)} units and capacity {room} is too large; give coarser costs.")
    return _trace(_knapsack_table(worth, prices, room), prices, room)


def _keep(rows: Tensor, k: int) -> Tensor:
    """Mask of the k highest per row. The k-th value splits each row; its equals are admitted from the left."""
    count = operator.index(k)
    if not 0 <= count <= rows.shape[1]:
        raise OptionError(f"cannot keep {count} of {rows.shape[1]} units; allowed are 0 to {rows.shape[1]}.")
    if count in (0, rows.shape[1]):
        return torch.full(rows.shape, count > 0, dtype=torch.bool, device=rows.device)
    if rows.shape[1] <= _SHORT:
        return _rank(rows) < count
    bound = _kth_highest(rows, count)
    reached = rows >= bound
    if int(torch.count_nonzero(reached)) == count * len(rows):
        return reached
    above, equal = rows > bound, rows == bound
    missing = count - above.sum(1, keepdim=True)
    # The running count is the largest temporary here; 32 bits halve it wherever they suffice.
    narrow = torch.int32 if rows.shape[1] < 2**31 else torch.int64
    return above | (equal & (equal.cumsum(1, dtype=narrow) <= missing))


def _rank(rows: Tensor) -> Tensor:
    """How many entries of its row stand before each, the earlier of equals first: uint8, for short rows."""
    entries = [column.contiguous() for column in rows.unbind(1)]
    before = torch.zeros(rows.shape[1], rows.shape[0], dtype=torch.uint8, device=rows.device)
    for later in range(1, len(entries)):
        for earlier in range(later):
            passes = entries[later] > entries[earlier]
            before[earlier] += passes
            before[later] += ~passes
    return before.T.contiguous()


def _near(row: Tensor, k: int) -> tuple[Tensor, int]:
    """The entries of one long row near its k-th highest, and its place among them; all, where the sample misled."""
    sample = row[0, ::_STRIDE].sort(descending=True).values
    # Four standard deviations of the place in the sample, at most.
    place, slack = k / row.shape[1] * len(sample), 2 * math.sqrt(len(sample))
    high, low = sample[max(int(place - slack), 0)], sample[min(int(place + slack), len(sample) - 1)]
    left = k - int(torch.count_nonzero(row > high))
    near = row[(row <= high) & (row >= low)][None]
    return (near, left) if 1 <= left <= near.shape[1] else (row, k)


def _kth_highest(rows: Tensor, k: int) -> Tensor:
    if len(rows) == 1 and rows.shape[1] >= _LONG:
        rows, k = _near(rows, k)
    # Not `kthvalue`: on the CPU it takes quadratic time on sorted and on constant rows, which magnitudes of pruned
    # weights come close to. `topk` does not, and from the nearer end it is fastest.
    rest = rows.shape[1] - k + 1
    if k <= rest:
        return rows.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return rows.topk(rest, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def _without_nan(scores: Tensor, where: str | None = None) -> Tensor:
    # The highest of values is NaN where one of them is, and is found faster than their count.
    if scores.numel() and bool(scores.detach().amax().isnan()):
        bad = int(scores.isnan().sum())
        place = "the scores" if where is None else f"the scores of {where}"
        raise OptionError(f"{bad} of {scores.numel()} values in {place} are NaN; mend the model or the criterion.")
    return scores.to(torch.uint8) if scores.dtype == torch.bool else scores.detach()


def _matrix(scores: Tensor) -> Tensor:
    if scores.dim() != 2:
        raise OptionError(f"scores must be [rows, columns], got shape {tuple(scores.shape)}.")
    return _without_nan(scores)


def _integers(costs: Tensor, shape: torch.Size) -> list[int]:
    if costs.dim() != 1 or costs.shape != shape:
        raise OptionError(f"a knapsack needs [units] values and costs, got {tuple(shape)} and {tuple(costs.shape)}.")
    exact = costs.double()
    if not bool((exact.isfinite() & (exact >= 0) & (exact == exact.floor())).all()):
        raise OptionError("the costs of a knapsack must be integers of at least 0; round them up first.")
    return [int(cost) for cost in costs.tolist()]


def _knapsack_table(worth: Tensor, prices: list[int], room: int) -> Tensor:
    """Whether unit i stays when `c` is left for units i and later: bool [units, room + 1]."""
    best = torch.zeros(room + 1, dtype=torch.float64)
    take = torch.zeros(len(prices), room + 1, dtype=torch.bool)
    # From the last unit to the first, so that on equal value the earlier unit is the one that stays.
    for i in reversed(range(len(prices))):
        price = prices[i]
        if price > room or worth[i] <= 0:
            continue
        with_unit = worth[i] + best[: room + 1 - price]
        take[i, price:] = with_unit >= best[price:]
        best[price:] = torch.maximum(best[price:], with_unit)
    return take


def _trace(take: Tensor, prices: list[int], room: int) -> Tensor:
    stays = torch.zeros(len(prices), dtype=torch.bool)
    for i, price in enumerate(prices):
        stays[i] = take[i, room]
        room -= price * int(stays[i])
    return stays
