"""Rethinking the value of pruning: is it worth it here? The pruned architecture, fine-tuned or from scratch.

Liu, Sun, Zhou, Huang and Darrell, "Rethinking the Value of Network Pruning", ICLR 2019, arXiv 1810.05270. Unit:
whatever is pruned; the L1 norm of whole filters by default (Li et al. 2017). When: after training, against no pruning
at all. How: from a large network A and its pruned architecture B, equal in widths or in masks,

    fine-tune    B with A's weights, a short training, at each learning rate of a small grid
    scratch-E    B from fresh weights, for A's epochs
    scratch-B    B from fresh weights, for A's compute: epochs · FLOPs(A)/FLOPs(B)
    lottery      masks only: B with A's original weights before training, for A's epochs

Each arm is run for several seeds and reported as mean and standard deviation of the test accuracy after the last
epoch. (The published code reports the best test epoch, which chooses by the test set.)

Defaults. 160 epochs of SGD 0.1 in the paper's CIFAR recipe, fine-tuning 40 epochs at 0.001; later work disputes the
finding on exactly that rate, so a second, larger one is tried and both are shown. Scratch-B may be capped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from ...core.batch import take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...measure.macs import macs
from ...measure.quality import evaluate
from ...planning import plan
from ...recover.finetune import Data, fine_tune, one_pass
from ...recover.rewinding import rewind, snapshot
from ...recover.scratch import reinitialize, scratch_epochs
from ..parameters import Between, OneOf, Several, check

__all__ = ["METHOD", "Arm", "Protocol", "Verdict", "rethinking_value"]


@dataclass(frozen=True)
class Protocol:
    """Hyperparameters of the comparison.

    Args:
        epochs: of the dense training, and of Scratch-E (160, the paper on CIFAR).
        lr: of all training from scratch (0.1).
        weight_decay: (1e-4).
        tune_epochs: of fine-tuning (40).
        tune_rates: learning rates of fine-tuning, each an arm of its own.
        cap: Scratch-B trains at most this many times `epochs`.
        seeds: one run of every arm for each.
        linear: how fresh linear layers are drawn; see `reinitialize`. The paper's "normal", N(0, 0.01), starves a
            network of several linear layers without normalisation, and the arm would lose for that reason alone.
    """

    epochs: Annotated[int, Between(1, whole=True)] = 160
    lr: Annotated[float, Between(0, closed="neither")] = 0.1
    weight_decay: Annotated[float, Between(0)] = 1e-4
    tune_epochs: Annotated[int, Between(1, whole=True)] = 40
    tune_rates: Annotated[tuple[float, ...], Several(Between(0, closed="neither"))] = (0.001, 0.01)
    cap: Annotated[float, Between(1)] = 4.0
    seeds: Annotated[tuple[int, ...], Several(Between(0, whole=True))] = (0, 1, 2)
    linear: Annotated[Literal["normal", "fan-out"], OneOf(("normal", "fan-out"))] = "fan-out"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Arm:
    """Test accuracies of one arm, one per seed."""

    name: str
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; 0 for one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.name}: {100 * self.mean:.2f} ± {100 * self.std:.2f}"


@dataclass(frozen=True)
class Verdict:
    """All arms of a comparison; "dense" and "pruned" (before any repair) are among them."""

    arms: tuple[Arm, ...]

    def __getitem__(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def worth_it(self) -> bool:
        """Whether the best fine-tuning beats the best training from scratch by more than their joint deviation."""
        tuned = max((a for a in self.arms if a.name.startswith("fine-tune")), key=lambda a: a.mean)
        fresh = max((a for a in self.arms if a.name.startswith("scratch")), key=lambda a: a.mean)
        return tuned.mean - fresh.mean > math.hypot(tuned.std, fresh.std)

    def __str__(self) -> str:
        advice = "inherited weights pay" if self.worth_it else "training the small network from scratch does as well"
        return "\n".join([*map(str, self.arms), f"verdict: {advice}"])


def rethinking_value(
    build: Callable[[int], nn.Module],
    example_inputs: Any,
    budget: str | Budget,
    *,
    data: Data,
    test: Iterable[Any],
    options: Protocol | None = None,
    on_arm: Callable[[Arm], None] | None = None,
    **pruning: Any,
) -> Verdict:
    """The verdict of all arms on a pruned architecture.

    Args:
        build: makes the untrained large network for a seed.
        example_inputs: as for `plan`.
        budget: what the architecture is pruned to.
        data: training batches, or a function from the number of the pass to them; criteria look at the first pass.
        test: batches with labels; nothing is chosen by them.
        options: hyperparameters.
        on_arm: told each arm's accuracies when all seeds are done.
        pruning: arguments of `plan`; default: L1 norm of whole filters at equal sparsity in every layer.

    Raises:
        BudgetError: the budget cannot be met; before any training.
        DataError: there are no test batches, or no training batches.
        OptionError: the pruned network costs more than the dense one.
    """
    how, tests = options or Protocol(), take(test, what="test data")
    chosen = {"criterion": "magnitude", "allocation": "uniform", "criterion_options": {"members": "out"}, **pruning}
    # A budget that cannot be met is refused now and not after the dense training.
    plan(build(how.seeds[0]), example_inputs, budget, data=one_pass(data), **chosen)
    results: dict[str, list[float]] = {}
    for seed in how.seeds:
        for name, accuracy in _one_seed(build, example_inputs, budget, data, tests, how, seed, chosen):
            results.setdefault(name, []).append(accuracy)
    arms = tuple(Arm(name, tuple(values)) for name, values in results.items())
    for arm in arms:
        if on_arm is not None:
            on_arm(arm)
    return Verdict(arms)


def _one_seed(
    build: Callable[[int], nn.Module], example_inputs: Any, budget: str | Budget, data: Data, test: Sequence[Any],
    how: Protocol, seed: int, pruning: dict[str, Any],
) -> list[tuple[str, float]]:  # fmt: skip
    dense = build(seed)
    initial = snapshot(dense)
    _train(dense, data, how, how.epochs, how.lr, seed, "step")
    decided = plan(dense, example_inputs, budget, data=one_pass(data), seed=seed, **pruning)
    masks = None if decided.structure else decided.masks(dense)

    def pruned() -> nn.Module:
        return decided.cut(dense) if masks is None else decided.mask(dense)

    costs = macs(dense, example_inputs), decided.cost("macs", relative=False)
    found = [("dense", _accuracy(dense, test)), ("pruned", _accuracy(pruned(), test))]
    for rate in how.tune_rates:
        tuned = _train(pruned(), data, how, how.tune_epochs, rate, seed, "constant", masks)
        found.append((f"fine-tune at {rate:g}", _accuracy(tuned, test)))
    for name, length in (("E", how.epochs), ("B", scratch_epochs(how.epochs, *costs).epochs)):
        epochs = min(length, int(how.cap * how.epochs))
        fresh = pruned()
        reinitialize(fresh, masks, seed=seed, linear=how.linear)
        trained = _train(fresh, data, how, epochs, how.lr, seed, "step", masks)
        found.append((f"scratch-{name}", _accuracy(trained, test)))
    if masks is not None:
        ticket = pruned()
        rewind(ticket, initial, masks)
        found.append(("lottery", _accuracy(_train(ticket, data, how, how.epochs, how.lr, seed, "step", masks), test)))
    return found


def _train(
    model: nn.Module, data: Data, how: Protocol, epochs: int, lr: float, seed: int, schedule: str,
    masks: dict[str, Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    fine_tune(
        model, data, epochs=epochs, lr=lr, weight_decay=how.weight_decay, schedule=schedule, masks=masks, seed=seed
    )
    return model


def _accuracy(model: nn.Module, test: Sequence[Any]) -> float:
    return evaluate(model, test, ("accuracy",))["accuracy"]


METHOD = method(
    Method(
        name="rethinking-value",
        title="Rethinking the Value of Network Pruning",
        arxiv="1810.05270",
        units=("channel", "weight"),
        when=("after training",),
        how="comparison of fine-tuning with Scratch-E, Scratch-B and lottery initialisation",
        run=rethinking_value,
        needs=("data", "labels", "training", "builder"),
        claim="For structured pruning, training the pruned architecture from scratch matches fine-tuning it.",
    )
)
