"""Resizing: each axis by itself, as a weighted sum of a few positions a place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .table import Attributes, beside, ints, op, tensor

__all__: list[str] = []


@dataclass(frozen=True)
class _Way:
    """How places of the result are found on the input: ONNX's words for it."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    inside: bool


@op("Resize", "Upsample")
def resize(a: Attributes, x: Tensor, *rest: Any) -> Tensor:
    """Axes sampled anew, to given sizes or by given scales."""
    way = _way(a)
    scales, sizes = _asked(a, rest)
    axes = list(a.get("axes", range(x.dim())))
    for i, axis in enumerate(axes):
        before = x.shape[axis]
        after = sizes[i] if sizes else math.floor(before * scales[i])
        scale = after / before if sizes else scales[i]
        if after != before or scale != 1.0:
            x = _along(x, axis, after, scale, way)
    return x


def _way(a: Attributes) -> _Way:
    old = a.op == "Upsample" or a.version < 11
    coordinates = "asymmetric" if old else a.text("coordinate_transformation_mode", "half_pixel")
    if a.get("antialias", 0) or coordinates == "tf_crop_and_resize":
        raise a.refuse("resizing with antialias or a region of interest")
    if a.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise a.refuse("resizing that keeps the aspect ratio")
    nearest = "floor" if old else a.text("nearest_mode", "round_prefer_floor")
    inside = bool(a.get("exclude_outside", 0))
    return _Way(a.text("mode", "nearest"), coordinates, nearest, a.get("cubic_coeff_a", -0.75), inside)


def _asked(a: Attributes, rest: tuple[Any, ...]) -> tuple[list[float], list[int]]:
    """Scales and sizes, one of them empty. From version 11 on a region of interest comes before them."""
    given = rest if a.version < 11 or a.op == "Upsample" else rest[1:]
    scales = given[0] if given and given[0] is not None else a.get("scales", [])
    values = [float(v) for v in (scales.reshape(-1).tolist() if hasattr(scales, "reshape") else scales)]
    return values, ints(given[1]) if len(given) > 1 and given[1] is not None and not values else []


def _along(x: Tensor, axis: int, after: int, scale: float, way: _Way) -> Tensor:
    size = x.shape[axis]
    at = _coordinates(torch.arange(after, dtype=torch.float64), size, after, scale, way)
    terms = _terms(at, size, scale, way)
    shape = [-1 if i == axis else 1 for i in range(x.dim())]
    made: Tensor | None = None
    for positions, weights in terms:
        part = x.index_select(axis, beside(positions.clamp(0, size - 1), [x]))
        if weights is not None:
            part = part * beside(weights.to(x.dtype).reshape(shape), [x])
        made = part if made is None else made + part
    return tensor(made) if made is not None else x


def _coordinates(at: Tensor, size: int, after: int, scale: float, way: _Way) -> Tensor:
    """Where each place of the result lies on the input."""
    match way.coordinates:
        case "asymmetric":
            return at / scale
        case "align_corners":
            return at * ((size - 1) / (after - 1)) if after > 1 else at * 0.0
        case "pytorch_half_pixel":
            return (at + 0.5) / scale - 0.5 if after > 1 else at * 0.0
        case "tf_half_pixel_for_nn":
            return (at + 0.5) / scale
        case "half_pixel_symmetric":
            off = size / 2 * (1 - after / (scale * size))
            return off + (at + 0.5) / scale - 0.5
    return (at + 0.5) / scale - 0.5


def _terms(at: Tensor, size: int, scale: float, way: _Way) -> list[tuple[Tensor, Tensor | None]]:
    """Positions on the input and their weights, one pair a summand; no weight stands for one."""
    if way.mode == "nearest":
        return [(_rounded(at, way.nearest).long(), None)]
    if way.mode == "linear":
        at = at.clamp(0, size - 1)
        low = at.floor()
        return [(low.long(), 1 - (at - low)), (low.long() + 1, at - low)]
    low = at.floor()
    steps = [low + i for i in (-1, 0, 1, 2)]
    weights = [_cubic((at - s).abs(), way.cubic) for s in steps]
    if way.inside:
        weights = [torch.where((s >= 0) & (s < size), w, 0.0) for s, w in zip(steps, weights, strict=True)]
        total = torch.stack(weights).sum(0)
        weights = [w / total for w in weights]
    return [(s.long(), w) for s, w in zip(steps, weights, strict=True)]


def _rounded(at: Tensor, how: str) -> Tensor:
    match how:
        case "floor":
            return at.floor()
        case "ceil":
            return at.ceil()
        case "round_prefer_ceil":
            return (at + 0.5).floor()
    return (at - 0.5).ceil()


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys's kernel (1981) at a distance of up to two."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, far)
