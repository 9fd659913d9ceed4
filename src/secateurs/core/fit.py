"""The largest decision that meets a budget.

An allocation rule turns a number of kept units into counts, a cost model turns counts into costs. Costs grow with the
counts, so the largest number of units that meets every limit is found by search. Latency has no formula and is
measured, on few decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .budget import Budget, Limit, nearest_limit, nearest_sparsity, units_kept
from .cost import CostModel
from .errors import BudgetError, OptionError

__all__ = ["fit"]

Counts = dict[str, int]
_TIMED = ("latency", "speedup")
# Budgets are shares of sums of floats: a product such as 0.29·100 lies a rounding error below the number meant.
_TOLERANCE = 1e-9
# The filling-up of a rest stops here: what is left is not worth another search.
_FULL = 0.999
# With the baseline, the first decision and the lowest one this makes at most eight measurements.
_TIMED_TRIES = 5


@dataclass(frozen=True)
class _Bound:
    """A limit whose cost has a formula: `cost(counts)` must not exceed `allowed`; `whole` is the unpruned model's."""

    limit: Limit
    cost: Callable[[Mapping[str, int]], float]
    whole: float
    allowed: float

    def load(self, counts: Mapping[str, int]) -> float:
        """The share of what is allowed that `counts` use."""
        cost = self.cost(counts)
        if cost <= 0:
            return 0.0
        return cost / self.allowed if self.allowed > 0 else float("inf")


def fit(
    budget: Budget | str,
    *,
    allocate: Callable[[int], Counts],
    total_units: int,
    minimum_units: int,
    costs: CostModel,
    sizes: Mapping[str, int],
    measure: Callable[[Counts], float] | None = None,
    round_to: int | Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
) -> Counts:
    """The kept count of each group in the largest decision of the rule that meets every limit of `budget`.

    The rule is followed up to the first unit that would break a limit. Where much is left then, because that unit is a
    costly one, its group stops growing and the rule goes on with the others, until 99.9% of a limit is used or all
    groups have stopped. With latency or speedup the result is a decision that was itself measured and found to meet
    the limit: the one that the other limits allow, else the largest found in five bisections.

    Args:
        budget: limits on macs, params, bytes, memory, sparsity, latency or speedup. `sparsity=90%` keeps exactly
            `units_kept(0.9, total_units)`; `sparsity>=90%`, or either with `round_to`, keeps at most that many.
        allocate: counts for a number of kept units, not falling as it grows. It may refuse too few with a BudgetError.
        total_units: number of units in all groups.
        minimum_units: the fewest units that may stay.
        costs: costs as a function of counts, not falling in any of them.
        sizes: number of units per group.
        measure: seconds of one forward pass for given counts; needed for latency and speedup, called at most 8 times.
        round_to: counts are brought to a multiple of this number (or of one number per group; those without stay
            free): the nearest that is not below the floor, or the group's size. A group too small for a multiple
            below its size stays whole, unless the rule leaves no more than its floor.
        floors: the fewest units per group, for rounding (default 1).

    Raises:
        BudgetError: the limits cannot be met; `nearest` is a budget that can.
        OptionError: a limit that has no meaning here (tokens, N:M), a cost that the model does not have, or a
            multiple below 1.
    """
    budget = Budget.parse(budget)
    _check(budget, costs, measure)
    multiples = _multiples(sizes, round_to)
    snap = _snapping(sizes, floors, multiples)
    bounds = [_bound(limit, costs, total_units) for limit in budget.limits if limit.metric not in _TIMED]
    exact = None if multiples else budget.limit("sparsity")
    high = units_kept(exact.value, total_units) if exact else total_units
    if high < minimum_units:
        raise _infeasible(budget, bounds, snap(allocate(minimum_units)))

    def decide(keep: int) -> Counts:
        return snap(allocate(keep))

    def lowest() -> int:
        pinned = exact is not None and exact.comparison == "="
        return high if pinned else _first_accepted(allocate, minimum_units, high)

    counts, keep = _largest_within(budget, bounds, decide, lowest, high)
    if measure is None or not _timed(budget):
        return counts
    return _measured(budget, counts, decide, lowest(), keep, measure, dict(sizes))


