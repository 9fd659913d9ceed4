"""Convolutions and spatial resampling: channels are typed, everything spatial is fixed."""

from __future__ import annotations

from ...core.dims import product, size
from ..records import Type
from ..trace import Call
from .pointwise import fixed_dims
from .registry import rule

__all__: list[str] = []


def _spatial(call: Call, kind: Type, first: int = 2) -> None:
    call.freeze(kind.dims[first:], f"spatial axes: {call.why}")


@rule("convolution", always=True)
def convolution(call: Call) -> Type:
    """Convolution and its transpose, with groups.

    The input channels are groups × inputs of a group and the output channels groups × outputs of a group, so removing
    a unit of the first factor removes a whole group, and of the second the same offset in every group. A depthwise
    convolution is the case of one input a group.
    """
    x, weight = call.type_of(call.args["input"]), call.type_of(call.args["weight"])
    bias = call.args["bias"]
    transposed, groups = bool(call.args["transposed"]), int(call.args["groups"])
    solver = call.trace.solver
    first = len(x.dims) - len(weight.dims) + 1
    channels = x.dims[first]
    _spatial(call, x, first + 1)
    _spatial(call, weight)
    group = solver.fresh(groups)
    if transposed:
        within = solver.fresh(size(channels) // groups)
        solver.unify(channels, weight.dims[0], call.why)
        out = product(group, weight.dims[1])
    else:
        within = weight.dims[1]
        out = weight.dims[0]
        solver.unify(out, product(group, solver.fresh(size(out) // groups)), call.why)
    solver.unify(channels, product(group, within), call.why)
    if not (x.zero or weight.zero):
        call.doubt(within, f"summed over values that zeroing does not make zero: {call.why}")
    if bias is not None:
        solver.unify(call.type_of(bias).dims[0], out, call.why)
    if groups > 1:
        call.trace.edits[f"{call.module}.groups"] = group
    inner = 0 if transposed else 1
    if weight.param and (groups == 1 or size(weight.dims[inner]) > 1):
        call.trace.contracted.update((weight.param, axis) for axis in weight.axes[inner])
    # Every output pixel sees all weights of its group; of a transposed convolution, every input pixel does.
    pixels = fixed_dims(call.args["input"] if transposed else call.outputs[0])[first + 1 :]
    across = (channels if transposed else out, weight.dims[1])
    call.trace.macs.append(((*x.dims[:first], *across, *weight.dims[2:], *pixels), call.module))
    zero = weight.zero and (bias is None or call.type_of(bias).zero) and call.all_fixed(x.dims[:first])
    return Type((*x.dims[:first], out, *fixed_dims(call.outputs[0])[first + 1 :]), zero)


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "upsample_trilinear3d",
)  # fmt: skip
def resample(call: Call) -> list[Type]:
    """Pooling and resizing: batch and channels pass, spatial axes are fixed. Averages and maxima of zeros are zero."""
    kind = call.types()[0]
    spatial = 1 if "1d" in call.name else 3 if "3d" in call.name else 2
    lead = len(kind.dims) - spatial
    _spatial(call, kind, lead)
    return [Type((*kind.dims[:lead], *fixed_dims(t)[lead:]), kind.zero and t.is_floating_point()) for t in call.outputs]
