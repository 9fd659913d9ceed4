"""Elementwise ops and activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .table import Array, Attributes, dtype_of, number, op, operands, tensor, tensors

__all__: list[str] = []

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan,
    "Tanh": torch.tanh, "BitwiseNot": torch.bitwise_not,
    "com.microsoft::QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
    "com.microsoft::FastGelu": partial(F.gelu, approximate="tanh"),
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Equal": operator.eq, "Greater": operator.gt,
    "GreaterOrEqual": operator.ge, "Less": operator.lt, "LessOrEqual": operator.le,
    "BitwiseAnd": operator.and_, "BitwiseOr": operator.or_, "BitwiseXor": operator.xor,
}  # fmt: skip
_LOGICAL = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}
_JOINT = {"Max": torch.maximum, "Min": torch.minimum}


def _register() -> None:
    for name, unary in _UNARY.items():
        op(name)(lambda a, x, unary=unary: unary(tensor(x)))
    for name, binary in _BINARY.items():
        op(name)(lambda a, x, y, binary=binary: binary(*operands(x, y)))
    for name, logical in _LOGICAL.items():
        op(name)(lambda a, x, y, logical=logical: logical(*tensors(x, y)))
    for name, joint in _JOINT.items():
        op(name)(lambda a, *xs, joint=joint: reduce(joint, tensors(*xs)))


_register()


@op("Sum")
def total(a: Attributes, *xs: Tensor) -> Any:
    """The sum of all operands."""
    return reduce(operator.add, operands(*xs))


@op("Mean")
def mean(a: Attributes, *xs: Tensor) -> Any:
    """The mean of all operands."""
    return reduce(operator.add, operands(*xs)) / len(xs)


@op("Div")
def divide(a: Attributes, x: Tensor | Array, y: Tensor | Array) -> Any:
    """A quotient; of integers, rounded towards zero."""
    left, right = operands(x, y)
    whole = all(isinstance(v, int) or (isinstance(v, Tensor) and not v.is_floating_point()) for v in (left, right))
    if whole:
        return torch.div(*tensors(x, y), rounding_mode="trunc")
    return left / right


@op("Mod")
def modulo(a: Attributes, x: Tensor | Array, y: Tensor | Array) -> Tensor:
    """The remainder, with the sign of the divisor, or with `fmod` of the dividend."""
    return torch.fmod(*tensors(x, y)) if a.get("fmod", 0) else torch.remainder(*tensors(x, y))


@op("Pow")
def power(a: Attributes, x: Tensor | Array, y: Tensor | Array) -> Any:
    """A power, in the type of the base."""
    base, exponent = operands(x, y)
    made = base**exponent
    return made.to(base.dtype) if isinstance(base, Tensor) else made


@op("Where")
def where(a: Attributes, condition: Tensor, x: Tensor | Array, y: Tensor | Array) -> Tensor:
    """Entries of `x` where the condition holds, of `y` elsewhere."""
    test, *_ = tensors(condition, x, y)
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        _, left, right = tensors(test, x, y)
    else:
        left, right = operands(x, y)
    return torch.where(test, left, right)


@op("Clip")
def clip(a: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Values limited to a range."""
    bounds = [number(low, a.get("min")), number(high, a.get("max"))]
    return tensor(x) if bounds == [None, None] else torch.clamp(tensor(x), *bounds)


@op("Cast")
def cast(a: Attributes, x: Tensor | Array) -> Tensor:
    """The same numbers in another type."""
    return tensor(x).to(dtype_of(a.get("to")))


@op("CastLike")
def cast_like(a: Attributes, x: Tensor | Array, like: Tensor | Array) -> Tensor:
    """The same numbers in the type of another tensor."""
    return tensor(x).to(tensor(like).dtype)


@op("IsInf")
def is_infinite(a: Attributes, x: Tensor) -> Tensor:
    """Where values are infinite, on one side or both."""
    found = torch.isinf(x)
    if not a.get("detect_negative", 1):
        found = found & (x > 0)
    return found if a.get("detect_positive", 1) else found & (x < 0)


