"""Several trainings of one network that differ in nothing but the order and the augmentation of the data.

What they have in common says how much of the result the start has decided: the instability analysis of lottery tickets
(Frankle et al., ICML 2020, arXiv 1912.05671) and the three regimes of pruning (arXiv 2305.18383) compare such copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.errors import DataError, OptionError
from .finetune import Data, fine_tune, one_pass

__all__ = ["Copy", "passes_from", "trained_copies"]

Score = Callable[[nn.Module], float]


@dataclass(frozen=True, eq=False)
class Copy:
    """One of the trainings.

    Args:
        model: trained.
        scores: after each of the last passes, the last one last; empty if nothing was asked.
    """

    model: nn.Module
    scores: tuple[float, ...] = field(default=())


def passes_from(data: Data, first: int, before: Callable[[int], None] | None = None) -> Callable[[int], Iterable[Any]]:
    """The passes over `data` from number `first` on, as a function from the number of a pass, from 0.

    A list of batches, which has one order only, is gone through in an order drawn from PyTorch's random numbers; inside
    `fine_tune` these follow its seed.

    Args:
        data: as for `fine_tune`.
        first: of a function of the pass, the number that it begins with.
        before: called with the number of passes done, before each.
    """

    def batches(epoch: int) -> Iterable[Any]:
        if before is not None:
            before(epoch)
        found = one_pass(data, first + epoch)
        return [found[i] for i in torch.randperm(len(found)).tolist()] if isinstance(found, (list, tuple)) else found

    return batches


def trained_copies(
    model: nn.Module,
    data: Data,
    count: int,
    *,
    epochs: int,
    score: Score | None = None,
    last: int = 1,
    seed: int = 0,
    **training: Any,
) -> list[Copy]:
    """`count` copies of `model`, each trained on an order of the data of its own; `model` stays as it is.

    Args:
        model: where all begin.
        data: as for `fine_tune`: batches that come in another order in every pass, a function from the number of the
            pass (copies get different numbers), or a list, whose batches are shuffled here.
        count: of copies, two or more.
        epochs: passes over the data.
        score: of a model, read after each of the last passes.
        last: how many passes that are.
        seed: of the first copy; the others follow.
        training: lr, schedule, masks and the rest of `fine_tune`'s arguments.

    Raises:
        OptionError: fewer than two copies.
        DataError: there is no batch, or the copies are equal, since the order of the data does not change.
    """
    if count < 2:
        raise OptionError(f"copies are compared, so there must be at least 2, got {count}.")
    made = [_trained(model, data, n, epochs, score, last, seed, training) for n in range(count)]
    if any(_equal(one.model, other.model) for i, one in enumerate(made) for other in made[:i]):
        raise DataError(
            "two copies are equal after training, so that nothing can be learnt from them: the order of the data must "
            "change with the number of the pass or with PyTorch's random numbers."
        )
    return made


def _trained(
    model: nn.Module, data: Data, number: int, epochs: int, score: Score | None, last: int, seed: int,
    training: dict[str, Any],
) -> Copy:  # fmt: skip
    own = copy.deepcopy(model)
    scores: list[float] = []

    def read(done: int) -> None:
        if score is not None and done and done > epochs - last:
            scores.append(score(own))

    fine_tune(own, passes_from(data, number * epochs, read), epochs=epochs, seed=seed + number, **training)
    read(epochs)
    return Copy(own, tuple(scores))


def _equal(a: nn.Module, b: nn.Module) -> bool:
    pairs: Sequence[Any] = list(zip(a.parameters(), b.parameters(), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)
