"""Normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .table import Attributes, op, tensor

__all__: list[str] = []


@op("BatchNormalization")
def batch_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Any:
    """Each channel by its statistics: those kept, or in training those of the batch, which update the kept ones."""
    if a.outputs > 1:
        raise a.refuse("a batch norm that returns its statistics (a file exported for training)")
    momentum = 1 - a.get("momentum", 0.9)
    return F.batch_norm(x, mean, variance, scale, shift, a.training, momentum, a.get("epsilon", 1e-5))


@op("InstanceNormalization")
def instance_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each channel of each sample by its own statistics: a group norm with one channel a group."""
    return F.group_norm(x, x.shape[1], scale, shift, a.get("epsilon", 1e-5))


@op("GroupNormalization")
def group_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each group of channels by its own statistics; before version 21 a scale belongs to a group, not to a channel."""
    if scale.shape[0] != x.shape[1]:
        times = x.shape[1] // scale.shape[0]
        scale, shift = scale.repeat_interleave(times), shift.repeat_interleave(times)
    return F.group_norm(x, a.get("num_groups"), scale, shift, a.get("epsilon", 1e-5))


@op("LayerNormalization")
def layer_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Any:
    """All axes from `axis` on by their mean and variance, which are returned where asked for."""
    shape = x.shape[_axis(a, x) :]
    if a.outputs == 1 and scale.shape == shape and (shift is None or shift.shape == shape):
        return F.layer_norm(x, shape, scale, shift, a.get("epsilon", 1e-5))
    axes = list(range(_axis(a, x), x.dim()))
    mean = x.mean(axes, keepdim=True)
    inverse = ((x - mean).square().mean(axes, keepdim=True) + a.get("epsilon", 1e-5)).rsqrt()
    made = (x - mean) * inverse * scale
    return (made if shift is None else made + shift, mean, inverse)[: a.outputs]


@op("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(a: Attributes, x: Tensor, scale: Tensor) -> Any:
    """All axes from `axis` on by their root mean square."""
    axes = list(range(_axis(a, x), x.dim()))
    inverse = (x.square().mean(axes, keepdim=True) + a.get("epsilon", 1e-5)).rsqrt()
    return (x * inverse * scale, inverse) if a.outputs > 1 else x * inverse * scale


def _axis(a: Attributes, x: Tensor) -> int:
    axis = int(a.get("axis", -1))
    return axis + x.dim() if axis < 0 else axis


@op("com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
def skip_norm(a: Attributes, x: Tensor, skip: Tensor, scale: Tensor, *shifts: Tensor) -> Any:
    """A residual sum, normalised; where asked for, the sum is the fourth output."""
    simple = "Simplified" in a.op
    shift, bias = (None, *shifts, None)[:2] if simple else (*shifts, None, None)[:2]
    summed = x + skip if bias is None else x + skip + bias
    inner = Attributes(a.op, a.values, a.version, where=a.where)
    made = rms_norm(inner, summed, scale) if simple else layer_norm(inner, summed, scale, shift)
    return (made, None, None, summed)[: a.outputs] if a.outputs > 1 else made


@op("LRN")
def local_response(a: Attributes, x: Tensor) -> Tensor:
    """Each value divided by a power of the squares in neighbouring channels."""
    size = a.get("size")
    return F.local_response_norm(x, size, a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))


@op("LpNormalization")
def lp_norm(a: Attributes, x: Tensor) -> Tensor:
    """One axis divided by its p-norm."""
    norms: Tensor = torch.linalg.vector_norm(x, a.get("p", 2), a.get("axis", -1), keepdim=True)
    return x / norms


@op("MeanVarianceNormalization")
def mean_variance(a: Attributes, x: Tensor) -> Tensor:
    """Axes by their mean and standard deviation."""
    axes = list(a.get("axes", [0, 2, 3]))
    centred = tensor(x) - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)
