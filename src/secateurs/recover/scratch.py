"""Training the pruned architecture from scratch: how long, and from which initial weights.

Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019, arXiv 1810.05270. Scratch-E trains for the dense
network's epochs, Scratch-B for its compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, OptionError
from .context import seeded
from .schedules import Rate, steps_down

__all__ = ["ScratchSchedule", "reinitialize", "scratch_epochs"]


@dataclass(frozen=True)
class ScratchSchedule:
    """How long to train, and after which epochs the learning rate falls to a tenth."""

    epochs: int
    milestones: tuple[int, ...]

    @property
    def rate(self) -> Rate:
        """The learning-rate rule for `fine_tune(schedule=…)`."""
        return steps_down([m / self.epochs for m in self.milestones])


def scratch_epochs(
    epochs: int,
    dense_cost: float,
    pruned_cost: float,
    budget: Literal["E", "B"] = "B",
    *,
    rule: Literal["cifar", "imagenet"] = "cifar",
    fine_tuning: int = 0,
) -> ScratchSchedule:
    """The schedule that trains the pruned network as long (E), or with as much compute (B), as the dense one.

    cifar: `⌊epochs · ratio⌋`, falls at ½ and ¾ (rounded down). imagenet: twice the epochs from ratio 2 on, else
    `⌊epochs · ratio⌋`; falls at every third.

    Args:
        epochs: of the dense network (the paper: 160 on CIFAR, 90 on ImageNet).
        dense_cost: FLOPs or MACs of the dense network.
        pruned_cost: the same of the pruned one.
        budget: "E" for equal epochs, "B" for equal compute.
        rule: whose arithmetic.
        fine_tuning: epochs that the pruned network would be fine-tuned for; they are added to B, which makes the match
            strict. 0: the paper's definition.

    Raises:
        OptionError: the pruned network costs more than the dense one, a cost is not positive, or an unknown rule.

    >>> scratch_epochs(160, 252_572_938, 183_137_866)
    ScratchSchedule(epochs=220, milestones=(110, 165))
    """
    if budget not in ("E", "B") or rule not in ("cifar", "imagenet"):
        raise OptionError(f"budget must be E or B and rule cifar or imagenet, got {budget!r} and {rule!r}.")
    if epochs < 1 or fine_tuning < 0 or not pruned_cost > 0:
        raise OptionError(
            "epochs must be 1 or more, fine_tuning 0 or more and costs positive; "
            f"got {epochs}, {fine_tuning} and {pruned_cost}."
        )
    if budget == "B" and pruned_cost > dense_cost:
        raise OptionError(
            f"the pruned network costs {pruned_cost:g}, more than the dense one's {dense_cost:g}: there is no compute "
            "to give back, so use Scratch-E."
        )
    length = epochs if budget == "E" else _matched(epochs, dense_cost, pruned_cost, rule) + fine_tuning
    if rule == "cifar":
        return ScratchSchedule(length, (length // 2, length * 3 // 4))
    return ScratchSchedule(length, tuple(m for m in (length // 3, 2 * (length // 3)) if m))


def _matched(epochs: int, dense_cost: float, pruned_cost: float, rule: str) -> int:
    if rule == "imagenet" and dense_cost >= 2 * pruned_cost:
        return 2 * epochs
    # The product first: 160 · (a/b) may fall just short of an integer that (160 · a)/b meets.
    return int(epochs * dense_cost / pruned_cost)


@torch.no_grad()
def reinitialize(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    batch_norm: float = 1.0,
    linear: Literal["normal", "fan-out"] = "normal",
) -> None:
    """None; the model has fresh random weights, drawn for its density and zero where `masks` say so.

    Convolutions: `N(0, √(2/n))` with `n = non-zeros / inputs`: k·k·outputs when dense, less when sparse. Linear
    layers: `N(0, 0.01)`, or with `linear="fan-out"` the convolutions' rule. Batch norms: scale `batch_norm`, shift 0,
    fresh statistics. Biases: 0. Other layers: their own `reset_parameters`.

    Args:
        model: changed in place.
        masks: per parameter a bool mask that broadcasts to it, True stays; None for a dense (or cut) model.
        seed: of all draws; the global random state is as before.
        batch_norm: 1 (the paper's ResNets) or 0.5 (its VGGs).
        linear: see above; N(0, 0.01) starves networks of several linear layers without normalisation.

    Raises:
        ModelError: a layer with parameters and no rule, named.
        OptionError: a mask of no parameter of the model, or an unknown `linear`.
    """
    if linear not in ("normal", "fan-out"):
        raise OptionError(f"linear must be normal or fan-out, got {linear!r}.")
    keep = dict(masks or {})
    strange = [name for name in keep if name not in dict(model.named_parameters(remove_duplicate=False))]
    if strange:
        raise OptionError(f"masks are given for {', '.join(strange[:3])}, which the model does not have.")
    owners = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    for name, module in owners.items():
        if not _has_rule(module):
            raise ModelError(
                f"there is no rule to draw {name} ({type(module).__name__}) anew; build a fresh model instead."
            )
    with seeded(seed):
        for name, module in owners.items():
            _draw(module, keep.get(f"{name}.weight" if name else "weight"), batch_norm, linear)
    for name, mask in keep.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0)


def _has_rule(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or hasattr(module, "reset_parameters")


def _draw(module: nn.Module, mask: Tensor | None, batch_norm: float, linear: str) -> None:
    match module:
        case nn.modules.conv._ConvNd() | nn.Linear():
            std = 0.01 if isinstance(module, nn.Linear) and linear == "normal" else _fan_out_std(module, mask)
            module.weight.normal_(0, std)
            if module.bias is not None:
                module.bias.zero_()
        case nn.modules.batchnorm._BatchNorm():
            module.reset_parameters()
            if module.weight is not None:
                module.weight.fill_(batch_norm)
        case _:
            reset: Any = module.reset_parameters
            reset()


def _fan_out_std(module: nn.modules.conv._ConvNd | nn.Linear, mask: Tensor | None) -> float:
    weight = module.weight
    nonzero = weight.numel() if mask is None else int(mask.expand(weight.shape).sum())
    inputs = weight.shape[0 if getattr(module, "transposed", False) else 1]
    # An empty layer is masked to zero whatever its scale.
    return math.sqrt(2 / max(nonzero / inputs, 1))