@op("BitShift")
def shift(a: Attributes, x: Tensor | Array, y: Tensor | Array) -> Any:
    """Bits moved to the left or the right."""
    left, right = operands(x, y)
    return left << right if a.text("direction", "") == "LEFT" else left >> right


@op("LeakyRelu")
def leaky(a: Attributes, x: Tensor) -> Tensor:
    """Negative values scaled by `alpha`."""
    return F.leaky_relu(x, a.get("alpha", 0.01))


@op("PRelu")
def prelu(a: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    """Negative values scaled by a learned slope, which is broadcast."""
    return torch.where(x >= 0, x, x * operands(x, slope)[1])


@op("Elu")
def elu(a: Attributes, x: Tensor) -> Tensor:
    """Negative values bent towards -alpha."""
    return F.elu(x, a.get("alpha", 1.0))


@op("Celu")
def celu(a: Attributes, x: Tensor) -> Tensor:
    """As `Elu`, differentiable at zero for every alpha."""
    return F.celu(x, a.get("alpha", 1.0))


@op("Selu")
def selu(a: Attributes, x: Tensor) -> Tensor:
    """A scaled `Elu`; the defaults are those of the self-normalising network."""
    alpha, gamma = a.get("alpha", 1.6732632423543772), a.get("gamma", 1.0507009873554805)
    return torch.mul(F.elu(x, alpha), gamma)


@op("ThresholdedRelu")
def thresholded(a: Attributes, x: Tensor) -> Tensor:
    """Values above `alpha`, zero elsewhere."""
    return torch.where(x > a.get("alpha", 1.0), x, 0.0)


@op("Shrink")
def shrink(a: Attributes, x: Tensor) -> Tensor:
    """Values moved towards zero by `bias`, those within `lambd` of it set to zero."""
    bias, edge = a.get("bias", 0.0), a.get("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, 0.0))


@op("HardSigmoid")
def hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    """A line between zero and one."""
    return torch.clamp(x * a.get("alpha", 0.2) + a.get("beta", 0.5), 0.0, 1.0)


@op("Swish")
def swish(a: Attributes, x: Tensor) -> Tensor:
    """x · sigmoid(alpha x)."""
    return x * torch.sigmoid(x * a.get("alpha", 1.0))


@op("Gelu", "com.microsoft::Gelu")
def gelu(a: Attributes, x: Tensor) -> Tensor:
    """The Gaussian error linear unit, exact or by tanh."""
    return F.gelu(x, approximate=a.text("approximate", "none"))


@op("com.microsoft::BiasGelu")
def bias_gelu(a: Attributes, x: Tensor, bias: Tensor) -> Tensor:
    """`Gelu` after a bias."""
    return F.gelu(x + bias)


@op("Softmax", "LogSoftmax", "Hardmax")
def softmax(a: Attributes, x: Tensor) -> Tensor:
    """Values of one axis normalised; before version 13, of all axes from that one on."""
    axis = a.get("axis", -1 if a.version >= 13 else 1)
    if a.version < 13 and axis not in (-1, x.dim() - 1):
        lead = math.prod(x.shape[:axis])
        return softmax_along(a, x.reshape(lead, -1), -1).reshape(x.shape)
    return softmax_along(a, x, axis)


def softmax_along(a: Attributes, x: Tensor, axis: int) -> Tensor:
    """The function that the node names, along one axis."""
    if a.op == "Hardmax":
        best = x.argmax(axis, keepdim=True)
        return torch.zeros_like(x).scatter(axis, best, 1.0)
    return torch.log_softmax(x, axis) if a.op == "LogSoftmax" else torch.softmax(x, axis)


@op("Dropout")
def dropout(a: Attributes, x: Tensor, ratio: Any = None, mode: Any = None) -> Any:
    """The input, with some entries zeroed in training."""
    made = F.dropout(x, number(ratio, a.get("ratio", 0.5)), a.training)
    return (made, torch.ones_like(x, dtype=torch.bool)) if a.outputs > 1 else made


@op("Identity")
def identity(a: Attributes, x: Tensor | Array) -> Tensor | Array:
    """The input."""
    return x
