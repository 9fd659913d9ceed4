"""N:M training in any loop: SR-STE, a straight-through gradient with a pull on what the pattern removes.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.
A pull that grows, masks that change every few steps and scores that know the inputs make it the training of AST
(arXiv 2407.20584).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.budget import Budget
from ..core.comparison import Comparison
from ..core.errors import BudgetError, OptionError
from .masking import Pull, pack, unpack
from .pruner import Pruner
from .scope import divided_weights, input_axes, prunable_weights
from .scoring import State
from .update import Moment, Rule

__all__ = ["SRSTE", "Annealed", "Compared", "Counted", "Every", "Flips", "flips_of", "input_axes", "straight_through"]


@dataclass(frozen=True)
class Every:
    """A schedule of one sparsity from the start on, with a mask update at step 0 and every so many steps after it.

    Args:
        final: the sparsity.
        every: steps between updates; None for the one at step 0 alone.
        until: the last step at which one may fall; None for no limit.
    """

    final: float
    every: int | None = 1
    until: int | None = None

    @property
    def end(self) -> int:
        """0: whenever training ends, the sparsity is met."""
        return 0

    def __call__(self, step: int) -> float:
        return self.final

    def due(self, step: int) -> bool:
        if self.every is None or step == 0:
            return step == 0
        return step % self.every == 0 and (self.until is None or step <= self.until)


@dataclass(frozen=True)
class Annealed:
    """A pull that rises on a line from 0 to `peak` and stays: λ(t) = λ·min(t / T₀, 1) (AST).

    >>> pull = Annealed(1e-4, steps=10_000)
    >>> pull(0), pull(5_000), pull(20_000)
    (0.0, 5e-05, 0.0001)

    Args:
        peak: λ, at least 0.
        steps: T₀; 0 for the peak from the start on.

    Raises:
        OptionError: one is negative.
    """

    peak: float
    steps: int

    def __post_init__(self) -> None:
        if not self.peak >= 0 or self.steps < 0:
            raise OptionError(f"a pull and the steps in which it rises must be 0 or more, got {self}.")

    def __call__(self, step: int) -> float:
        return self.peak if step >= self.steps else self.peak * (step / self.steps)


@dataclass(frozen=True)
class Compared:
    """Of each row, or of every run of inputs, those weights stay whose |w|, or |w|·‖x‖, is highest; ties by index.

    A pattern holds at each position of a kernel by itself. Scores are float32 or wider, whatever the weights are.

    Args:
        comparison: what is compared, and how many stay.
        norms: by weight name what multiplies |w|, of a shape that broadcasts to the weight's; none for |w| alone.
        axes: of the inputs of each weight, by name, where it is not 1; see `scope.input_axes`.
    """

    comparison: Comparison
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {}

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        return {name: self.keep(name, weight) for name, weight in moment.weights.items()}, state

    def keep(self, name: str, weight: Tensor) -> Tensor:
        """What stays of one weight: bool, of its shape."""
        scores = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        if name in self.norms:
            scores = scores * self.norms[name].to(scores.device)
        axis = self.axes.get(name, 1)
        if self.comparison.pattern is None and axis == 1:
            return self.comparison.keep(scores.flatten(1)).view(scores.shape)
        rows = scores.movedim(axis, -1)
        return self.comparison.keep(rows.flatten(0, -2)).view(rows.shape).movedim(-1, axis)


@dataclass(frozen=True)
class Flips:
    """How many entries of all masks changed at an update.

    Args:
        step: of the update.
        previous: entries that differ from the masks before it.
        initial: entries that differ from the first masks.
    """

    step: int
    previous: int
    initial: int


@dataclass(frozen=True)
class Counted:
    """A rule whose state remembers, for each update after the first, the `Flips` that it made; see `flips_of`."""

    rule: Rule

    def init(self, weights: Mapping[str, Tensor]) -> State:
        return {"first": {}, "flips": {}, **self.rule.init(weights)}

    def update(self, moment: Moment, state: State) -> tuple[dict[str, Tensor], State]:
        masks, after = self.rule.update(moment, {k: v for k, v in state.items() if k not in ("first", "flips")})
        if not state["first"]:
            return masks, {"first": {name: pack(mask) for name, mask in masks.items()}, "flips": {}, **after}
        first = {name: unpack(bits, masks[name].shape) for name, bits in state["first"].items()}
        found = torch.tensor([moment.step, _differing(masks, moment.masks), _differing(masks, first)])
        return masks, {"first": state["first"], "flips": {**state["flips"], f"{moment.step:09}": found}, **after}


def flips_of(pruner: Pruner) -> tuple[Flips, ...]:
    """What a pruner with a `Counted` rule, as `straight_through` makes, has seen change so far, update by update."""
    found = pruner.state_dict()["rule"].get("flips", {})
    return tuple(Flips(*found[key].tolist()) for key in sorted(found))


def straight_through(
    model: nn.Module,
    optimizer: Optimizer,
    weights: Mapping[str, nn.Parameter],
    comparison: Comparison,
    *,
    pull: Pull = 2e-4,
    every: int | None = 1,
    until: int | None = None,
    norms: Mapping[str, Tensor] | None = None,
    counted: bool = False,
    debug: bool = False,
) -> Pruner:
    """A `Pruner` that trains the chosen weights as `SRSTE` does, with any comparison.

    Args:
        weights: by qualified name; their inputs must be divided by the comparison's pattern.
        comparison: what stays at every update.
        every, until: see `Every`.
        norms: see `Compared`.
        counted: remember how many entries flip; see `flips_of`.
        others: as for `SRSTE`.

    Raises:
        OptionError: the pattern does not divide a weight's inputs; a negative pull or a period below 1.
    """
    if every is not None and every < 1:
        raise OptionError(f"masks change every 1 step or more, or never with every=None; got {every}.")
    axes = input_axes(model, weights)
    for name, weight in weights.items():
        comparison.check(weight.movedim(axes[name], 1), name)
    rule: Rule = Compared(comparison, norms or {}, axes)
    schedule = Every(comparison.removed, every, until)
    return Pruner(
        model, optimizer, schedule, Counted(rule) if counted else rule, weights, revive="straight-through", pull=pull,
        debug=debug,
    )  # fmt: skip


def SRSTE(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    pattern: str = "2:4",
    pull: Pull = 2e-4,
    every: int = 1,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    debug: bool = False,
) -> Pruner:
    """A `Pruner` that trains an N:M sparse network from its first step on.

    Forward and backward pass see the sparse weights `W̃ = E ⊙ W`; the dense W waits outside the model and is trained by

        W ← W − γ·(∂L/∂W̃ + λ·(1 − E) ⊙ W)

    which the optimizer does with whatever momentum and weight decay it has; then E is chosen anew from |W|.

    Args:
        model: pruned in place. Weights whose inputs the pattern does not divide stay dense.
        optimizer: the one that trains it.
        pattern: how many of how many consecutive inputs stay.
        pull: λ (2e-4, the paper); 0 is the plain straight-through estimator. Or a function from steps taken to λ, as
            `train.sr_ste.Annealed`.
        every: steps from one choice of E to the next (1, the paper; AST takes 10).
        scope: patterns of the weights to prune; each must then be divided by the pattern.
        ignore: patterns of weights to leave out.
        debug: check the masks at every step.

    Raises:
        BudgetError: not a pattern; OptionError: it divides none of the weights, or not all in `scope`, or a negative
            pull.
        ModelError: nothing to prune.

    >>> layer = nn.Linear(8, 2)
    >>> pruner = SRSTE(layer, torch.optim.SGD(layer.parameters(), 0.1))
    >>> pruner.masks["weight"].view(-1, 4).sum(1).tolist()
    [2, 2, 2, 2]
    """
    chosen = Budget.parse(pattern).pattern
    if chosen is None:
        raise BudgetError(f"SR-STE needs a pattern such as '2:4', got {pattern!r}.")
    weights = prunable_weights(model, scope, ignore)
    axes = input_axes(model, weights)
    fitting = divided_weights(weights, chosen.of, str(chosen), all_of_them=scope is not None, axes=axes)
    comparison = Comparison.of(chosen)
    return straight_through(model, optimizer, fitting, comparison, pull=pull, every=every, debug=debug)


def _differing(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> int:
    return sum(int((mask ^ others[name].to(mask.device)).sum()) for name, mask in masks.items())
