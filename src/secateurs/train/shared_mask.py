"""One trainable mask for a width that many layers share, and operators that can be merged into those layers.

PAT: Liu et al., AAAI 2025, arXiv 2408.14721. Whatever a layer adds to the width passes through

    z = D ⊙ M ⊙ (x + V·U·x),    U [r, d] random, V [d, r] zero, D [d] one, at first                                 (1)
    M = sigmoid(T·w) + b,       T(t) = 1 / (1 - ln max(1, t) / ln N + 1e-6),   b(t) = max(½ - t/N, 0)                (2)

at step t, with logits w [d], zero at first, for all layers together. From 0.8·N on T and w stay as they are. Losses
draw the logits of d' channels above zero and the others below; from N on M is 1 for the d' highest, ties by index, and
0 for the others. In PAT it stays as it is then, which is the same where N is large and T·w has come far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..core.errors import OptionError
from ..core.select import top
from .regularize import penalized

__all__ = [
    "MaskPruner",
    "Operator",
    "SharedMask",
    "count_loss",
    "identity_loss",
    "mask_scalar",
    "offset",
    "separation_loss",
    "temperature",
]

# Share of the steps N after which logits and temperature stay.
_FROZEN = 0.8
_CLAMP = 10.0
_STRENGTH = 10.0
_CENTRE = 0.5


def temperature(step: int, steps: int) -> float:
    """T of (2) at `step` of N = `steps`; from 0.8·N on what it is there.

    >>> round(temperature(5000, 10_000), 4), round(temperature(9000, 10_000), 4)
    (13.2875, 41.2737)
    """
    least = min(max(step, 1), max(int(_FROZEN * steps), 1))
    return 1 / (1 - math.log(least) / math.log(steps) + 1e-6)


def offset(step: int, steps: int) -> float:
    """b of (2).

    >>> offset(1000, 10_000), offset(6000, 10_000)
    (0.4, 0.0)
    """
    return max(0.5 - step / steps, 0.0)


def mask_scalar(logits: Tensor, heat: float, lift: float) -> Tensor:
    """M of (2) for T = `heat` and b = `lift`; the exponent is at most 10, so that it is at least 4.5e-5 above b."""
    return 1 / (1 + (-heat * logits).clamp(max=_CLAMP).exp()) + lift


def count_loss(logits: Tensor, keep: int) -> Tensor:
    """10·|kept - keep| / keep, its gradient passed straight through to every logit.

    >>> round(float(count_loss(torch.zeros(4096), 3072)), 4)
    3.3333
    """
    counted = (logits >= 0).to(logits).sum() + logits.sum() - logits.sum().detach()
    return _STRENGTH * (counted - keep).abs() / keep


def separation_loss(logits: Tensor) -> Tensor:
    """The mean of (w - ½)² over channels that stay, and that of (w + ½)² over those that go: two clusters.

    >>> float(separation_loss(torch.zeros(8)))
    0.25
    """
    stays = logits >= 0
    clusters = ((logits[stays], _CENTRE), (logits[~stays], -_CENTRE))
    # The mean of nothing is no number.
    return torch.stack([(part - centre).square().mean() for part, centre in clusters if part.numel()]).sum()


def identity_loss(reduce: Tensor) -> Tensor:
    """The mean square of U·Uᵀ - I, for U [r, d]: zero where its rows are orthonormal.

    >>> float(identity_loss(torch.eye(2, 5)))
    0.0
    """
    return (reduce @ reduce.T - torch.eye(len(reduce), dtype=reduce.dtype, device=reduce.device)).square().mean()


class SharedMask(nn.Module):
    """The mask of a width: soft while it trains, and what stays in evaluation.

    Args:
        width: d.
        keep: d', the number of channels that stay.
        steps: N.

    Raises:
        OptionError: fewer than 2 steps, or not 0 < keep <= width.
    """

    step: Tensor

    def __init__(self, width: int, keep: int, steps: int) -> None:
        super().__init__()
        if steps < 2 or not 0 < keep <= width:
            raise OptionError(
                f"a shared mask anneals in 2 steps or more and keeps 1 to {width} channels, got {steps} and {keep}."
            )
        self.count, self.steps = keep, steps
        self.logits = nn.Parameter(torch.zeros(width))
        self.register_buffer("step", torch.tensor(0))

    @property
    def frozen(self) -> bool:
        """Whether logits and temperature stay as they are."""
        return int(self.step) >= _FROZEN * self.steps

    def scalar(self) -> Tensor:
        """M [width]; in evaluation, and after N steps, 1 for the channels that stay and 0 for the others."""
        logits, now = self.logits.detach() if self.frozen else self.logits, int(self.step)
        if not self.training or now >= self.steps:
            return self.stays().to(logits)
        return mask_scalar(logits, temperature(now, self.steps), offset(now, self.steps))

    def loss(self) -> Tensor:
        """What draws the logits to d' channels and apart; zero once they are frozen."""
        if self.frozen:
            return self.logits.new_zeros(())
        return count_loss(self.logits, self.count) + separation_loss(self.logits)

    def stays(self) -> Tensor:
        """The d' channels with the highest logits, ties by index: bool [width]."""
        return top(self.logits.detach(), self.count)


