"""Complex numbers, as pairs of real ones, and Fourier transforms."""

from __future__ import annotations

from ...core.dims import Fixed
from ..records import Type
from ..trace import Call
from .registry import rule

__all__: list[str] = []


@rule("view_as_complex")
def paired(call: Call) -> Type:
    """The last axis, a real and an imaginary part, becomes one number."""
    kind = call.types()[0]
    call.freeze(kind.dims[-1:], f"the parts of a complex number: {call.why}")
    return Type(kind.dims[:-1], kind.zero)


@rule("view_as_real")
def parted(call: Call) -> Type:
    """Each number becomes its real and its imaginary part."""
    kind = call.types()[0]
    return Type((*kind.dims, Fixed(2)), kind.zero)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(call: Call) -> Type:
    """Of the transformed axes every position meets every other, so they are fixed; of zeros all are zeros."""
    kind = call.types()[0]
    rank = len(kind.dims)
    axes = [call.axis(axis, rank) for axis in call.args["dim"]]
    call.freeze([kind.dims[a] for a in axes], f"transformed along: {call.why}")
    made = call.outputs[0].shape
    return Type(tuple(Fixed(made[a]) if a in axes else d for a, d in enumerate(kind.dims)), kind.zero)
