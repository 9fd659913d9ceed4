"""Gates on coupled units, trained by gradient to an expected size: L0 regularisation by an augmented Lagrangian.

One hard-concrete gate a unit (`hard_concrete`) multiplies tensors that carry the unit. The expected number of units of
a group is Σ P(z > 0), and the expected size of the model is its cost at these numbers, for gates are independent and
costs are products of them. With s the expected sparsity and t(step) its target,

    penalty = λ1·(s - t) + λ2·(s - t)²,                                                                              (1)

which the gates descend and λ1, λ2, both 0 at first, ascend (Wang et al., arXiv 1910.04732; CoFi, Sheared-LLaMA,
Compresso). λ2 never falls, so a target that the gates can reach is reached, given steps enough.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW, Optimizer

from ..core.cost import CostModel
from ..core.errors import OptionError
from ..core.schedule import Schedule
from ..core.units import Group
from .hard_concrete import LIMIT, clamp_, deterministic, draw, extract, open_probability
from .regularize import penalized
from .scope import canonical_names
from .spread import Part, multiplied, parts_of

__all__ = ["GatePruner", "Gated", "Sparsity", "expected_sparsity", "gate_optimizer", "highest_sparsity", "lagrangian"]

Tensors = Mapping[str, Tensor]
# From the expected number of units of each group to the expected sparsity.
Sparsity = Callable[[Tensors], Tensor]
# From log-alphas and expected numbers of units, by group, to the units that stay.
Decide = Callable[[Tensors, Mapping[str, float]], Mapping[str, Tensor]]
_OPEN, _SAMPLED, _FIXED = range(3)
_OFF = 0.01


def lagrangian(sparsity: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """(1) for multipliers [λ1, λ2].

    >>> lagrangian(torch.tensor(0.5), 0.3, torch.tensor([1.0, 2.0])).item().__round__(6)
    0.28
    """
    gap = sparsity - target
    return multipliers[0] * gap + multipliers[1] * gap.square()


def expected_sparsity(metric: str, costs: CostModel, sizes: Mapping[str, int]) -> Sparsity:
    """The function from expected numbers of units to the expected share that goes; differentiable.

    Args:
        metric: a cost of the model, or "sparsity" for the number of units.
        costs: as functions of the units kept.
        sizes: units of each group.
    """
    if metric == "sparsity":
        return lambda counts: 1 - torch.stack(list(counts.values())).sum() / sum(sizes.values())
    whole = costs.total(metric)
    # A cost is a polynomial, which takes tensors as well as numbers.
    return lambda counts: 1 - cast(Tensor, costs.total(metric, cast(Any, counts))) / whole


def highest_sparsity(sparsity: Sparsity, sizes: Mapping[str, int]) -> float:
    """The expected sparsity with all gates as closed as they can be: log-alphas are clamped.

    >>> round(highest_sparsity(expected_sparsity("sparsity", CostModel({}), {"a": 4}), {"a": 4}), 4)
    0.9529
    """
    least = open_probability(torch.tensor(-LIMIT))
    return float(sparsity({name: size * least for name, size in sizes.items()}))


class Gated(nn.Module):
    """A model whose units are multiplied by gates; its weights are never written to while it trains.

    Gates are open (1) at first, then drawn anew at each forward pass in training and without noise in evaluation, and
    fixed in the end. `GatePruner` leads from one to the next.

    Args:
        model: called with what this is called with.
        groups: the units; a gate multiplies the member tensors, whatever their roles, so give those members alone that
            are to be multiplied. Names of tensors that the model does not have are left out.
        starts: by group the mean of the first log-alphas, whose standard deviation is 0.01.
        seed: of these.

    Attributes:
        log_alpha: [units of all groups].
        multipliers: [λ1, λ2].
    """

    values: Tensor
    phase: Tensor

    def __init__(self, model: nn.Module, groups: Sequence[Group], starts: Mapping[str, float], seed: int = 0) -> None:
        super().__init__()
        self.model, self.groups = model, tuple(groups)
        self._sizes = [group.size for group in self.groups]
        device = next(model.parameters()).device
        noise = torch.randn(sum(self._sizes), generator=torch.Generator().manual_seed(seed))
        means = torch.cat([torch.full((group.size,), starts[group.name]) for group in self.groups])
        self.log_alpha = nn.Parameter((means + 0.01 * noise).to(device))
        self.multipliers = nn.Parameter(torch.zeros(2, device=device))
        self.register_buffer("values", torch.ones_like(self.log_alpha, requires_grad=False))
        self.register_buffer("phase", torch.tensor(_OPEN))
        self._parts = self._found_parts()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with its gates as they are now."""
        if int(self.phase) == _OPEN:
            return self.model(*args, **kwargs)
        raw = dict(self.model.named_parameters())
        return functional_call(self.model, self._multiplied(raw, self.gates()), args, kwargs)

    def gates(self) -> dict[str, Tensor]:
        """z by group; drawn anew at each call where gates are random."""
        if int(self.phase) != _SAMPLED:
            return self._split(self.values)
        return self._split(draw(self.log_alpha) if self.training else deterministic(self.log_alpha))

    def log_alphas(self) -> dict[str, Tensor]:
        """By group, on the CPU and without gradients."""
        return {name: part.cpu() for name, part in self._split(self.log_alpha.detach()).items()}

    def expected(self) -> dict[str, Tensor]:
        """Σ P(z > 0) by group; differentiable."""
        return {name: part.sum() for name, part in self._split(open_probability(self.log_alpha)).items()}

    def kept(self) -> dict[str, Tensor]:
        """By group the bool [units] whose gates are not 0."""
        return {name: (part != 0).cpu() for name, part in self._split(self.values).items()}

    def begin(self) -> None:
        """None; gates are random from now on."""
        self.phase.fill_(_SAMPLED)

    @torch.no_grad()
    def fix(self, keep: Tensors | None = None) -> None:
        """None; gates are what `hard_concrete.extract` makes of them, and stay.

        Args:
            keep: by group the bool [units] that stay; None for the rule of `extract`.
        """
        alphas = self._split(self.log_alpha)
        made = [extract(alpha, None if keep is None else keep[name].to(alpha.device)) for name, alpha in alphas.items()]
        self.values.copy_(torch.cat(made))
        self.phase.fill_(_FIXED)

    @torch.no_grad()
    def fold(self) -> None:
        """None; the weights of `model` are multiplied by the fixed gates, which the model then does without."""
        # Adapters may have been merged since.
        self._parts = self._found_parts()
        parameters = dict(self.model.named_parameters())
        for name, value in self._multiplied(parameters, self._split(self.values)).items():
            parameters[name].copy_(value)
        self.values.fill_(1)

    def _multiplied(self, raw: Tensors, gates: Tensors) -> dict[str, Tensor]:
        return multiplied(raw, [(part, gates[name]) for name, part in self._parts])

    def _found_parts(self) -> list[tuple[str, Part]]:
        """What the gates of each group multiply, by its name."""
        first = canonical_names(self.model)
        return [(group.name, part) for group in self.groups for part in parts_of(group, first, ("out", "in"))]

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        return {g.name: part for g, part in zip(self.groups, flat.split(self._sizes), strict=True)}


