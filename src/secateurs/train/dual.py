"""Dual importance: what each weight is worth to one domain, while a penalty keeps those that matter in general.

Zhang et al. 2024, arXiv 2405.06275. A model learns its domain by plain SGD; g is the gradient of its loss at a step of
rate α, so that the weights are about to move by W' - W = -α·g, and G is what they are worth in general:

    L = L_domain + λ·Σ G·(W' - W)²
    ∂L/∂W = g + 2·λ·α²·G·g·H                                                                                       (1)
    S += |g·W - ½·H·W²|, with g the gradient by (1)                                                                (2)

(2) is the second-order change of the loss when W becomes zero, -g·W + ½·H·W², but for its sign. For H stands c·F, with
F the mean of g² over the steps so far, an empirical Fisher diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.budget import units_kept
from ..core.errors import OptionError
from ..core.select import top

__all__ = ["DualImportance", "Form", "Sums", "Terms", "combined", "keep_by_blocks", "penalty", "taylor"]

Form = Literal["fisher", "released"]
# Of the authors' release: its gradients carry the scale of half-precision training, and its curvature is g²/1000.
_LOSS_SCALE, _CURVATURE = 2.0**16, 1e-3


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of the series of one weight tensor, each in its shape.

    Args:
        first: g·W.
        second: -½·H·W².
        third: W³, as the release writes the remainder of third order; else zero.
    """

    first: Tensor
    second: Tensor
    third: Tensor

    @property
    def importance(self) -> Tensor:
        """|first + second + third|."""
        return (self.first + self.second + self.third).abs()


@dataclass(frozen=True)
class Sums:
    """Sums over the steps and the entries of a weight of the sizes of the terms and of what moved it.

    Args:
        first, second, third: of the series.
        added: of what the penalty added to the gradient.
        plain: of the gradient without it.
    """

    first: float = 0.0
    second: float = 0.0
    third: float = 0.0
    added: float = 0.0
    plain: float = 0.0


def penalty(gradient: Tensor, general: Tensor, curvature: Tensor, *, strength: float, lr: float) -> Tensor:
    """2·λ·α²·G·g·H, what the penalty adds to the gradient by (1); it has the sign of g where H is positive.

    Args:
        gradient, general, curvature: g, G and H, of one shape.
        strength: λ.
        lr: α of the coming step.

    >>> g, ones = torch.tensor([0.1, -0.2]), torch.ones(2)
    >>> penalty(g, ones, g.square(), strength=0.1, lr=0.5)
    tensor([ 5.0000e-05, -4.0000e-04])
    """
    return 2 * strength * lr**2 * general * gradient * curvature


def combined(domain: Tensor, general: Tensor, strength: float) -> Tensor:
    """domain / mean + λ·general / mean: two importances of one weight tensor, in which λ has no unit.

    One that is zero throughout takes no part.

    Args:
        domain, general: not negative, of one shape.
        strength: λ.

    >>> combined(torch.tensor([1.0, 3.0]), torch.tensor([30.0, 10.0]), 2.0)
    tensor([3.5000, 2.5000])
    """
    return _share(domain) + strength * _share(general)


def taylor(weight: Tensor, gradient: Tensor, curvature: Tensor, *, cubic: bool = False) -> Terms:
    """The series of minus the change of the loss when `weight` becomes zero: g·W - ½·H·W², and W³ if `cubic`.

    >>> made = taylor(torch.tensor(0.5), torch.tensor(1.3), torch.tensor(2.0))
    >>> round(float(made.first), 4), round(float(made.second), 4)
    (0.65, -0.25)
    """
    third = weight**3 if cubic else torch.zeros_like(weight)
    return Terms(gradient * weight, -0.5 * curvature * weight.square(), third)


