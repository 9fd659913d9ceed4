"""Root-mean-square norms over a width that is cut: what replaces the statistics of the entries that go.

A norm over d entries divides by √(Σx²/d + ε). Of a model in which all but k entries of x are zero it divides by that
d still; cut to k entries, by √(Σx²/k + ε). The two are equal if the gain is multiplied by √(d/k), and ε by d/k. A layer
norm subtracts the mean over all d first, which entries that are zero take part in, so no factor makes the two equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dims import Dim, atoms
from ..core.errors import ModelError
from ..core.units import ChannelGroup
from .infer import infer
from .structure import Structure

__all__ = ["entangled", "gain", "norms_over", "refuse_others", "rescale"]

# Of the gain: what rounding in float32 leaves.
_CLOSE = 1e-4
# Numbers beside whose squares no ε counts.
_LARGE = 1e3


def entangled(model: nn.Module, example_inputs: Any, structure: Structure) -> tuple[ChannelGroup, ...]:
    """The groups of `structure` whose removal differs from zeroing, such as a width that a norm runs over."""
    kinds = {group.kind for group in structure.groups}
    neutral = infer(model, example_inputs, kinds=kinds, entangled=False)
    known = {(member.tensor, member.axis) for group in neutral.groups for member in group.members}
    return tuple(g for g in structure.groups if not any((m.tensor, m.axis) in known for m in g.members))


def norms_over(structure: Structure, group: ChannelGroup) -> tuple[str, ...]:
    """Paths of the modules that normalise over the units of the group, in the order of the forward pass."""
    found = [op.module for op in structure.doubted if any(_carries(dims, group.name) for dims in op.inputs)]
    return tuple(dict.fromkeys(reversed(found)))


def gain(module: nn.Module, width: int) -> Tensor | None:
    """By what the module multiplies x/√(mean x²), float64 [width]; None if it does anything else.

    Found by calling it on random numbers, so that it is no matter how it is written.
    """
    twin = copy.deepcopy(module).double()
    given = _LARGE * torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = given.to(next((p.device for p in module.parameters()), given.device))
    try:
        with torch.no_grad():
            made = twin.forward(given)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if not isinstance(made, Tensor) or made.shape != given.shape:
        return None
    found = made.double() / (given * given.square().mean(1, keepdim=True).rsqrt())
    spread = (found - found.mean(0)).abs().max()
    return found.mean(0) if bool(spread <= _CLOSE * found.abs().max().clamp(min=1)) else None


def refuse_others(model: nn.Module, paths: Iterable[str], width: int) -> None:
    """None, if every module named is a root-mean-square norm whose gain can be scaled.

    Raises:
        ModelError: one is not; it is named.
    """
    for path in paths:
        module = model.get_submodule(path)
        if gain(module, width) is None:
            raise ModelError(
                f"{path or 'the model'} ({type(module).__name__}) normalises over the residual width and is no "
                "root-mean-square norm: a mean over the width is not the same without the channels that go; use "
                "granularity='channel', or a method that can cut this width."
            )
        if len(_weights(module, width)) != 1:
            raise ModelError(
                f"{path} ({type(module).__name__}) has no weight of its own to carry the factor that a narrower width "
                "needs; give the norm a weight."
            )


@torch.no_grad()
def rescale(model: nn.Module, paths: Iterable[str], width: int, kept: int) -> None:
    """None; the norms named give over `kept` entries what they gave over `width` of which the others were zero.

    Args:
        model: changed in place: the weights of the norms, and their ε.
        paths: see `norms_over`; each passes `refuse_others`.
    """
    for path in paths:
        module = model.get_submodule(path)
        (weight,) = _weights(module, width)
        base, slope = _gain_at(module, width, 0.0), _gain_at(module, width, 1.0)
        # Gemma's gain is 1 + weight; others' is the weight.
        slope -= base
        weight.copy_((math.sqrt(width / kept) * (base + slope * weight.double()) - base) / slope)
        for name, value in vars(module).items():
            if "eps" in name and isinstance(value, float):
                setattr(module, name, value * width / kept)


def _gain_at(module: nn.Module, width: int, value: float) -> float:
    """The gain with every weight at `value`, which for any norm is a round number."""
    twin = copy.deepcopy(module)
    (weight,) = _weights(twin, width)
    weight.fill_(value)
    made = gain(twin, width)
    assert made is not None
    return round(float(made.mean()), 2)


def _weights(module: nn.Module, width: int) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.shape == (width,)]


def _carries(dims: Iterable[Dim], name: str) -> bool:
    return any(atom.name == name for dim in dims for atom in atoms(dim))
