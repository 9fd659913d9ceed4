"""Calibration without data: random inputs in the shape of the example inputs."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import OptionError
from ..criteria.evidence import mapped

__all__ = ["NOISE", "Noise", "noise"]

Noise = Literal["uniform", "gaussian", "smooth"]
NOISE: tuple[Noise, ...] = ("uniform", "gaussian", "smooth")
_BATCH = 64


def noise(example_inputs: Any, kind: Noise, samples: int, seed: int = 0) -> list[tuple[Any, None]]:
    """Batches of `samples` random inputs in all, of mean 0 and variance 1, as normalised inputs have.

    Args:
        example_inputs: a tensor, a tuple or a dict; the first axis of each tensor is that of the samples.
        kind: "uniform" and "gaussian", each value for itself; "smooth", Gaussian with amplitudes that fall as one over
            the frequency along the axes after the second, as those of photographs do (Field 1987).
        samples: how many inputs.
        seed: of the values.

    Raises:
        OptionError: an input is not floating-point.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(_BATCH, samples - start) for start in range(0, samples, _BATCH)]
    return [(mapped(example_inputs, partial(_drawn, kind, size, generator)), None) for size in sizes]


def _drawn(kind: Noise, count: int, generator: torch.Generator, leaf: Tensor) -> Tensor:
    if not leaf.is_floating_point() or leaf.dim() == 0:
        raise OptionError(
            f"{kind} noise stands in for floating-point inputs with an axis of samples, and an example input is "
            f"{leaf.dtype} {list(leaf.shape)}: give data=, and calibration='data'."
        )
    shape = (count, *leaf.shape[1:])
    if kind == "uniform":
        values = (torch.rand(shape, generator=generator) * 2 - 1) * 3**0.5
    elif kind == "gaussian" or leaf.dim() < 3:
        values = torch.randn(shape, generator=generator)
    else:
        values = _smooth(shape, generator)
    return values.to(leaf)


def _smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    axes = tuple(range(2, len(shape)))
    frequency = torch.zeros([1] * len(axes))
    for axis, size in enumerate(shape[2:]):
        along = torch.fft.fftfreq(size).view([-1 if other == axis else 1 for other in range(len(axes))])
        frequency = torch.hypot(frequency, along)
    # The mean is a wave, too: half as fast as the slowest other.
    slowest = frequency[frequency > 0].min() if frequency.numel() > 1 else torch.ones(())
    waves = torch.fft.fftn(torch.randn(shape, generator=generator), dim=axes) / frequency.clamp(min=float(slowest) / 2)
    values: Tensor = torch.fft.ifftn(waves, dim=axes).real
    return values / values.std(correction=0).clamp(min=1e-12)
