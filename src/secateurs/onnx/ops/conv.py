"""Convolutions and matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .table import Attributes, op, operands, tensor, tensors

__all__ = ["pads_of", "spread"]

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def spread(begin: list[int], end: list[int]) -> list[int]:
    """The amounts as `torch.nn.functional.pad` wants them: the last axis first."""
    return [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]


def pads_of(
    a: Attributes, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """What is added before and after each spatial axis of `sizes`."""
    axes = len(kernel)
    mode = a.text("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = list(a.get("pads", [0] * 2 * axes))
        return pads[:axes], pads[axes:]
    if mode == "VALID":
        return [0] * axes, [0] * axes
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    totals = [
        max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)
    ]  # as many outputs as there are strides
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


@op("Conv")
def convolution(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution in groups, over one to three axes."""
    kernel = list(weight.shape[2:])
    axes = len(kernel)
    strides, dilations = list(a.get("strides", [1] * axes)), list(a.get("dilations", [1] * axes))
    begin, end = pads_of(a, list(x.shape[2:]), kernel, strides, dilations)
    if begin != end:
        x, begin = F.pad(x, spread(begin, end)), [0] * axes
    return _CONV[axes - 1](x, weight, bias, strides, begin, dilations, a.get("groups", 1))


@op("ConvTranspose")
def transposed(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transpose of a convolution in groups."""
    kernel = list(weight.shape[2:])
    axes = len(kernel)
    strides, dilations = list(a.get("strides", [1] * axes)), list(a.get("dilations", [1] * axes))
    extra = list(a.get("output_padding", [0] * axes))
    begin, end = _cropped(a, list(x.shape[2:]), kernel, strides, dilations, extra)
    run, groups = _TRANSPOSED[axes - 1], a.get("groups", 1)
    fits = all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    if begin == end and min(begin) >= 0 and fits:
        return run(x, weight, bias, strides, begin, extra, groups, dilations)
    whole = run(x, weight, None, strides, 0, 0, groups, dilations)
    made = F.pad(whole, spread([-b for b in begin], [e - c for e, c in zip(extra, end, strict=True)]))
    return made if bias is None else made + bias.reshape(-1, *[1] * axes)


def _cropped(
    a: Attributes, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int], extra: list[int]
) -> tuple[list[int], list[int]]:
    """What a transposed convolution leaves out before and after each axis."""
    axes = len(kernel)
    mode, wanted = a.text("auto_pad", "NOTSET"), a.get("output_shape")
    if wanted is None and not mode.startswith("SAME"):
        pads = [0] * 2 * axes if mode == "VALID" else list(a.get("pads", [0] * 2 * axes))
        return pads[:axes], pads[axes:]
    targets = [n * s for n, s in zip(sizes, strides, strict=True)] if wanted is None else list(wanted)[-axes:]
    totals = [
        s * (n - 1) + e + (k - 1) * d + 1 - t
        for n, k, s, d, e, t in zip(sizes, kernel, strides, dilations, extra, targets, strict=True)
    ]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


@op("Gemm")
def gemm(a: Attributes, x: Tensor, y: Tensor, z: Any = None) -> Any:
    """alpha · x y + beta · z, either operand transposed where asked."""
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    left, right = tensors(x, y)
    left = left.t() if a.get("transA", 0) else left
    right = right.t() if a.get("transB", 0) else right
    if z is not None and isinstance(z, Tensor) and z.dim() and alpha == beta == 1.0:
        return torch.addmm(z, left, right)
    made = left @ right
    made = made if alpha == 1.0 else made * alpha
    if z is None:
        return made
    added = operands(made, z)[1]
    return made + (added if beta == 1.0 else added * beta)


@op("MatMul")
def matmul(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    """A matrix product, batched as NumPy does."""
    return torch.matmul(*tensors(x, y))


@op("com.microsoft::FusedMatMul")
def fused_matmul(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    """alpha · x y, either operand transposed where asked."""
    left = x.transpose(-1, -2) if a.get("transA", 0) else x
    right = y.transpose(-1, -2) if a.get("transB", 0) else y
    return torch.mul(torch.matmul(left, right), a.get("alpha", 1.0))


@op("Einsum")
def einsum(a: Attributes, *xs: Tensor) -> Tensor:
    """A contraction in Einstein's notation."""
    made: Tensor = torch.einsum(a.text("equation", ""), *tensors(*xs))
    return made


@op("Det")
def determinant(a: Attributes, x: Tensor) -> Tensor:
    """Determinants of the last two axes."""
    made: Tensor = torch.linalg.det(tensor(x))
    return made
