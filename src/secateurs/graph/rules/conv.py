"""Convolutions and spatial resampling: channels are typed, everything spatial is fixed."""

from __future__ import annotations

from ...core.dims import ONE, Dim, Fixed, product, size
from ..trace import Call, Type, rule

__all__: list[str] = []


def _spatial(call: Call, kind: Type, first: int = 2) -> None:
    call.freeze(kind.dims[first:], f"spatial axes: {call.why}")


def _fixed_tail(call: Call, first: int) -> list[Dim]:
    return [Fixed(n) for n in call.outputs[0].shape[first:]]


@rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Type:
    """Convolution and its transpose, with groups.

    The input channels are groups × inputs of a group and the output channels groups × outputs of a group, so removing
    a unit of the first factor removes a whole group, and of the second the same offset in every group. A depthwise
    convolution is the case of one input a group.
    """
    x, weight = call.type_of(call.args["input"]), call.type_of(call.args["weight"])
    bias = call.args.get("bias")
    groups: int = call.args["groups"]
    solver = call.trace.solver
    batched = len(x.dims) == len(weight.dims)
    channels = x.dims[1 if batched else 0]
    _spatial(call, x, 2 if batched else 1)
    _spatial(call, weight)
    inner = 0 if call.args.get("transposed") else 1
    outer = 1 - inner
    group = solver.fresh(groups)
    if inner == 1:
        solver.unify(channels, product(group, weight.dims[1]), call.why)
        share = solver.fresh(size(weight.dims[0]) // groups)
        out: Dim = weight.dims[0]
        solver.unify(out, product(group, share), call.why)
    else:
        solver.unify(channels, weight.dims[0], call.why)
        solver.unify(channels, product(group, solver.fresh(size(channels) // groups)), call.why)
        share = weight.dims[1]
        out = product(group, share)
    if bias is not None:
        solver.unify(call.type_of(bias).dims[0], out, call.why)
    if groups > 1:
        call.trace.edits[f"{call.module}.groups"] = group
    if weight.param and groups == 1:
        call.trace.contracted.add((weight.param, weight.axes[inner]))
    elif weight.param and size(weight.dims[inner]) > 1:
        call.trace.contracted.add((weight.param, weight.axes[inner]))
    pixels = [Fixed(n) for n in (call.outputs[0] if inner == 1 else call.args["input"]).shape[2 if batched else 1 :]]
    per_group = weight.dims[1] if inner == 1 else solver.fresh(1)
    if inner == 1:
        call.trace.macs.append(((x.dims[0] if batched else ONE, out, per_group, *weight.dims[2:], *pixels), call.module))
    else:
        dims = (x.dims[0] if batched else ONE, channels, weight.dims[outer], *weight.dims[2:], *pixels)
        call.trace.macs.append((dims, call.module))
    zero = weight.zero and (bias is None or call.type_of(bias).zero)
    head = (x.dims[0], out) if batched else (out,)
    return Type((*head, *_fixed_tail(call, len(head))), zero)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "upsample_linear1d",
    "_upsample_bicubic2d_aa", "upsample_trilinear3d",
)  # fmt: skip
def resample(call: Call) -> list[Type]:
    """Pooling and resizing: batch and channels pass, spatial axes are fixed. Averages and maxima of zeros are zero."""
    kind = call.types()[0]
    spatial = 1 if "1d" in call.name else 3 if "3d" in call.name else 2
    lead = len(kind.dims) - spatial
    _spatial(call, kind, lead)
    return [Type((*kind.dims[:lead], *(Fixed(n) for n in t.shape[lead:])), kind.zero) for t in call.outputs]
