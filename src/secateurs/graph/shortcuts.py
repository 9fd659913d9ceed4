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


def _same(x: Tensor, *_others: Any) -> Tensor | None:
    return torch.empty_like(x) if x.is_floating_point() else None


def _product(x: Tensor, y: Tensor) -> Tensor | None:
    fits = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[0] and x.dtype == y.dtype
    return _made(x, (x.shape[0], y.shape[1])) if fits else None


def _product_plus(bias: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    fits = bias.dtype == x.dtype and bias.dim() == 1 and bias.shape[0] in (1, y.shape[-1])
    return _product(x, y) if fits else None


def _batch_normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...] | None:
    if any(t is not None and t.shape != x.shape[1:2] for t in (weight, bias, *rest[:2])):
        return None
    return torch.empty_like(x), _made(x, x.shape[1:2]), _made(x, x.shape[1:2])


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
    "mm": _product,
    "addmm": _product_plus,
    "cat": _joined,
    # Its own refuses all but bfloat16 here, where kernels take more.
    "_grouped_mm": _grouped,
    "native_batch_norm": _batch_normed,
    "native_layer_norm": _layer_normed,
}