def _largest_within(
    budget: Budget, bounds: Sequence[_Bound], decide: Callable[[int], Counts], lowest: Callable[[], int], high: int
) -> tuple[Counts, int]:
    """The largest decision within `bounds`, filled up; and the number of units up to which the rule alone met them."""

    def load(counts: Counts) -> float:
        return max((bound.load(counts) for bound in bounds), default=0.0)

    whole = decide(high)
    if _fits(load(whole)):
        return whole, high
    low = lowest()
    if not _fits(load(decide(low))):
        raise _infeasible(budget, bounds, decide(low))
    keep = _search(lambda k: load(decide(k)), low, high)
    return _filled(decide, load, keep, high), keep


def _search(load: Callable[[int], float], low: int, high: int) -> int:
    """The largest number in [low, high] whose load fits, given that `low` fits and the load never falls.

    Interpolation, which needs three or four steps where costs are linear, with a bisection after each step that did not
    halve the interval.
    """
    at_low, at_high = load(low), load(high)
    if _fits(at_high):
        return high
    bisect = False
    while high - low > 1:
        width = high - low
        part = 0.5 if bisect else (1 - at_low) / (at_high - at_low)
        middle = min(max(low + int(part * width), low + 1), high - 1)
        at_middle = load(middle)
        if _fits(at_middle):
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
        bisect = high - low > width // 2
    return low


def _filled(decide: Callable[[int], Counts], load: Callable[[Counts], float], keep: int, high: int) -> Counts:
    """The decision at `keep`, and what the rule adds beyond it while groups that would break a limit stand still."""
    stopped: Counts = {}

    def grown(k: int) -> Counts:
        return {name: min(count, stopped.get(name, count)) for name, count in decide(k).items()}

    best = grown(keep)
    while keep < high and load(best) < _FULL:
        beyond = grown(keep + 1)
        stopped |= {name: best[name] for name in beyond if beyond[name] > best[name]}
        keep = _search(lambda k: load(grown(k)), keep + 1, high)
        best = max(best, grown(keep), key=load)
    return best


def _measured(
    budget: Budget,
    counts: Counts,
    decide: Callable[[int], Counts],
    low: int,
    high: int,
    measure: Callable[[Counts], float],
    sizes: Counts,
) -> Counts:
    """`counts` if they are fast enough, else the largest decision found by a few bisections that is."""
    limits = _timed(budget)
    baseline = measure(sizes) if any(limit.relative or limit.metric == "speedup" for limit in limits) else 0.0
    allowed = min(_seconds(limit, baseline) for limit in limits)
    if measure(counts) <= allowed:
        return counts
    fast: Counts | None = None
    lower, upper = low, high
    for _ in range(_TIMED_TRIES):
        middle = (lower + upper) // 2
        if middle == lower:
            break
        tried = decide(middle)
        if measure(tried) <= allowed:
            fast, lower = tried, middle
        else:
            upper = middle
    if fast is not None:
        return fast
    seconds = measure(decide(low))
    if seconds > allowed:
        raise _too_slow(budget, baseline, seconds)
    return decide(low)


def _bound(limit: Limit, costs: CostModel, total_units: int) -> _Bound:
    if limit.metric == "sparsity":
        return _Bound(limit, lambda counts: sum(counts.values()), total_units, units_kept(limit.value, total_units))
    whole = costs.total(limit.cost)
    allowed = limit.value * whole if limit.relative else limit.value
    return _Bound(limit, lambda counts: costs.total(limit.cost, counts), whole, allowed)


def _multiples(sizes: Mapping[str, int], round_to: int | Mapping[str, int] | None) -> dict[str, int]:
    """What the counts of each group must be a multiple of; without the groups that are free."""
    multiples = dict.fromkeys(sizes, round_to) if isinstance(round_to, int) else dict(round_to or {})
    wrong = {name: multiple for name, multiple in multiples.items() if multiple < 1}
    if wrong:
        raise OptionError(f"round_to must be at least 1, got {', '.join(f'{m} for {n}' for n, m in wrong.items())}.")
    return {name: multiple for name, multiple in multiples.items() if multiple > 1}


def _snapping(
    sizes: Mapping[str, int], floors: Mapping[str, int] | None, multiples: Mapping[str, int]
) -> Callable[[Counts], Counts]:
    """A function that brings counts to `multiples`."""
    lowest = {name: min(size, 1) if floors is None else floors.get(name, 0) for name, size in sizes.items()}

    def snap(counts: Counts) -> Counts:
        rounded = {n: _snapped(counts[n], sizes[n], lowest[n], m) for n, m in multiples.items()}
        return counts | rounded

    return snap


