"""The ONNX ops in plain torch, a file a family."""

from __future__ import annotations

from . import attention, conv, index, norm, pointwise, pool, recurrent, reduce, resize, shape  # noqa: F401  (registers)
from .table import OPS, Attributes, op

__all__ = ["OPS", "Attributes", "op"]
