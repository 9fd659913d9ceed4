"""Elementwise ops: axes that line up under broadcasting are one axis."""

from __future__ import annotations

from torch import Tensor

from ...core.dims import ONE, Dim, Fixed, size
from ..trace import Call, Type, rule

__all__ = ["broadcast", "fixed"]

# Ops with f(0) = 0 in their first argument, so that an exact zero stays one.
_ZERO_PRESERVING = {
    "relu", "relu6", "gelu", "silu", "tanh", "hardswish", "mish", "neg", "abs", "sqrt", "sin", "tan", "erf", "sgn", "sign",
    "leaky_relu", "_prelu_kernel", "elu", "selu", "celu", "hardtanh", "square", "pow", "expm1", "log1p", "atan", "asinh",
    "softsign", "softshrink", "hardshrink", "threshold", "clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous",
    "native_dropout", "dropout", "div", "copy", "clamp", "clamp_max", "round", "trunc", "floor", "ceil", "nan_to_num", "real",
}  # fmt: skip


def fixed(call: Call) -> list[Type]:
    """Output types of which no axis can go."""
    return [Type(tuple(Fixed(n) for n in t.shape)) for t in call.outputs]


def broadcast(call: Call, kinds: list[Type], shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """The axes of the broadcast of `kinds` to `shape`, made one where they line up."""
    out: list[Dim] = []
    for back in range(len(shape), 0, -1):
        aligned = [k.dims[-back] for k in kinds if len(k.dims) >= back and size(k.dims[-back]) == shape[-back]]
        # An axis of one position never constrains, but a shape of one is one.
        out.append(call.trace.solver.unify_all(aligned, call.why) if aligned else ONE)
    return tuple(out)


def _stays_zero(call: Call, kinds: list[Type]) -> bool:
    if call.name == "mul":
        return any(k.zero for k in kinds)
    if call.name in ("add", "sub", "maximum", "minimum", "where", "lerp", "addcmul"):
        numbers = [v for v in (call.args.get("self"), call.args.get("other")) if isinstance(v, (int, float)) and v]
        return not numbers and all(k.zero for k in kinds if any(not isinstance(d, Fixed) for d in k.dims))
    if call.name == "hardtanh" or call.name == "clamp":
        low, high = (call.args.get(k) for k in (("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")))
        return kinds[0].zero and (low is None or low <= 0) and (high is None or high >= 0)
    if call.name == "pow" and not isinstance(call.args.get("self"), Tensor):
        return False
    return call.name in _ZERO_PRESERVING and kinds[0].zero


@rule(
    "pointwise", "clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "copy", "hardswish", "hardtanh",
    "where", "masked_fill", "native_dropout", "dropout", "bernoulli", "fill", "zeros_like", "ones_like", "empty_like",
    "full_like", "rand_like", "randn_like", "lerp", "addcmul", "addcdiv", "view_as_real_copy", "isin", "relu6", "zero",
    "_prelu_kernel", "logical_not", "isnan", "conj", "_conj", "normal", "uniform", "relu", "gelu", "silu",
)  # fmt: skip
def pointwise(call: Call) -> list[Type]:
    """Same axes in and out. Also the default for every op that PyTorch tags as pointwise."""
    kinds = call.types()
    if not kinds:
        return fixed(call)
    zero = _stays_zero(call, kinds)
    shapes = [tuple(t.shape) for t in call.outputs]
    dims = broadcast(call, kinds, shapes[0])
    keep = kinds[0] if call.name in ("detach", "alias", "lift_fresh") else Type(())
    return [Type(dims, zero, keep.param, keep.axes) for _ in shapes]


@rule("new_zeros", "new_empty", "new_ones", "new_full", "new_empty_strided")
def from_sizes(call: Call) -> list[Type]:
    """A new tensor whose sizes are numbers: nothing is known to be tied to it."""
    return fixed(call)