def gate_optimizer(
    gated: Gated, parameters: Iterable[nn.Parameter], lr: float, *, gate_lr: float = 0.1, weight_decay: float = 0.0
) -> AdamW:
    """AdamW in three groups: the model's parameters, log-alphas, and multipliers, which ascend.

    Args:
        parameters: those that train, gates among them or not.
        lr: of the model's.
        gate_lr: of the other two (0.1, CoFi and Compresso); no schedule of `fine_tune` changes it.
        weight_decay: of the model's.
    """
    own = {id(gated.log_alpha), id(gated.multipliers)}
    fixed: dict[str, Any] = {"lr": gate_lr, "weight_decay": 0.0, "scheduled": False}
    return AdamW(
        [
            {"params": [p for p in parameters if id(p) not in own], "lr": lr, "weight_decay": weight_decay},
            {"params": [gated.log_alpha], **fixed},
            {"params": [gated.multipliers], "maximize": True, **fixed},
        ]
    )


class GatePruner:
    """Leads gates from open to fixed while a model trains; call `step()` after each `optimizer.step()`.

    The penalty's gradient is added right before each step of the optimizer, so that the loss, clipping and gradient
    accumulation are of the task alone.

    Args:
        gated: trained.
        optimizer: see `gate_optimizer`.
        sparsity: see `expected_sparsity`.
        schedule: t, by step.
        begin: step from which gates are random and the penalty counts.
        fix: step at which they are fixed; None: in `finalize`.
        decide: which units stay; None for the rule of `hard_concrete.extract`.

    Raises:
        OptionError: not 0 <= begin <= schedule's end <= fix.

    Attributes:
        reached: the expected sparsity when gates were fixed; NaN before.
    """

    def __init__(
        self, gated: Gated, optimizer: Optimizer, sparsity: Sparsity, schedule: Schedule, *, begin: int = 0,
        fix: int | None = None, decide: Decide | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= begin <= schedule.end <= (schedule.end if fix is None else fix):
            raise OptionError(
                f"gates begin, their target is reached and they are fixed in this order, got {begin}, {schedule.end} "
                f"and {fix}."
            )
        self._gated, self._sparsity, self.schedule = gated, sparsity, schedule
        self._begin, self._fix, self._decide = begin, fix, decide
        self._step = 0
        self.reached = math.nan
        self._handle = penalized(optimizer, self._penalty)
        self._lead()

    @property
    def target(self) -> float:
        """The expected sparsity that is asked for now."""
        return self.schedule(self._step)

    def sparsity(self) -> Tensor:
        """The expected sparsity of now; differentiable."""
        return self._sparsity(self._gated.expected())

    def step(self) -> None:
        """None; log-alphas are clamped, and gates begin or are fixed if it is time."""
        self._step += 1
        clamp_(self._gated.log_alpha)
        self._lead()

    def finalize(self) -> dict[str, Tensor]:
        """By group the bool [units] that stay; gates are fixed."""
        if int(self._gated.phase) != _FIXED:
            self._close()
        self._handle.remove()
        return self._gated.kept()

    def state_dict(self) -> dict[str, Any]:
        """The step and what was reached; all else is in the state of the gated model."""
        return {"step": self._step, "reached": self.reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; training goes on as if it had not stopped."""
        self._step, self.reached = int(state["step"]), float(state["reached"])

    def _penalty(self) -> Tensor | None:
        if int(self._gated.phase) != _SAMPLED:
            return None
        return lagrangian(self.sparsity(), self.target, self._gated.multipliers)

    def _lead(self) -> None:
        phase = int(self._gated.phase)
        if phase == _OPEN and self._step >= self._begin:
            self._gated.begin()
        if phase != _FIXED and self._fix is not None and self._step >= self._fix:
            self._close()

    def _close(self) -> None:
        gated, self.reached = self._gated, float(self.sparsity().detach())
        if abs(self.reached - self.schedule.final) > _OFF:
            warnings.warn(
                f"gates were fixed at an expected sparsity of {self.reached:.3f}, not {self.schedule.final:.3f}: train "
                "longer, or with a higher rate of the gates.",
                stacklevel=3,
            )
        expected = {name: float(count.detach()) for name, count in gated.expected().items()}
        gated.fix(None if self._decide is None else self._decide(gated.log_alphas(), expected))
