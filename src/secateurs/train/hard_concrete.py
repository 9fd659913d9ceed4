"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with a chance that gradients can move.

Louizos, Welling and Kingma, arXiv 1712.01312. A binary concrete variable is stretched to (γ, ζ) and clipped:

    s = sigmoid((ln u - ln(1 - u) + α)/β),   z = clip(s·(ζ - γ) + γ, 0, 1),   u ~ U(ε, 1 - ε)                      (1)
    P(z > 0) = 1 - clip(sigmoid(β·ln(-γ/ζ) - α), ε, 1 - ε)                                                           (2)

with γ = -0.1, ζ = 1.1, β = 2/3, ε = 1e-6. α, the log-odds, is what is learned; here `log_alpha`, one number a unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.select import top

__all__ = ["LIMIT", "clamp_", "deterministic", "draw", "extract", "open_probability", "sample", "soft_value"]

_LOW, _HIGH, _BETA, _EPSILON = -0.1, 1.1, 2 / 3, 1e-6
LIMIT = math.log(100)
# What the soft value of a gate that stays takes of its sharpness (CoFi's code, and Compresso's).
_MAGIC = 0.8


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z of (1), in the shape of `log_alpha`, for `uniform` numbers in (0, 1); differentiable.

    >>> sample(torch.tensor([0.0, 4.605, -4.605]), torch.tensor(0.5)).tolist()
    [0.5, 1.0, 0.0]
    """
    noise = uniform.log() - (-uniform).log1p()
    concrete = torch.sigmoid((noise + log_alpha) / _BETA)
    return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def draw(log_alpha: Tensor) -> Tensor:
    """z of (1) for numbers drawn from PyTorch's random state; differentiable."""
    return sample(log_alpha, _EPSILON + (1 - 2 * _EPSILON) * torch.rand_like(log_alpha))


def deterministic(log_alpha: Tensor) -> Tensor:
    """z of (1) without noise: u = ½."""
    return sample(log_alpha, torch.full_like(log_alpha, 0.5))


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of (2), in the shape of `log_alpha`; differentiable.

    >>> round(float(open_probability(torch.tensor(0.0))), 6)
    0.831822
    """
    closed = torch.sigmoid(_BETA * math.log(-_LOW / _HIGH) - log_alpha)
    return 1 - closed.clamp(_EPSILON, 1 - _EPSILON)


def soft_value(log_alpha: Tensor) -> Tensor:
    """sigmoid(0.8·α/β), what a gate that stays multiplies by in the end; 0.9960 at most, at the largest α.

    >>> round(float(soft_value(torch.tensor(LIMIT))), 4)
    0.996
    """
    return torch.sigmoid(_MAGIC * log_alpha / _BETA)


def extract(log_alpha: Tensor, keep: Tensor | None = None) -> Tensor:
    """The fixed gates [units]: 0 for those that go, the soft value for the others.

    Args:
        log_alpha: [units].
        keep: bool [units], what stays; default: the highest, as many as `round(Σ P(z > 0))`, ties by index.
    """
    if keep is None:
        # As in the code, what is rounded is the number of zeros.
        zeros = round(len(log_alpha) - float(open_probability(log_alpha.double()).sum()))
        keep = top(log_alpha, len(log_alpha) - zeros)
    return soft_value(log_alpha) * keep.to(log_alpha)


@torch.no_grad()
def clamp_(log_alpha: Tensor) -> None:
    """None; `log_alpha` is brought into ±ln 100, so that no gate is ever lost for good."""
    log_alpha.clamp_(-LIMIT, LIMIT)
