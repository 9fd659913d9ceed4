"""Elementwise ops: axes that line up under broadcasting are one axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.dims import ONE, Dim, Fixed, size
from ..records import Type
from ..trace import Call
from .registry import rule

__all__ = ["broadcast", "fixed", "pointwise"]

# Ops with f(0) = 0 in their first argument, so that an exact zero stays one (some only with the right constants).
_ZERO_PRESERVING = {
    "relu", "gelu", "silu", "tanh", "hardswish", "mish", "neg", "abs", "sqrt", "sin", "tan", "erf", "sgn",
    "sign", "leaky_relu", "_prelu_kernel", "elu", "celu", "square", "expm1", "log1p", "atan", "asinh", "asin",
    "sinh", "softshrink", "hardshrink", "clone", "detach", "alias", "_to_copy", "lift_fresh", "pow",
    "native_dropout", "div", "round", "trunc", "floor", "ceil", "nan_to_num", "rrelu_with_noise",
    "clamp", "clamp_min", "clamp_max", "hardtanh", "threshold", "masked_fill",
}  # fmt: skip
# Ops that are exactly zero where all their operands are.
_JOINTLY_ZERO = {"add", "sub", "rsub", "maximum", "minimum", "lerp", "addcmul", "complex"}
# Infinite or undefined at zero: zeroing would put that into everything downstream.
_SINGULAR = {"log", "log2", "log10", "reciprocal", "rsqrt", "logit", "lgamma", "digamma"}


def fixed_dims(tensor: Tensor) -> tuple[Dim, ...]:
    """The axes of a tensor of which none can go."""
    return tuple(Fixed(n) for n in tensor.shape)


def fixed(call: Call) -> list[Type]:
    """Output types of which no axis can go."""
    return [Type(fixed_dims(t)) for t in call.outputs]


def broadcast(call: Call, kinds: Sequence[Type], shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """The axes of the broadcast of `kinds` to `shape`, made one where they line up."""
    out: list[Dim] = []
    for back in range(len(shape), 0, -1):
        aligned = [k.dims[-back] for k in kinds if len(k.dims) >= back and size(k.dims[-back]) == shape[-back]]
        # An axis of one position never constrains, but a shape of one is one.
        out.append(call.trace.solver.resolve(call.trace.solver.unify_all(aligned, call.why)) if aligned else ONE)
    return tuple(out)


def zero_on(dims: Sequence[Dim], kinds: Sequence[Type], how: Callable[[list[bool]], bool]) -> bool:
    """Whether on every axis of `dims` that can go, all (or any) of the operands are zero where it went.

    An operand that is broadcast along an axis is not zero there, whatever it is elsewhere.
    """
    live = [(back, dim) for back, dim in enumerate(reversed(dims), 1) if not isinstance(dim, Fixed)]
    return all(
        how([k.zero and len(k.dims) >= back and size(k.dims[-back]) == size(dim) for k in kinds]) for back, dim in live
    )


def _stays_zero(call: Call, dims: Sequence[Dim], kinds: Sequence[Type]) -> bool:
    name = call.name
    if name in ("zero", "zeros_like"):
        return True
    if name == "mul":
        return zero_on(dims, kinds, any)
    if not _constants_keep_zero(name, call.args):
        return False
    if name in _JOINTLY_ZERO:
        return zero_on(dims, kinds, all)
    if name in ("where", "copy"):
        return zero_on(dims, kinds[1:], all)
    return name in _ZERO_PRESERVING and zero_on(dims, kinds[:1], all)


def _constants_keep_zero(name: str, args: Mapping[str, Any]) -> bool:
    match name:
        case "add" | "sub" | "rsub" | "where":
            return not any(_number(args.get(key), 0) for key in ("self", "other"))
        case "masked_fill":
            return _number(args["value"], 1) == 0
        case "threshold":
            return bool(args["value"] == 0 or args["threshold"] < 0)
        case "pow":
            return _number(args["exponent"], 0) > 0
        case "clamp" | "clamp_min" | "clamp_max" | "hardtanh":
            low, high = (args.get(key, args.get(f"{key}_val")) for key in ("min", "max"))
            return not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low or 0) <= 0 <= (high or 0)
    return True


def _number(value: Any, otherwise: float) -> float:
    return value if isinstance(value, (int, float)) else otherwise


def _note_singular(call: Call, kinds: Sequence[Type]) -> None:
    """Zeroed units that become infinite or undefined are not neutral: dividing by them, their logarithm."""
    power = call.args.get("exponent")
    suspects: Sequence[Type] = kinds if call.name in _SINGULAR else ()
    if call.name == "addcdiv" or (call.name == "div" and isinstance(call.args["other"], Tensor)):
        suspects = kinds[-1:]
    if call.name == "pow" and not (isinstance(power, (int, float)) and power >= 0):
        suspects = kinds
    for kind in suspects:
        if kind.zero:
            for dim in kind.dims:
                call.doubt(dim, f"undefined at zero: {call.why}")


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", moves=True)
@rule(
    "pointwise", "copy", "hardswish", "hardtanh", "where",
    "masked_fill", "native_dropout", "bernoulli", "fill", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "lerp", "addcmul", "addcdiv", "zero", "_prelu_kernel", "logical_not", "normal",
    "uniform", "rsub", "relu", "gelu", "silu", "log_sigmoid_forward", "rrelu_with_noise", "mish", "elu", "celu",
    "complex",
)  # fmt: skip
def pointwise(call: Call) -> list[Type]:
    """Same axes in and out. Also the default for every op that PyTorch tags as pointwise."""
    kinds = call.types()
    if not kinds:
        return fixed(call)
    dims = broadcast(call, kinds, tuple(call.outputs[0].shape))
    _note_singular(call, kinds)
    keep = kinds[0] if call.name in ("detach", "alias", "lift_fresh", "clone", "_to_copy") else Type(())
    kind = Type(dims, _stays_zero(call, dims, kinds), keep.param, keep.axes)
    # Some return a buffer beside their result, whose shape depends on the device.
    return [kind if t.shape == call.outputs[0].shape else Type(fixed_dims(t)) for t in call.outputs]


@rule(
    "new_zeros", "new_empty", "new_ones", "new_full", "new_empty_strided", "zeros", "ones", "full", "empty", "rand",
    "randn", always=True,
)  # fmt: skip
def from_sizes(call: Call) -> list[Type]:
    """A new tensor whose sizes are numbers in the code; of indices and masks they are fixed."""
    made = call.outputs[0]
    if not made.is_floating_point():
        return fixed(call)
    zero = call.name in ("zeros", "new_zeros") or ("full" in call.name and call.args["fill_value"] == 0)
    return [Type(tuple(map(call.free, made.shape)), zero)]
