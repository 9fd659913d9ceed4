"""Deciding in several rounds: the same share of what is left goes in each, and the rest is scored again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..core.batch import Loss
from ..core.budget import Budget, Limit
from ..core.errors import OptionError
from ..core.schedule import IterativeGeometric
from ..core.units import Group
from ..criteria import score
from ..planning import plan
from ..pruning import Repair

__all__ = ["in_rounds"]


def in_rounds(
    criterion: str,
    rounds: int,
    example_inputs: Any,
    budget: str | Budget,
    options: Mapping[str, Any] | None = None,
    repair: Repair | None = None,
    **planning: Any,
) -> Callable[..., dict[str, Tensor]]:
    """A criterion: the scores that `criterion` gives after all rounds but the last; after t of T keep^(t/T) stays.

    What went in an earlier round has the lowest scores, so that it goes in the last one too.

    Args:
        criterion: a registered name.
        rounds: T.
        example_inputs: as for `plan`.
        budget: of shares, that of the last round.
        options: of the criterion.
        repair: applied after each round; see `prune`.
        planning: allocation, scope and other arguments of `plan`.

    Raises:
        OptionError: the budget has a limit that is no share.
    """
    shares = _shares(Budget.parse(budget), rounds)

    def criterion_in_rounds(
        model: nn.Module, groups: Sequence[Group], *, data: Any = None, loss: Loss | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        current, gone = model, dict[str, Tensor]()

        def again(left: nn.Module, units: Sequence[Group]) -> dict[str, Tensor]:
            found = score(criterion, left, units, data=data, loss=loss, seed=seed, **options or {})
            lowest = min(float(scores.min()) for scores in found.values()) - 1
            return {n: scores.masked_fill(gone[n], lowest) if n in gone else scores for n, scores in found.items()}

        for share in shares:
            decided = plan(current, example_inputs, share, criterion=again, seed=seed, **planning)
            gone = {name: ~stays for name, stays in decided.keep.items()}
            current = decided.mask(current if repair is None else repair(current, decided))
        return again(current, groups)

    criterion_in_rounds.__name__ = f"{criterion} in {rounds} rounds"
    return criterion_in_rounds


def _shares(budget: Budget, rounds: int) -> list[Budget]:
    """The budgets of all rounds but the last."""
    wrong = [str(limit) for limit in budget.limits if not limit.relative] or [str(budget.pattern)] * bool(
        budget.pattern
    )
    if wrong:
        raise OptionError(
            f"rounds go down to a share of the model, as macs<=50%, and {wrong[0]} is none; ask for a share, or decide "
            "in one round."
        )
    return [Budget(tuple(_after(limit, step, rounds) for limit in budget.limits)) for step in range(1, rounds)]


def _after(limit: Limit, step: int, rounds: int) -> Limit:
    sparse = limit.metric == "sparsity"
    gone = IterativeGeometric(final=limit.value if sparse else 1 - limit.value, begin=1, rounds=rounds, every=1)(step)
    return replace(limit, value=gone if sparse else 1 - gone)
