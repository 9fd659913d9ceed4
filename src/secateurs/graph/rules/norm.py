"""Normalisation: per channel it is neutral to zeroing, over channels it is not."""

from __future__ import annotations

from ...core.dims import Dim, Fixed, product, size
from ..records import Type
from ..trace import Call
from .registry import rule

__all__: list[str] = []


def _affine(call: Call, dim: Dim, *names: str) -> bool:
    """Unify the channel axis with that of the named parameters; whether all of them are parameters."""
    tensors = [call.args.get(name) for name in names]
    for tensor in tensors:
        if tensor is not None:
            call.trace.solver.unify(dim, call.type_of(tensor).dims[0], call.why)
    return all(t is not None and call.type_of(t).zero for t in tensors)


def _statistics(call: Call, dims: tuple[Dim, ...]) -> list[Type]:
    """Types of the outputs after the first: statistics over `dims`, or nothing where the backend saves none."""
    shape = tuple(size(d) for d in dims)
    return [Type(dims if tuple(t.shape) == shape else tuple(Fixed(n) for n in t.shape)) for t in call.outputs[1:]]


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
)  # fmt: skip
def batch_norm(call: Call) -> list[Type]:
    """Each channel by itself: scale, shift and running statistics go with it."""
    kind = call.types()[0]
    others = (kind.dims[0], *kind.dims[2:])
    zero = _affine(call, kind.dims[1], "weight", "bias")
    _affine(call, kind.dims[1], "running_mean", "running_var")
    if call.args.get("training", call.name == "_batch_norm_with_update"):
        _normalised(call, others)
    return [Type(kind.dims, zero and call.all_fixed(others)), *_statistics(call, (kind.dims[1],))]


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Type]:
    """Mean and variance run over the normalised axes, so removal there differs from zeroing."""
    kind = call.types()[0]
    rank = len(call.args["normalized_shape"])
    lead, axes = kind.dims[:-rank], kind.dims[-rank:]
    params = [call.type_of(call.args[n]) for n in ("weight", "bias") if call.args.get(n) is not None]
    for param in params:
        for own, dim in zip(param.dims, axes, strict=True):
            call.trace.solver.unify(own, dim, call.why)
    _normalised(call, axes)
    zero = bool(params) and all(p.zero for p in params) and call.all_fixed(lead)
    return [Type(kind.dims, zero), *_statistics(call, (*lead, *([Fixed(1)] * rank)))]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Type]:
    """Channels are groups × channels of a group; whole groups can go, the statistics run over the second factor."""
    kind = call.types()[0]
    solver, channels = call.trace.solver, kind.dims[1]
    group = solver.fresh(call.args["group"])
    within = solver.fresh(size(channels) // size(group))
    solver.unify(channels, product(group, within), call.why)
    zero = _affine(call, channels, "weight", "bias") and call.all_fixed((kind.dims[0], *kind.dims[2:]))
    _normalised(call, (within, *kind.dims[2:]))
    call.trace.edits[f"{call.module}.num_groups"] = group
    return [Type(kind.dims, zero), *_statistics(call, (kind.dims[0], group))]


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> list[Type]:
    """A direction times a length, of which there is one for each position of an axis.

    It is zero where the length is, and where the direction is: zeros have no share in the norm over the other axes.
    """
    direction, length = call.type_of(call.args["v"]), call.type_of(call.args["g"])
    axis = call.axis(call.args["dim"], len(direction.dims))
    call.trace.solver.unify(direction.dims[axis], length.dims[axis], call.why)
    return [Type(direction.dims, direction.zero and length.zero), *_statistics(call, length.dims)]


def _normalised(call: Call, dims: tuple[Dim, ...]) -> None:
    for dim in dims:
        call.doubt(dim, f"normalised over: {call.why}")
