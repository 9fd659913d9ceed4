"""Shapes of a few ops on the meta device, where PyTorch derives them by decomposing the op in Python.

That takes a hundred times longer than the shape is worth, and most of a trace. Arguments that an op would refuse get no
shortcut, so that it refuses them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["shortcut"]


def shortcut(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What `func` returns for tensors on meta; None where it must be asked itself."""
    made = _SHORTCUTS.get(func.overloadpacket.__name__)
    return None if made is None or any(k not in _NO_SIZE for k in kwargs) else made(*args)


def _made(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _like(x: Tensor) -> Tensor:
    """A tensor that lies in memory as `x` does, if `x` has no gaps; else as PyTorch wants it."""
    if x.is_contiguous():
        return _made(x, x.shape)
    strides, wanted = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1), 1
    for stride, n in strides:
        if stride != wanted:
            return torch.empty_like(x)
        wanted *= n
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _same(x: Tensor, *_others: Any) -> Tensor | None:
    return _like(x) if x.is_floating_point() else None


def _combined(x: Any, y: Any) -> Tensor | None:
    """Of a tensor and a number, or of two tensors where it is plain how the result lies in memory."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if isinstance(y, (int, float)):
        return _like(x)
    shape = _broadcast(x.shape, y.shape) if isinstance(y, Tensor) and y.dtype == x.dtype else None
    if shape == x.shape:
        return _like(x)
    return _made(x, shape) if shape is not None and x.is_contiguous() and y.is_contiguous() else None


def _combined_into(x: Tensor, y: Any) -> Tensor | None:
    fits = isinstance(y, (int, float)) or (y.dtype == x.dtype and _broadcast(x.shape, y.shape) == x.shape)
    return x if x.is_floating_point() and fits else None


def _broadcast(shape: torch.Size, other: torch.Size) -> Sequence[int] | None:
    """The shape of two that were broadcast; None if they do not fit."""
    if shape == other:
        return shape
    both = list(zip(reversed(shape), reversed(other), strict=False))
    if any(a != b and 1 not in (a, b) for a, b in both):
        return None
    longer = max(shape, other, key=len)
    # An axis of length zero wins over one of length one.
    return torch.Size((*longer[: len(longer) - len(both)], *(b if a == 1 else a for a, b in reversed(both))))


def _product(x: Tensor, y: Tensor) -> Tensor | None:
    fits = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[0] and x.dtype == y.dtype
    return _made(x, (x.shape[0], y.shape[1])) if fits else None


def _batch_product(x: Tensor, y: Tensor) -> Tensor | None:
    fits = x.dim() == y.dim() == 3 and x.shape[0] == y.shape[0] and x.shape[2] == y.shape[1] and x.dtype == y.dtype
    return _made(x, (*x.shape[:2], y.shape[2])) if fits else None


def _product_plus(bias: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    fits = bias.dtype == x.dtype and bias.dim() == 1 and bias.shape[0] in (1, y.shape[-1])
    return _product(x, y) if fits else None


def _batch_normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...] | None:
    if any(t is not None and t.shape != x.shape[1:2] for t in (weight, bias, *rest[:2])):
        return None
    return _like(x), _made(x, x.shape[1:2]), _made(x, x.shape[1:2])


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, _output_padding: Sequence[int], groups: int,
) -> Tensor | None:  # fmt: skip
    axes = x.dim() - 2
    if transposed or not weight.dim() == axes + 2 == len(stride) + 2 == len(padding) + 2 == len(dilation) + 2:
        return None
    fits = x.shape[1] == weight.shape[1] * groups and not weight.shape[0] % groups and x.dtype == weight.dtype
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    given = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in given]
    plain = x.is_contiguous() and weight.is_contiguous() and min(places) > 0
    return _made(x, (x.shape[0], weight.shape[0], *places)) if plain else None


def _layer_normed(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _eps: float) -> Any:
    axes = len(shape)
    if any(t is not None and t.shape != x.shape[-axes:] for t in (weight, bias)) or tuple(shape) != x.shape[-axes:]:
        return None
    lead = (*x.shape[:-axes], *([1] * axes))
    return _made(x, x.shape), _made(x, lead), _made(x, lead)


def _grouped(x: Tensor, y: Tensor, offs: Tensor | None = None, *_others: Any) -> Tensor | None:
    fits = x.dim() == 2 and y.dim() == 3 and x.shape[1] == y.shape[1] and x.dtype == y.dtype
    ends = offs is not None and offs.shape == y.shape[:1]
    return _made(x, (x.shape[0], y.shape[2])) if fits and ends else None


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    axis = dim % max(first.dim(), 1)
    others = [(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors]
    if first.dim() < 2 or any(t.dtype != first.dtype or o != others[0] for t, o in zip(tensors, others, strict=True)):
        return None
    return _made(first, (*first.shape[:axis], sum(t.shape[axis] for t in tensors), *first.shape[axis + 1 :]))


# Arguments by name that no shape depends on.
_NO_SIZE = frozenset({"approximate", "beta", "alpha"})
_SHORTCUTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("gelu", "_softmax", "_log_softmax", "_safe_softmax", "silu", "hardswish", "roll"), _same),
    **dict.fromkeys(("add", "sub", "mul", "div"), _combined),
    **dict.fromkeys(("add_", "sub_", "mul_", "div_"), _combined_into),
    "convolution": _convolved,
    "mm": _product,
    "bmm": _batch_product,
    "addmm": _product_plus,
    "cat": _joined,
    # Its own refuses all but bfloat16 here, where kernels take more.
    "_grouped_mm": _grouped,
    "native_batch_norm": _batch_normed,
    "native_layer_norm": _layer_normed,
}
