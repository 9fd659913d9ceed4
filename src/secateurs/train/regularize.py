"""Penalties and soft resets that act between backward pass and optimizer step, or between epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.errors import ModelError, OptionError
from ..core.select import top
from .scope import prunable_weights

__all__ = ["penalized", "slimming_penalty", "soft_filter_step"]


def penalized(optimizer: Optimizer, penalty: Callable[[], Tensor | None]) -> RemovableHandle:
    """The handle of a hook that adds the gradient of `penalty()` right before every step of `optimizer`.

    For a penalty that does not look at data: it counts once a step, however many batches that has, and after gradients
    were clipped. None for no penalty at a step.
    """

    def add(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        with torch.enable_grad():
            found = penalty()
            if found is not None:
                found.backward()

    # Lightning and Accelerate wrap the optimizer that steps.
    return getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(add)


@torch.no_grad()
def slimming_penalty(model: nn.Module, strength: float = 1e-4) -> Tensor:
    """`strength · Σ|γ|` over all batch-norm scales, with `strength · sign(γ)` added to their gradients.

    Call it between `loss.backward()` and `optimizer.step()`. sign(0) = 0, so a scale that reached zero is not pushed.
    Network slimming (Liu et al., ICCV 2017, arXiv 1708.06519).

    Args:
        model: its batch norms' scales must have gradients; frozen scales are left alone.
        strength: 1e-4 for VGG, 1e-5 for ResNet and DenseNet (rethinking-value code, section on slimming).

    Raises:
        ModelError: no batch norm with a trainable scale.
        OptionError: a negative strength, or no backward pass before the call.
    """
    if strength < 0:
        raise OptionError(f"strength must be 0 or more, got {strength}.")
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    scales = [m.weight for m in norms if m.weight is not None and m.weight.requires_grad]
    if not scales:
        raise ModelError(f"{type(model).__name__} has no batch norm with a trainable scale: there is nothing to slim.")
    gradients = [scale.grad for scale in scales if scale.grad is not None]
    if len(gradients) < len(scales):
        raise OptionError("slimming_penalty adds to gradients: call it after loss.backward().")
    for scale, gradient in zip(scales, gradients, strict=True):
        gradient.add_(scale.sign(), alpha=strength)
    return strength * torch.stack([scale.abs().sum() for scale in scales]).sum()


@torch.no_grad()
def soft_filter_step(
    model: nn.Module,
    sparsity: float = 0.3,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """Per convolution weight the bool mask [filters] of those kept, after the others were zeroed; nothing is frozen.

    In each convolution the `⌊filters · sparsity⌋` filters of smallest L2 norm become zero and go on learning. Call it
    before training and after every epoch. Soft filter pruning (He et al., IJCAI 2018, arXiv 1808.06866).

    Args:
        model: changed in place; transposed convolutions are left alone.
        sparsity: share of filters zeroed, in [0, 1); 0.3 is the code's default (a kept share of 0.7).
        scope: patterns of the convolution weights, see `prunable_weights`; None for all.
        ignore: patterns of those to leave alone.

    Raises:
        OptionError: a sparsity outside [0, 1), or a pattern that matches nothing.
        ModelError: no convolution in the scope.
    """
    if not 0 <= sparsity < 1:
        raise OptionError(f"sparsity must lie in [0, 1), got {sparsity}.")
    weights = {name: w for name, w in prunable_weights(model, scope, ignore).items() if _is_convolution(model, name)}
    if not weights:
        raise ModelError(f"{type(model).__name__} has no convolution in the scope, so there are no filters to soften.")
    kept: dict[str, Tensor] = {}
    for name, weight in weights.items():
        filters = weight.shape[0]
        # 0.29 · 100 is 28.999… in binary.
        gone = int(filters * sparsity + 1e-9)
        kept[name] = top(weight.flatten(1).float().norm(dim=1), filters - gone)
        weight[~kept[name]] = 0
    return kept


def _is_convolution(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
