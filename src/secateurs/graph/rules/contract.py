"""Matrix products: the contracted axes are one, the free ones go out."""

from __future__ import annotations

from ...core.dims import Dim, Fixed, size
from ..trace import Call, Type, rule
from .pointwise import broadcast

__all__ = ["einsum"]

# Operands first, then the output, in the notation of einsum.
_EQUATIONS = {
    "mm": "mk,kn->mn", "addmm": "mk,kn->mn", "bmm": "bmk,bkn->bmn", "baddbmm": "bmk,bkn->bmn", "mv": "mk,k->m",
    "dot": "k,k->", "addmv": "mk,k->m", "linear": None,
}  # fmt: skip


def einsum(call: Call, left: Type, right: Type, equation: str) -> Type:
    """The product of two operands; charges its MACs, notes which axis of a parameter is contracted, and couples.

    A contraction of two activations is neutral to zeroing only if one of them is exactly zero there.
    """
    operands, out = equation.split("->")
    solver, trace = call.trace.solver, call.trace
    letters: dict[str, list[Dim]] = {}
    for kind, names in zip((left, right), operands.split(","), strict=True):
        for dim, letter in zip(kind.dims, names, strict=True):
            letters.setdefault(letter, []).append(dim)
    dims = {letter: solver.unify_all(group, call.why) for letter, group in letters.items()}
    trace.macs.append((tuple(dims.values()), call.module))
    contracted = [letter for letter in dims if letter not in out]
    for kind, names in zip((left, right), operands.split(","), strict=True):
        if kind.param:
            trace.contracted.update((kind.param, kind.axes[names.index(k)]) for k in contracted)
    if not (left.zero or right.zero):
        for letter in contracted:
            solver.entangle(dims[letter], f"summed over values that zeroing does not make zero: {call.why}")
    if "b" in dims and not (left.param or right.param):
        trace.heads.append(dims["b"])
        trace.head_sizes.extend(dims[k] for k in dims if k != "b")
    return Type(tuple(dims[k] for k in out), left.zero and right.zero)


def _settle(call: Call, kind: Type, *operands: Type) -> Type:
    """The output is zero where removed if each operand with a free atom is zero there."""
    zero = all(o.zero for o in operands if any(not isinstance(d, Fixed) for d in o.dims))
    return Type(kind.dims, zero)


@rule("mm", "bmm", "mv", "dot")
def product(call: Call) -> Type:
    """A plain matrix product."""
    left, right = call.types()[:2]
    return einsum(call, left, right, str(_EQUATIONS[call.name]))


@rule("addmm", "baddbmm", "addmv")
def add_product(call: Call) -> Type:
    """A matrix product plus a broadcast term."""
    bias, left, right = call.types()[:3]
    out = einsum(call, left, right, str(_EQUATIONS[call.name]))
    dims = broadcast(call, [out, bias], tuple(size(d) for d in out.dims))
    weight_only = right.zero and right.param is not None and bias.zero
    return Type(dims, weight_only or (out.zero and bias.zero))


@rule("linear")
def linear(call: Call) -> Type:
    """A linear layer that was not decomposed."""
    x, weight, *bias = call.types()
    free = "abcdefgh"[: len(x.dims) - 1]
    out = einsum(call, x, weight, f"{free}k,nk->{free}n")
    dims = broadcast(call, [out, *bias], tuple(size(d) for d in out.dims))
    return Type(dims, weight.zero and all(b.zero for b in bias))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(call: Call) -> list[Type]:
    """Fused attention over [batch, heads, queries, size]: heads are one axis of all operands."""
    q, k, v = (call.type_of(call.args[name]) for name in ("query", "key", "value"))
    solver = call.trace.solver
    batch, heads = (solver.unify_all([x.dims[i] for x in (q, k, v)], call.why) for i in (0, 1))
    size_qk = solver.unify_all([q.dims[3], k.dims[3]], call.why)
    tokens = solver.unify_all([k.dims[2], v.dims[2]], call.why)
    call.freeze([batch, q.dims[2], tokens], f"tokens and batch: {call.why}")
    if call.args.get("scale") is None or not (q.zero or k.zero):
        solver.entangle(size_qk, f"the scale depends on the head size: {call.why}")
    call.trace.heads.append(heads)
    call.trace.head_sizes.extend([size_qk, v.dims[3]])
    shared = (batch, heads, q.dims[2], tokens)
    call.trace.macs.append(((*shared, size_qk), call.module))
    call.trace.macs.append(((*shared, v.dims[3]), call.module))
    out = Type((batch, heads, q.dims[2], v.dims[3]), v.zero)
    return [out, *(Type(tuple(Fixed(n) for n in t.shape)) for t in call.outputs[1:])]
