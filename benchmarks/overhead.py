"""What a train-time pruner costs in each training step, and what a mask update costs: ResNet-56, batch 128.

All contestants take one step in turn, starting with another one each round, and quotients are taken within a round. The
first round only warms up. One thread, and seconds of processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateurs as sec
from benchmarks.cifar import ResNet
from benchmarks.record import holds, record

BATCH, ROUNDS, EVERY = 128, 9, 4
DENSE = "none"
END = 5 * EVERY
PRUNERS: dict[str, Callable[[nn.Module, Optimizer], Any]] = {
    "GradualMagnitude": lambda m, o: sec.GradualMagnitude(m, o, sparsity=0.9, initial=0.5, end=END, every=EVERY),
    "GraNet": lambda m, o: sec.GraNet(m, o, sparsity=0.9, initial=0.5, end=END, until=2 * END, every=EVERY),
    "PDP": lambda m, o: sec.PDP(m, o, sparsity=0.9, begin=0, every=EVERY, rise=0.2),
    # Its masks are chosen anew in every step.
    "SRSTE": lambda m, o: sec.SRSTE(m, o, pattern="2:4"),
}


@dataclass
class Contestant:
    """A network in training, with a pruner or without one.

    Attributes:
        whole: seconds of each step.
        last: of these, the optimizer's and the pruner's steps.
    """

    model: nn.Module
    optimizer: Optimizer
    pruner: Any
    whole: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        """None; one step is taken and timed."""
        start = process_time()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        between = process_time()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        end = process_time()
        self.whole.append(end - start)
        self.last.append(end - between)


def contestant(name: str) -> Contestant:
    torch.manual_seed(0)
    model = ResNet(56)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    return Contestant(model, optimizer, None if name == DENSE else PRUNERS[name](model, optimizer))


def timed() -> dict[str, Contestant]:
    """Every contestant after `ROUNDS` steps."""
    every = {name: contestant(name) for name in (DENSE, *PRUNERS)}
    names = list(every)
    for turn in range(ROUNDS):
        x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            every[name].step(x, y)
    return every


def row(name: str, every: dict[str, Contestant]) -> tuple[tuple[str, ...], float, float]:
    """The line of a pruner in the table, its overhead, and the steps that a mask update takes."""
    dense, one = every[DENSE], every[name]
    updates = [i for i in range(1, ROUNDS) if (i + 1) % EVERY == 0]
    # All of its steps are updates, and so is its steady state.
    always = name == "SRSTE"
    steady = [i for i in range(1, ROUNDS) if always or i not in updates]
    quotients = sorted(one.whole[i] / dense.whole[i] for i in steady)
    own = median(one.last[i] - dense.last[i] for i in steady)
    step = median(dense.whole[1:])
    update = own / step if always else median(one.last[i] - median(one.last[j] for j in steady) for i in updates) / step
    overhead = median(quotients) - 1
    shown = (
        name,
        f"{1 + overhead:.3f} ({quotients[0]:.3f}–{quotients[-1]:.3f})",
        f"{1000 * own:.1f} ({own / step:.1%})",
        f"{update:.3f}" + (" in every step" if always else ""),
    )
    return shown, overhead, update


def main() -> None:
    """Times all and records."""
    torch.set_num_threads(1)
    every = timed()
    rows = [row(name, every) for name in PRUNERS]
    worst, longest = max(overhead for _, overhead, _ in rows), max(update for _, _, update in rows)
    record(
        "overhead",
        system="core",
        claim="Between mask updates a train-time pruner costs at most 5% of a training step, and an update less than "
        "two steps.",
        held=f"At most {worst:.1%} ({holds(worst <= 0.05)}); an update takes at most {longest:.3f} of a step "
        f"({holds(longest < 2)}).",
        columns=(
            "pruner",
            "step with / without (lowest–highest)",
            "after backward, ms (of a step)",
            "mask update, in steps",
        ),
        rows=[shown for shown, _, _ in rows],
        data=f"random images, batch {BATCH}, ResNet-56, SGD with momentum; a step without pruner takes "
        f"{median(every[DENSE].whole[1:]):.2f} s",
        seeds=(0,),
        note=f"Medians of {ROUNDS - 1} rounds, in turn, paired by round; one thread, processor time. Whole steps "
        "vary by more than a pruner costs; the third column, what it adds to the optimizer's step, hardly varies. What "
        "it adds to the backward pass, one operation for each weight, is in the second only.",
    )


if __name__ == "__main__":
    main()
