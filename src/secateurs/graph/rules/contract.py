"""Matrix products: the contracted axes are one, the free ones go out."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...core.dims import Dim, Fixed, product, size
from ..records import Type
from ..trace import Call
from .pointwise import broadcast, fixed, fixed_dims, zero_on
from .registry import rule

__all__ = ["einsum"]

# Operands first, then the output, in the notation of einsum.
_EQUATIONS = {
    "mm": "mk,kn->mn", "addmm": "mk,kn->mn", "bmm": "bmk,bkn->bmn", "baddbmm": "bmk,bkn->bmn", "mv": "mk,k->m",
    "dot": "k,k->", "vdot": "k,k->", "addmv": "mk,k->m",
}  # fmt: skip


def einsum(call: Call, left: Type, right: Type, equation: str) -> Type:
    """The product of two operands; charges its MACs, notes which axis of a parameter is contracted, and couples.

    A contraction of two activations is neutral to zeroing only if one of them is exactly zero there.
    """
    operands, out = equation.split("->")
    solver, trace = call.trace.solver, call.trace
    named = list(zip((left, right), operands.split(","), strict=True))
    letters: dict[str, list[Dim]] = {}
    for kind, names in named:
        for dim, letter in zip(kind.dims, names, strict=True):
            letters.setdefault(letter, []).append(dim)
    dims = {letter: solver.resolve(solver.unify_all(group, call.why)) for letter, group in letters.items()}
    trace.macs.append((tuple(dims.values()), call.module))
    contracted = [letter for letter in dims if letter not in out]
    for kind, names in named:
        if kind.param:
            trace.contracted.update((kind.param, axis) for k in contracted for axis in kind.axes[names.index(k)])
    if not (left.zero or right.zero):
        for letter in contracted:
            call.doubt(dims[letter], f"summed over values that zeroing does not make zero: {call.why}")
    if "b" in dims and not (left.param or right.param):
        trace.heads.append((dims["b"], tuple(dims[k] for k in dims if k != "b")))
    live = [k for k in out if not isinstance(dims[k], Fixed)]
    zero = all(any(kind.zero for kind, names in named if k in names) for k in live)
    return Type(tuple(dims[k] for k in out), zero)


def _plus(call: Call, result: Type, terms: list[Type]) -> Type:
    """A product and the terms that are added to it under broadcasting."""
    dims = broadcast(call, [result, *terms], tuple(call.outputs[0].shape))
    return Type(dims, zero_on(dims, [result, *terms], all))


@rule("mm", "bmm", "mv", "dot", "vdot", always=True)
def plain(call: Call) -> Type:
    """A plain matrix product."""
    left, right = call.types()[:2]
    return einsum(call, left, right, _EQUATIONS[call.name])


@rule("addmm", "baddbmm", "addmv", always=True)
def add_product(call: Call) -> Type:
    """A matrix product plus a broadcast term."""
    bias, left, right = call.types()[:3]
    return _plus(call, einsum(call, left, right, _EQUATIONS[call.name]), [bias])


@rule("linear", always=True)
def linear(call: Call) -> Type:
    """A linear layer that was not decomposed."""
    x, weight, *bias = call.types()
    free = "acdefghi"[: len(x.dims) - 1]
    return _plus(call, einsum(call, x, weight, f"{free}k,nk->{free}n"), bias)


@rule("_trilinear", always=True)
def trilinear(call: Call) -> list[Type]:
    """A bilinear layer: its widths are summed over jointly and are left as they are."""
    left, weight, right = call.types()
    for kind in (left, weight, right):
        call.freeze(kind.dims)
    call.trace.macs.append(((left.dims[0], *weight.dims), call.module))
    return fixed(call)


@rule("_grouped_mm", "grouped_mm_fallback", always=True)
def grouped(call: Call) -> Type:
    """Rows of one expert after those of another, each with a matrix of its own; which rows those are is data.

    Where the rows of each end says an axis that can go, the experts are that axis.
    """
    rows, weights, *_ = call.types()
    if (len(rows.dims), len(weights.dims)) != (2, 3) or call.args.get("bias") is not None:
        for kind in call.types():
            call.freeze(kind.dims)
        return Type(fixed_dims(call.outputs[0]))
    call.freeze([rows.dims[0]], f"rows and experts: {call.why}")
    ends = None if call.args.get("offs") is None else call.type_of(call.args["offs"])
    if ends is None or call.all_fixed(ends.dims):
        call.freeze([weights.dims[0]], f"rows and experts: {call.why}")
    else:
        call.trace.solver.unify(weights.dims[0], ends.dims[0], call.why)
    # The kernel reads rows that begin at multiples of sixteen bytes.
    multiple = max(1, 16 // call.outputs[0].element_size())
    call.trace.aligned.extend((dim, multiple) for dim in weights.dims[1:])
    matrix = replace(weights, dims=weights.dims[1:], axes=weights.axes[1:])
    return einsum(call, rows, matrix, "mk,kn->mn")


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", always=True,
)  # fmt: skip
def attention(call: Call) -> list[Type]:
    """Fused attention over [batch, heads, queries, size]: heads are one axis of all operands, the mask included."""
    q, k, v = (call.type_of(call.args[name]) for name in ("query", "key", "value"))
    solver = call.trace.solver
    batch = solver.unify_all([q.dims[0], k.dims[0], v.dims[0]], call.why)
    heads = solver.unify_all([k.dims[1], v.dims[1]], call.why)
    if size(q.dims[1]) != size(heads):
        # Several heads of the queries in turn share one of the keys and values.
        heads = product(heads, call.repeated(size(q.dims[1]) // size(heads)))
    solver.unify(heads, q.dims[1], call.why)
    size_qk = solver.unify_all([q.dims[3], k.dims[3]], call.why)
    tokens = solver.unify_all([k.dims[2], v.dims[2]], call.why)
    call.freeze([batch, q.dims[2], tokens], f"tokens and batch: {call.why}")
    if call.args.get("scale") is None or not (q.zero or k.zero):
        call.doubt(size_qk, f"the scale depends on the head size: {call.why}")
    shared = (batch, heads, q.dims[2], tokens)
    mask = call.args.get("attn_mask", call.args.get("attn_bias"))
    if mask is not None:
        broadcast(call, [Type(shared), call.type_of(mask)], tuple(size(d) for d in shared))
    call.trace.heads.append((heads, (size_qk, v.dims[3])))
    call.trace.macs.append(((*shared, size_qk), call.module))
    call.trace.macs.append(((*shared, v.dims[3]), call.module))
    return [Type((*shared[:3], v.dims[3]), v.zero), *(_per_head(t, shared) for t in call.outputs[1:])]


def _per_head(tensor: Tensor, shared: tuple[Dim, ...]) -> Type:
    """The type of what a kernel returns beside its result: sums per batch and head, or states of its own."""
    lead = shared[:2] if tuple(tensor.shape[:2]) == tuple(size(d) for d in shared[:2]) else ()
    return Type((*lead, *fixed_dims(tensor)[len(lead) :]))
