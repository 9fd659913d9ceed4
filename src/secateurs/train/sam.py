"""Sharpness-aware minimisation: the gradient is taken where the loss nearby is worst.

Foret et al., ICLR 2021, arXiv 2010.01412, and its adaptive form (Kwon et al., ICML 2021, arXiv 2102.11600). From the
gradient g of all weights w together,

    e = ρ·g / (‖g‖ + 10⁻¹²)                        adaptive: e = ρ·w²g / (‖|w|·g‖ + 10⁻¹²)

the weights move to w + e, the gradient is taken again there, the weights come back and any optimizer steps with it. A
masked weight has no gradient and does not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import OptionError

__all__ = ["SAM", "statistics_kept"]

# Keeps a gradient of zero from being divided by its norm.
_LEAST = 1e-12


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimisation for any optimizer and loop; it keeps nothing between steps.

    Inside a loop of one's own, after the first backward pass:

        with sam.perturbed(optimizer):
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
        optimizer.step()

    Args:
        rho: ρ, how far away the gradient is taken; 0.05 in the paper, and 0 is the plain optimizer, bit for bit.
        adaptive: measure the distance relative to each weight.

    Raises:
        OptionError: a rho that is negative or not finite.
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise OptionError(f"SAM: rho must be a number of at least 0, got {self.rho}.")

    @contextmanager
    def perturbed(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, the weights are at w + e; afterwards, also if the body raises, they are bit for bit as before.

        Args:
            optimizer: its weights move together, by the gradients that they have now; those without one stay.

        Raises:
            OptionError: there is no gradient, because no backward pass came before.
        """
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            raise OptionError("SAM moves along gradients: call loss.backward() before it.")
        before = [p.detach().clone() for p in moved]
        self._climb(moved)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(moved, before, strict=True):
                    parameter.copy_(value)

    def step(self, optimizer: Optimizer, closure: Callable[[], Tensor]) -> Tensor:
        """The loss before the step, detached: two backward passes and one step of the optimizer.

        Args:
            optimizer: any that steps from gradients.
            closure: computes the loss of the same batch each time; it calls neither backward nor zero_grad.
        """
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = closure()
            loss.backward()
            with self.perturbed(optimizer):
                optimizer.zero_grad()
                closure().backward()
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _climb(self, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        weights = [p.abs().float() for p in parameters] if self.adaptive else None
        scaled = gradients if weights is None else [w * g for w, g in zip(weights, gradients, strict=True)]
        device = parameters[0].device
        norm = torch.stack([g.norm().to(device) for g in scaled]).norm()
        for place, (parameter, part) in enumerate(zip(parameters, scaled, strict=True)):
            way = part if weights is None else part * weights[place]
            parameter.add_((way * (self.rho / (norm.to(way.device) + _LEAST))).to(parameter.dtype))


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode do not move their running statistics, as in SAM's second forward pass."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, values in zip(norms, before, strict=True):
                for name, buffer in norm.named_buffers():
                    buffer.copy_(values[name])
