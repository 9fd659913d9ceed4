"""One level for each of many modules, so that a budget is met: exactly for given errors, and by search for a loss.

The search is SPDY's (Frantar and Alistarh 2022, arXiv 2201.13096), which ZipLM uses: errors of single modules do not
add up to the loss of the model, so each is weighed by a coefficient, and the coefficients are looked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BudgetError, OptionError

__all__ = ["Found", "cheapest", "search"]

Choice = tuple[int, ...]
# Quotients of floats: a price that is a whole number of buckets may lie a rounding error above it.
_TOLERANCE = 1e-9


def cheapest(
    errors: Sequence[Sequence[float]], prices: Sequence[Sequence[float]], budget: float, *, buckets: int = 10_000
) -> Choice:
    """The level of each module, such that prices add up to at most `budget` and errors to as little as they can.

    Dynamic programming over modules and `buckets` equal parts of the budget. Prices are rounded down to whole buckets,
    where that does not lead beyond the budget, and what is found is exact; else to the nearest, else up, which never
    leads beyond it, and what is lost is at most a bucket a module. Of equal sums the earlier levels win.

    Args:
        errors: per module one number a level.
        prices: per module one number a level, at least 0; 0 is allowed.
        budget: at least 0.
        buckets: 10,000 (SPDY).

    Raises:
        BudgetError: even the lowest prices exceed the budget; the message has their sum.
        OptionError: numbers that are not finite, prices below 0, or modules without levels or of unequal lengths.

    >>> cheapest([[0.0, 1.0], [0.0, 5.0]], [[4.0, 1.0], [4.0, 1.0]], 5.0)
    (1, 0)
    """
    _check(errors, prices, budget, buckets)
    lowest = sum(min(levels) for levels in prices)
    if lowest > budget * (1 + _TOLERANCE):
        raise BudgetError(f"a budget of {budget:g} is unreachable: the cheapest levels add up to {lowest:g}.")
    for rounded in (math.floor, round, math.ceil):
        steps = [[_buckets(price, budget, buckets, rounded) for price in levels] for levels in prices]
        # Where rounding up leaves too little, the lowest levels still fit, as was checked.
        choice = _trace(errors, steps, max(buckets, sum(min(levels) for levels in steps)))
        if sum(levels[level] for levels, level in zip(prices, choice, strict=True)) <= budget:
            break
    return choice


def _buckets(price: float, budget: float, buckets: int, rounded: Callable[[float], int]) -> int:
    # More than there is room for is as good as infinite.
    if price > 2 * budget:
        return 4 * buckets
    return rounded(price / budget * buckets * (1 - _TOLERANCE)) if price else 0


def _trace(errors: Sequence[Sequence[float]], steps: Sequence[Sequence[int]], room: int) -> Choice:
    """From the last module to the first the best level for each room that is left, then the way through them."""
    best = torch.zeros(room + 1, dtype=torch.float64)
    levels: list[Tensor] = []
    for costs, sizes in zip(reversed(errors), reversed(steps), strict=True):
        found, level = torch.full_like(best, torch.inf), torch.zeros(room + 1, dtype=torch.int64)
        for number, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
            if size <= room:
                tried = best[: room + 1 - size] + cost
                level[size:].masked_fill_(tried < found[size:], number)
                torch.minimum(found[size:], tried, out=found[size:])
        best = found
        levels.append(level)
    choice: list[int] = []
    for sizes, level in zip(steps, reversed(levels), strict=True):
        choice.append(int(level[room]))
        room -= sizes[choice[-1]]
    return tuple(choice)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        choice: the level of each module.
        loss: of that choice.
        evaluations: different choices whose loss was asked for.
    """

    choice: Choice
    loss: float
    evaluations: int


def search(
    solve: Callable[[Tensor], Choice],
    loss_of: Callable[[Choice], float],
    modules: int,
    *,
    starts: int = 100,
    share: float = 0.1,
    failures: int = 100,
    seed: int = 0,
) -> Found:
    """The choice of least loss that was met while coefficients were looked for.

    First equal coefficients and `starts` random ones in [0, 1]; from the best of them, k coefficients are drawn anew,
    and the first draw that lowers the loss is taken, for k = round(`share`·modules) down to 1. A stage ends after
    `failures` draws in a row that did not. A choice that comes again is not evaluated again; a loss of NaN is infinite.

    Args:
        solve: from coefficients, float64 [modules], to a choice within the budget.
        loss_of: from a choice to what shall be small.
        modules: their number, at least 1.
        starts, share, failures: 100, 0.1 and 100 (SPDY); 0 starts and 0 failures leave the equal coefficients.
        seed: of the draws.

    Raises:
        OptionError: a number outside its range.
    """
    if modules < 1 or starts < 0 or failures < 0 or not 0 <= share <= 1:
        raise OptionError(
            "a search needs at least 1 module, starts and failures of at least 0 and a share in [0, 1]; got "
            f"{modules}, {starts}, {failures} and {share}."
        )
    generator = torch.Generator().manual_seed(seed)
    known: dict[Choice, float] = {}

    def judged(coefficients: Tensor) -> float:
        choice = solve(coefficients)
        if choice not in known:
            loss = loss_of(choice)
            known[choice] = math.inf if math.isnan(loss) else loss
        return known[choice]

    best = torch.ones(modules, dtype=torch.float64)
    lowest = judged(best)
    for _ in range(starts):
        drawn = torch.rand(modules, generator=generator, dtype=torch.float64)
        if (loss := judged(drawn)) < lowest:
            best, lowest = drawn, loss
    for changed in range(max(round(share * modules), 1), 0, -1):
        failed = 0
        while failed < failures:
            drawn = best.clone()
            places = torch.randperm(modules, generator=generator)[:changed]
            drawn[places] = torch.rand(changed, generator=generator, dtype=torch.float64)
            loss = judged(drawn)
            failed = 0 if loss < lowest else failed + 1
            if loss < lowest:
                best, lowest = drawn, loss
    return Found(solve(best), lowest, len(known))


def _check(errors: Sequence[Sequence[float]], prices: Sequence[Sequence[float]], budget: float, buckets: int) -> None:
    if [len(levels) for levels in errors] != [len(levels) for levels in prices] or not all(map(len, errors)):
        raise OptionError("each module needs at least one level, with one error and one price for each.")
    numbers = [number for part in (errors, prices) for levels in part for number in levels]
    if not all(map(math.isfinite, numbers)) or any(price < 0 for levels in prices for price in levels):
        raise OptionError("errors and prices of levels must be finite, and prices at least 0.")
    if not 0 <= budget < math.inf or buckets < 1:
        raise OptionError(f"a budget must be a number of at least 0 in at least 1 bucket, got {budget} and {buckets}.")