def _snapped(count: int, size: int, floor: int, multiple: int) -> int:
    """The multiple nearest to `count` in [floor, size), the larger of two equally near, or the size."""
    first = -(-floor // multiple) * multiple
    if max(first, multiple) >= size:
        return min(floor, size) if count <= floor else size
    below = max(count // multiple * multiple, first)
    above = min(below + multiple, size)
    return above if above - count <= count - below else below


def _fits(load: float) -> bool:
    return load <= 1 + _TOLERANCE


def _first_accepted(allocate: Callable[[int], Counts], low: int, high: int) -> int:
    """The fewest units that the rule accepts; it refuses too few where it holds some groups at a density."""
    if _accepts(allocate, low):
        return low
    # Where nothing is accepted, the rule's own error says why.
    allocate(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _accepts(allocate, middle) else (middle, high)
    return high


def _accepts(allocate: Callable[[int], Counts], keep: int) -> bool:
    try:
        allocate(keep)
    except BudgetError:
        return False
    return True


def _timed(budget: Budget) -> list[Limit]:
    return [limit for limit in budget.limits if limit.metric in _TIMED]


def _seconds(limit: Limit, baseline: float) -> float:
    if limit.metric == "speedup":
        return baseline / limit.value
    return limit.value * baseline if limit.relative else limit.value


def _check(budget: Budget, costs: CostModel, measure: object) -> None:
    faults = []
    if budget.pattern is not None:
        faults.append(f"the pattern {budget.pattern} fixes its own counts, so it cannot be fitted")
    for limit in budget.limits:
        if limit.metric == "tokens":
            faults.append(f"{limit} limits what a model reads; it is met by a token method")
        elif limit.metric in _TIMED and measure is None:
            faults.append(f"{limit} needs measurements; give example inputs or limit macs")
        elif limit.metric not in (*_TIMED, "sparsity") and limit.cost not in costs.metrics:
            faults.append(f"{limit} limits {limit.cost}, but the known costs are {', '.join(costs.metrics)}")
    if faults:
        raise OptionError(f"cannot fit budget '{budget}': {'; '.join(faults)}.")


def _infeasible(budget: Budget, bounds: Sequence[_Bound], smallest: Counts) -> BudgetError:
    missed = [bound for bound in bounds if not _fits(bound.load(smallest))]
    texts = [f"{bound.limit} cannot be met, the smallest decision keeps {_amount(bound, smallest)}" for bound in missed]
    relaxed = {bound.limit: _feasible(bound, smallest) for bound in missed}
    return BudgetError(f"{'; '.join(texts)}.", nearest=_replaced(budget.limits, relaxed))


def _amount(bound: _Bound, counts: Counts) -> str:
    cost = bound.cost(counts)
    if bound.limit.metric == "sparsity":
        return f"{cost:g} of {bound.whole:g} units"
    if bound.limit.relative:
        return f"{cost / bound.whole:.3%} of the {bound.limit.cost}"
    return f"{cost:g} {bound.limit.cost}"


def _feasible(bound: _Bound, counts: Counts) -> Limit:
    cost = bound.cost(counts)
    if bound.limit.metric == "sparsity":
        return replace(nearest_sparsity(int(cost), int(bound.whole)), comparison=bound.limit.comparison)
    return nearest_limit(bound.limit, cost / bound.whole if bound.limit.relative else cost)


def _too_slow(budget: Budget, baseline: float, seconds: float) -> BudgetError:
    missed = [limit for limit in _timed(budget) if seconds > _seconds(limit, baseline)]
    text = f"{', '.join(map(str, missed))} cannot be met, the smallest decision takes {seconds * 1e3:.3g} ms"
    if 0 < baseline < seconds and any(limit.relative or limit.metric == "speedup" for limit in missed):
        return BudgetError(f"{text}, more than the {baseline * 1e3:.3g} ms of the whole model.")
    relaxed = {limit: nearest_limit(limit, _reached(limit, baseline, seconds)) for limit in missed}
    return BudgetError(f"{text}.", nearest=_replaced(budget.limits, relaxed))


def _reached(limit: Limit, baseline: float, seconds: float) -> float:
    if limit.metric == "speedup":
        return baseline / seconds
    return seconds / baseline if limit.relative else seconds


def _replaced(limits: Iterable[Limit], relaxed: Mapping[Limit, Limit]) -> str:
    return ",".join(str(relaxed.get(limit, limit)) for limit in limits)
