"""Pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .conv import pads_of, spread
from .table import Attributes, op

__all__: list[str] = []

_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_MEAN = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _window(a: Attributes, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    kernel = list(a.get("kernel_shape"))
    axes = len(kernel)
    strides, dilations = list(a.get("strides", [1] * axes)), list(a.get("dilations", [1] * axes))
    return kernel, strides, dilations, *pads_of(a, list(x.shape[2:]), kernel, strides, dilations)


def _even(begin: list[int], end: list[int], kernel: list[int]) -> bool:
    """Whether PyTorch pads like this: alike on both sides, by half a window at most."""
    return begin == end and all(b <= k // 2 for b, k in zip(begin, kernel, strict=True))


@op("MaxPool")
def max_pool(a: Attributes, x: Tensor) -> Any:
    """The largest value of each window, and where it was in memory if that is asked for."""
    kernel, strides, dilations, begin, end = _window(a, x)
    ceil = bool(a.get("ceil_mode", 0))
    if a.outputs > 1:
        return _max_and_where(a, x, kernel, strides, dilations, begin, end)
    if not _even(begin, end, kernel):
        x, begin = F.pad(x, spread(begin, end), value=-math.inf), [0] * len(kernel)
    return _MAX[len(kernel) - 1](x, kernel, strides, begin, dilations, ceil)


def _max_and_where(a: Attributes, x: Tensor, *window: list[int]) -> tuple[Tensor, Tensor]:
    kernel, strides, dilations, begin, end = window
    if not _even(begin, end, kernel) or a.get("storage_order", 0):
        raise a.refuse("a max pool with uneven padding or column-major order that returns positions")
    run = _MAX[len(kernel) - 1]
    found, at = run(x, kernel, strides, begin, dilations, bool(a.get("ceil_mode", 0)), return_indices=True)
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * len(kernel))
    return found, at + planes * math.prod(x.shape[2:])


@op("AveragePool")
def average_pool(a: Attributes, x: Tensor) -> Tensor:
    """The mean of each window; what was padded counts if `count_include_pad`."""
    kernel, strides, dilations, begin, end = _window(a, x)
    if set(dilations) != {1}:
        raise a.refuse("a dilated average pool")
    ceil, counted = bool(a.get("ceil_mode", 0)), bool(a.get("count_include_pad", 0))
    run = _MEAN[len(kernel) - 1]
    if _even(begin, end, kernel):
        return run(x, kernel, strides, begin, ceil, counted)
    padded = run(F.pad(x, spread(begin, end)), kernel, strides, 0, ceil)
    if counted:
        return padded
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    return padded / run(F.pad(ones, spread(begin, end)), kernel, strides, 0, ceil)


@op("GlobalAveragePool")
def global_average_pool(a: Attributes, x: Tensor) -> Tensor:
    """The mean over all spatial axes."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(a: Attributes, x: Tensor) -> Tensor:
    """The largest value over all spatial axes."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@op("LpPool")
def lp_pool(a: Attributes, x: Tensor) -> Tensor:
    """The p-norm of each window."""
    kernel, strides, dilations, begin, end = _window(a, x)
    if set(dilations) != {1}:
        raise a.refuse("a dilated norm pool")
    p = float(a.get("p", 2))
    powers = F.pad(x.abs().pow(p), spread(begin, end))
    means = _MEAN[len(kernel) - 1](powers, kernel, strides, 0, bool(a.get("ceil_mode", 0)))
    return torch.pow(means * math.prod(kernel), 1 / p)


@op("GlobalLpPool")
def global_lp_pool(a: Attributes, x: Tensor) -> Tensor:
    """The p-norm over all spatial axes."""
    norms: Tensor = torch.linalg.vector_norm(x, a.get("p", 2), tuple(range(2, x.dim())), keepdim=True)
    return norms
