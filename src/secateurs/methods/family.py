"""A family of models from one: pruned to a target, trained, saved, and pruned on to the next (gradual pruning).

With `ziplm` this is the gradual mode of Kurtic, Frantar and Alistarh 2023, arXiv 2302.04089: one run gives a model for
each of several speed-ups. Statistics are fresh at each target, and the learning rate starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from ..core.budget import Budget, Limit
from ..core.errors import OptionError
from ..core.state import read_state, write_state
from ..graph.infer import infer
from ..graph.plan import digest
from ..measure.latency_table import Timer, side_by_side
from ..planning import batches_of
from ..pruning import FineTune, Pruned, load
from ..recover.distill import Distillation
from ..recover.finetune import Data, History
from ..running import claim

__all__ = ["TokenDistilled", "family"]

_TIMED = ("latency", "speedup")


def _tokens() -> Distillation:
    return Distillation(temperature=1.0, alpha=1.0, tokens=0.5)


@dataclass(frozen=True)
class TokenDistilled(FineTune):
    """Training in which the unpruned model teaches by its logits and by the hidden states of each token.

    The loss is (1 - alpha)·task + alpha·KL + tokens·token loss; the defaults are l = (0, 1, 0.5), a starting point, and
    a linear decay of the learning rate. See `recover.distill`.
    """

    schedule: str = "linear"
    distill: bool = True
    distillation: Distillation = field(default_factory=_tokens)


class _Taught(FineTune):
    """A training whose teacher is always the same model."""

    def __init__(self, how: FineTune, teacher: nn.Module) -> None:
        super().__init__(**{part.name: getattr(how, part.name) for part in fields(FineTune)})
        object.__setattr__(self, "_how", how)
        object.__setattr__(self, "_teacher", teacher)

    def run(self, model: nn.Module, teacher: nn.Module, data: Data, **options: Any) -> History:
        how: FineTune = vars(self)["_how"]
        return how.run(model, vars(self)["_teacher"], data, **options)


def family(
    run: Callable[..., Pruned],
    model: nn.Module,
    example_inputs: Any,
    budgets: Sequence[str | Budget],
    *,
    recover: FineTune | None = None,
    data: Iterable[Any] | None = None,
    folder: str | Path | None = None,
    timer: Timer = side_by_side,
    trust: Sequence[str] = (),
    **common: Any,
) -> list[Pruned]:
    """One result for each of `budgets`, each pruned from the one before it, and taught by the model as it is now.

    Args:
        run: a method of the catalogue that cuts, as `ziplm`.
        model: untouched.
        example_inputs: as for `prune`.
        budgets: each of one limit, all of one metric, and each tighter than the one before; shares and speed-ups are
            of `model`.
        recover: the training after each target, as `TokenDistilled(epochs=…, lr=…)`; None for none.
        data: of calibration and training.
        folder: each result is saved there, as 1, 2, …, and a run that was killed goes on from them.
        timer: how the unpruned model is timed, and its modules by a method that takes one.
        trust: see `load`.
        common: further arguments of `run`.

    Raises:
        OptionError: budgets that do not tighten, or a folder of another run.
    """
    asked = [Budget.parse(budget) for budget in budgets]
    _check(asked)
    batches = batches_of(data)
    kept = None if folder is None else Path(folder)
    if kept is not None:
        claim(kept, {"family": [str(budget) for budget in asked], "model": digest(model), "by": run.__qualname__})
    targets = _targets(model, example_inputs, asked, timer, kept)
    taught = None if recover is None else _Taught(recover, model)
    common |= {"timer": timer} if "timer" in signature(run).parameters else {}
    made: list[Pruned] = []
    for number, target in enumerate(targets, 1):
        current = made[-1].model if made else model
        step = {} if kept is None else {"checkpoint": kept / f"{number}-run"}
        if kept is not None and (kept / str(number)).exists():
            made.append(load(kept / str(number), trust=trust))
            continue
        made.append(run(current, example_inputs, target, data=batches, recover=taught, **step, **common))
        if kept is not None:
            made[-1].save(kept / str(number))
    return made


def _targets(
    model: nn.Module, example_inputs: Any, asked: Sequence[Budget], timer: Timer, folder: Path | None
) -> list[Budget]:
    """The budgets in seconds, MACs, parameters or bytes, since shares would be of what is already pruned."""
    file = None if folder is None else folder / "targets.safetensors"
    if file is not None and file.exists():
        return [Budget.parse(text) for text in read_state(file, "targets")]
    limit = asked[0].limits[0]
    if limit.metric in _TIMED:
        whole = timer(model, model, example_inputs)[0]
    else:
        whole = infer(model, example_inputs).costs.total(limit.cost)
    targets = [Budget((_absolute(budget.limits[0], whole),)) for budget in asked]
    if file is not None:
        write_state(file, [str(target) for target in targets], "targets")
    return targets


def _absolute(limit: Limit, whole: float) -> Limit:
    if limit.metric == "speedup":
        return Limit("latency", "<=", whole / limit.value, relative=False)
    return Limit(limit.metric, "<=", limit.value * whole, relative=False) if limit.relative else limit


def _check(asked: Sequence[Budget]) -> None:
    limits = [limit for budget in asked for limit in budget.limits]
    alike = len({(limit.metric, limit.relative) for limit in limits}) == 1
    if len(limits) != len(asked) or not alike or limits[0].metric in ("sparsity", "tokens"):
        raise OptionError(
            "a family needs one limit a budget, all of one metric in one unit, such as speedup>=1.5x and speedup>=2x; "
            f"got {', '.join(map(str, asked)) or 'none'}."
        )
    falls = limits[0].metric != "speedup"
    if any((later.value >= limit.value) == falls for limit, later in pairwise(limits)):
        raise OptionError(f"each budget must be tighter than the one before; got {', '.join(map(str, asked))}.")
