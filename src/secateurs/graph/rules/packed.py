"""Sequences of several lengths, packed for recurrent layers: their steps are fixed, what each step holds passes.

Unpacking is made of other ops.
"""

from __future__ import annotations

from ...core.dims import Fixed
from ..records import Type
from ..trace import Call
from .registry import rule

__all__: list[str] = []


@rule("_pack_padded_sequence")
def pack(call: Call) -> list[Type]:
    """The steps of all sequences on one axis, and how many sequences have a step of each number."""
    kind = call.type_of(call.args["input"])
    call.freeze(kind.dims[:2], f"packed by length: {call.why}")
    data, counts = call.outputs
    return [Type((Fixed(data.shape[0]), *kind.dims[2:]), kind.zero), Type((Fixed(counts.shape[0]),))]