class Operator(nn.Module):
    """(1) for what one layer adds to the width, as a hook on it; in float32 whatever the layer's dtype.

    Args:
        mask: shared; not a submodule of this, so that it is in the model once.
        rank: r, 0 for D and M alone.
        scaled: whether D trains.
    """

    def __init__(self, mask: SharedMask, rank: int, *, scaled: bool = True) -> None:
        super().__init__()
        width = len(mask.logits)
        # Not registered: one of the operators' holders registers it.
        self.__dict__["mask"] = mask
        self.reduce = nn.Parameter(torch.empty(rank, width))
        self.expand = nn.Parameter(torch.zeros(width, rank))
        self.scale = nn.Parameter(torch.ones(width), requires_grad=scaled)
        if rank:
            nn.init.kaiming_uniform_(self.reduce, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """z for x [..., width], in its dtype."""
        mask: SharedMask = self.__dict__["mask"]
        return (self.turned(x.to(self.scale.dtype)) * mask.scalar()).to(x.dtype)

    def turned(self, x: Tensor) -> Tensor:
        """D ⊙ (x + V·U·x): all but the mask."""
        turned = x + F.linear(F.linear(x, self.reduce), self.expand) if len(self.reduce) else x
        return self.scale * turned

    @torch.no_grad()
    def merged(self, tensor: Tensor, axis: int) -> Tensor:
        """The parameter whose layer gives what the operator made of its output: D ⊙ (I + V·U) along `axis`.

        Computed in float64 and rounded once.
        """
        wide = [value.double() for value in (tensor.movedim(axis, -1), self.scale, self.reduce, self.expand)]
        rows, scale, reduce, expand = wide
        made = scale * (rows + rows @ reduce.T @ expand.T)
        return made.movedim(-1, axis).to(tensor.dtype)

    def hook(self, _layer: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """What a forward hook gives."""
        found: Tensor = self(output)
        return found


class MaskPruner:
    """Anneals a shared mask while a model trains; call `step()` after each `optimizer.step()`.

    The gradient of the losses that look at no data is added right before each step of the optimizer.

    Args:
        mask: of the width.
        operators: of all layers that add to it.
        optimizer: that trains both.
        identity: whether `identity_loss` of every operator is among the losses.
    """

    def __init__(
        self, mask: SharedMask, operators: Sequence[Operator], optimizer: Optimizer, *, identity: bool = True
    ) -> None:
        self._mask = mask
        self._turning = [operator for operator in operators if len(operator.reduce)] if identity else []
        self._handle = penalized(optimizer, self.loss)

    def loss(self) -> Tensor | None:
        """The sum of the losses of mask and operators; None where there is nothing to learn from them."""
        found = [] if self._mask.frozen else [self._mask.loss()]
        found += [identity_loss(operator.reduce) for operator in self._turning]
        return torch.stack(found).sum() if found else None

    def step(self) -> None:
        """None; the mask is a step further."""
        self._mask.step += 1

    def finalize(self) -> Tensor:
        """The channels that stay: bool [width]."""
        self._handle.remove()
        return self._mask.stays()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all there is to know is in the state of the model that holds mask and operators."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; see `state_dict`."""