def keep_by_blocks(scores: Tensor, sparsity: float, blocks: int = 1) -> Tensor:
    """The mask of the highest, the same share of each run of columns: bool [rows, columns].

    As many stay as of the matrix in one piece, and of each run that number within one; ties by index.

    Args:
        scores: [rows, columns].
        sparsity: the share that goes.
        blocks: into how many runs the columns are divided, of lengths that differ by at most 1; 1 is the whole matrix.

    >>> keep_by_blocks(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 0.5, 2).tolist()
    [[True, False, True, False]]
    """
    rows, columns = scores.shape
    blocks = min(blocks, columns)
    edges = [columns * number // blocks for number in range(blocks + 1)]
    counts = [units_kept(sparsity, rows * edge) for edge in edges]
    parts = zip(pairwise(edges), pairwise(counts), strict=True)
    return torch.cat([top(scores[:, a:b], after - before) for (a, b), (before, after) in parts], 1)


class DualImportance:
    """S of a model's weights, gathered before every step of the optimizer, whose gradients the penalty changes.

    It steps like a train-time pruner (`recover.finetune.StepPruner`) but removes nothing. S is of gradients that are
    not clipped.

    Args:
        model: in training.
        optimizer: plain SGD, which moves the weights by -α·g.
        names: of the weights.
        general: G by name; needed unless `strength` is 0.
        strength: λ.
        form: "fisher", equations (1) and (2); "released", as the authors' code has it: gradients times 2¹⁶, to which
            λ·2·α²·G·g²/1000 is added, without a sign, and S += |g·W + (g·W)²/2000 + W³|.
        fisher_scale: c; the number of samples that the loss of a batch is the mean over makes c·F an estimate of its
            curvature. Without effect for "released".
        clip_norm: largest norm of all gradients, penalty included, with which the weights move; None for no limit.

    Attributes:
        scores: S by name, float32 or wider, in the weight's shape.

    Raises:
        OptionError: a weight without G, or one that the optimizer does not train.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        names: Sequence[str],
        general: Mapping[str, Tensor],
        *,
        strength: float = 0.1,
        form: Form = "fisher",
        fisher_scale: float = 1.0,
        clip_norm: float | None = None,
    ) -> None:
        self._weights = {name: model.get_parameter(name) for name in names}
        self._optimizer, self._general = optimizer, general
        self._strength, self._form, self._scale, self._clip = strength, form, fisher_scale, clip_norm
        self._check()
        self.scores = {name: _wide(torch.zeros_like(w)).detach() for name, w in self._weights.items()}
        self._fisher = {} if form == "released" else {name: torch.zeros_like(s) for name, s in self.scores.items()}
        self._sums = {name: score.new_zeros(5) for name, score in self.scores.items()}
        self._steps = 0
        self._handle = optimizer.register_step_pre_hook(lambda *_: self._observe())

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._steps

    @property
    def sums(self) -> dict[str, Sums]:
        """What came together by weight; a weight that no gradient reached has `plain` 0."""
        return {name: Sums(*map(float, found)) for name, found in self._sums.items()}

    def step(self) -> None:
        """None; an optimizer step has been taken."""
        self._steps += 1

    def finalize(self) -> dict[str, Tensor]:
        """`scores`; the optimizer is not watched any longer."""
        self._handle.remove()
        return self.scores

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors only, to go with the states of model and optimizer."""
        return {"steps": self._steps, "scores": self.scores, "fisher": self._fisher, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; gathering goes on as if it had not stopped."""
        self._steps = int(state["steps"])
        for kind, own in (("scores", self.scores), ("fisher", self._fisher), ("sums", self._sums)):
            for name, tensor in own.items():
                tensor.copy_(state[kind][name])

    @torch.no_grad()
    def _observe(self) -> None:
        """None; what the gradients say is added up, and they are those of the penalised loss."""
        groups = self._optimizer.param_groups
        rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
        for name, weight in self._weights.items():
            plain = _wide(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            refined, terms = self._refined(name, _wide(weight), plain, rates[id(weight)])
            self.scores[name] += terms.importance
            kinds = (terms.first, terms.second, terms.third, refined - plain, plain)
            self._sums[name] += torch.stack([kind.abs().sum() for kind in kinds])
            if weight.grad is not None:
                weight.grad.copy_(refined)
        if self._clip is not None:
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self._clip)

    def _refined(self, name: str, weight: Tensor, plain: Tensor, lr: float) -> tuple[Tensor, Terms]:
        """The gradient of the penalised loss, and the terms of the series."""
        if self._form == "released":
            scaled = plain * _LOSS_SCALE
            refined = scaled + self._added(name, scaled, scaled * _CURVATURE, lr)
            return refined / _LOSS_SCALE, taylor(weight, refined, -_CURVATURE * refined.square(), cubic=True)
        fisher = self._fisher[name].lerp_(plain.square(), 1 / (self._steps + 1))
        curvature = self._scale * fisher
        refined = plain + self._added(name, plain, curvature, lr)
        return refined, taylor(weight, refined, curvature)

    def _added(self, name: str, gradient: Tensor, curvature: Tensor, lr: float) -> Tensor | float:
        if not self._strength:
            return 0.0
        return penalty(gradient, self._general[name].to(gradient), curvature, strength=self._strength, lr=lr)

    def _check(self) -> None:
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        fixed = [name for name, weight in self._weights.items() if id(weight) not in trained]
        if fixed:
            raise OptionError(f"the optimizer does not train {', '.join(fixed[:3])}: its importance cannot be found.")
        missing = [name for name in self._weights if self._strength and name not in self._general]
        if missing:
            raise OptionError(f"there is no general importance of {', '.join(missing[:3])}: give it, or strength=0.")


def _share(importance: Tensor) -> Tensor:
    mean = importance.mean()
    return importance / mean if bool(mean) else importance


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
