"""The table of ONNX ops: one function of plain torch each, and what a function is told of its node.

Between nodes flow tensors and, for what is known without data (shapes, small constants), NumPy arrays. An array of
rank 0 meets tensors as a Python number, so that no device and no type promotion is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ModelError

__all__ = ["OPS", "Array", "Attributes", "beside", "dtype_of", "ints", "number", "op", "operands", "tensor", "tensors"]

Array = np.ndarray[Any, Any]
OPS: dict[str, Callable[..., Any]] = {}
_Op = TypeVar("_Op", bound=Callable[..., Any])

# ONNX's numbers of element types that PyTorch has.
_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def op(*names: str) -> Callable[[_Op], _Op]:
    """Register one function for the named ops; those of another domain than ONNX's own as `domain::name`.

    Raises:
        ValueError: an op already has a function.
    """

    def register(function: _Op) -> _Op:
        for name in names:
            if name in OPS:
                raise ValueError(f"{name} already has a function: {OPS[name].__qualname__}")
            OPS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Attributes:
    """What a node is beside its inputs.

    Args:
        op: its kind, as in the table.
        values: its attributes by name.
        version: of the op set that it belongs to.
        outputs: how many there are.
        training: whether the model is in training mode.
        where: the node, for errors.
    """

    op: str
    values: Mapping[str, Any]
    version: int
    outputs: int = 1
    training: bool = False
    where: str = "a node"

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or `default` where the node has none."""
        return self.values.get(name, default)

    def text(self, name: str, default: str) -> str:
        """The attribute as a string."""
        return str(self.values.get(name, default))

    def refuse(self, what: str) -> ModelError:
        """The error for a variant of the op that is not supported."""
        return ModelError(f"{what} is not supported, in {self.where}; leave the node out of the file, or rewrite it.")


def dtype_of(code: int) -> torch.dtype:
    """PyTorch's type for ONNX's number of an element type.

    Raises:
        ModelError: PyTorch has no such type.
    """
    if code not in _DTYPES:
        raise ModelError(f"ONNX's element type {code} has no counterpart in PyTorch: convert the file to another type.")
    return _DTYPES[code]


def tensor(value: Tensor | Array) -> Tensor:
    """`value` as a tensor; arrays become tensors on the CPU."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def tensors(*values: Tensor | Array) -> list[Tensor]:
    """`values` as tensors on one device; real tensors beside others on meta stay where they are."""
    made = [tensor(v) for v in values]
    return [beside(t, made) for t in made]


def beside(value: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`value`, moved from the CPU to where the others are, if that is a device that computes."""
    devices = [t.device for t in others if t.device.type not in ("cpu", "meta")]
    return value.to(devices[0]) if devices and value.device.type == "cpu" else value


def operands(*values: Tensor | Array) -> list[Any]:
    """`values` for an elementwise op: tensors, and numbers where an array of rank 0 meets a tensor."""
    if not any(isinstance(v, Tensor) for v in values):
        return [tensor(v) for v in values]
    made = [v.item() if isinstance(v, np.ndarray) and v.ndim == 0 else tensor(v) for v in values]
    among = [v for v in made if isinstance(v, Tensor)]
    return [beside(v, among) if isinstance(v, Tensor) else v for v in made]


def ints(value: Tensor | Array | Sequence[int] | int) -> list[int]:
    """The integers in a value that tells sizes, axes or positions."""
    if isinstance(value, (Tensor, np.ndarray)):
        return [int(v) for v in value.reshape(-1).tolist()]
    return [value] if isinstance(value, int) else [int(v) for v in value]


def number(value: Tensor | Array | None, default: Any = None) -> Any:
    """The one number in a value; `default` where there is none."""
    return default if value is None else value.reshape(-1)[0].item()
