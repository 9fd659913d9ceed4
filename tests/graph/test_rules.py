"""Every rule, proved on the op itself: what is not proved here is listed with its reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from secateurs.core.dims import Fixed
from secateurs.graph.rules.registry import RULES, rule
from tests.graph.proof import prove_op, trace

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """A function of float inputs.

    Args:
        call: what is proved.
        shapes: of its inputs.
        free: whether units of its inputs can go at all; where not, that is what is asserted.
        positive: its inputs are positive.
        least: fewest units that stay.
    """

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    free: bool = True
    positive: bool = False
    least: int = 1
    constants: tuple[Any, ...] = field(default=(), repr=False)

    def inputs(self) -> list[Tensor]:
        drawn = [torch.randn(s, dtype=torch.float64) for s in self.shapes]
        return [t.abs() + 0.5 for t in drawn] if self.positive else drawn


def case(call: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> list[Case]:
    return [Case(call, shapes, **options)]


def frozen(call: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> list[Case]:
    return [Case(call, shapes, free=False, **options)]


def _same(name: str, *extra: Any, **options: Any) -> list[Case]:
    """An elementwise op of one tensor and constants."""
    return case(lambda x: getattr(aten, name)(x, *extra), (4, 5), **options)


def _conv(
    rank: int,
    inputs: int,
    outputs: int,
    groups: int = 1,
    transposed: bool = False,
    bias: bool = True,
    batched: bool = True,
    **options: Any,
) -> list[Case]:
    function = getattr(F, f"conv_transpose{rank}d" if transposed else f"conv{rank}d")
    weight = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    x = (2, inputs) if batched else (inputs,)
    shapes = [(*x, *[5] * rank), (*weight, *[3] * rank), *([(outputs,)] if bias else [])]
    return case(lambda x, w, b=None: function(x, w, b, groups=groups, **options), *shapes)


def _pool(name: str, rank: int, *args: Any) -> list[Case]:
    return [
        *case(lambda x: getattr(aten, name)(x, *args), (2, 4, *[6] * rank)),
        *case(lambda x: getattr(aten, name)(x, *args), (4, *[6] * rank)),
    ]


def _resize(name: str, rank: int, *args: Any) -> list[Case]:
    return case(lambda x: getattr(aten, name)(x, [7] * rank, *args), (2, 4, *[5] * rank))


def _reduced(name: str, **options: Any) -> list[Case]:
    function = getattr(torch, name)
    return [
        *case(lambda x: function(x, dim=1), (4, 5, 3), **options),
        *case(lambda x: function(x, dim=-1, keepdim=True), (4, 5, 3), **options),
    ]


def _heads(mask: bool = False, shared: int = 4) -> list[Case]:
    """Attention on views of flat projections, as models call it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        # The kernel wants one head size for all, and its scale is given: multiplied by a constant, the size is fixed.
        q, k, v = (x.unflatten(-1, (-1, 3)).transpose(1, 2) * torch.ones(3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=shared != 4, scale=0.5)

    shapes = [(2, 5, 12), (2, 6, 3 * shared), (2, 6, 3 * shared)]
    return case(attend, *shapes, *([(1, 4, 5, 6)] if mask else []))


ids = torch.tensor([[0, 2, 2], [5, 1, 0]])
where = torch.tensor([2, 0, 1])
lower = torch.tensor([[True, False, True, False, True]])


def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)


CASES: dict[str, list[Case]] = {
    # contract
    "mm": case(torch.mm, (4, 5), (5, 3)),
    "bmm": case(torch.bmm, (4, 3, 5), (4, 5, 6)),
    "mv": case(torch.mv, (4, 5), (5,)),
    "dot": case(torch.dot, (5,), (5,)),
    "vdot": case(torch.vdot, (5,), (5,)),
    "addmm": [*case(torch.addmm, (3,), (4, 5), (5, 3)), *case(torch.addmm, (4, 1), (4, 5), (5, 3))],
    "baddbmm": case(torch.baddbmm, (4, 3, 6), (4, 3, 5), (4, 5, 6)),
    "addmv": case(torch.addmv, (4,), (4, 5), (5,)),
    "_trilinear": frozen(F.bilinear, (2, 4), (2, 3), (5, 4, 3)),
    "_scaled_dot_product_flash_attention_for_cpu": [*_heads(), *_heads(mask=True), *_heads(shared=2)],
    # conv
    "convolution": [
        *_conv(1, 4, 6),
        *_conv(2, 4, 6, stride=2, padding=1),
        *_conv(3, 4, 6, bias=False),
        *_conv(2, 8, 12, groups=4),
        *_conv(2, 6, 6, groups=6),
        *_conv(2, 4, 12, groups=4),
        *_conv(2, 4, 6, batched=False),
        *_conv(1, 4, 6, transposed=True),
        *_conv(2, 8, 12, groups=4, transposed=True, stride=2),
        *_conv(2, 6, 6, groups=6, transposed=True),
        *_conv(3, 4, 6, transposed=True, bias=False),
        *_conv(2, 4, 6, transposed=True, batched=False),
    ],
    "max_pool2d_with_indices": case(lambda x: aten.max_pool2d_with_indices(x, 2)[0], (2, 4, 6, 6)),
    "max_pool3d_with_indices": case(lambda x: aten.max_pool3d_with_indices(x, 2)[0], (2, 4, 4, 4, 4)),
    "avg_pool2d": _pool("avg_pool2d", 2, 3, 2),
    "avg_pool3d": _pool("avg_pool3d", 3, 3, 2),
    "_adaptive_avg_pool2d": _pool("_adaptive_avg_pool2d", 2, (2, 3)),
    "_adaptive_avg_pool3d": _pool("_adaptive_avg_pool3d", 3, (2, 3, 2)),
    "adaptive_max_pool2d": _pool("adaptive_max_pool2d", 2, (2, 3)),
    "adaptive_max_pool3d": _pool("adaptive_max_pool3d", 3, (2, 3, 2)),
    "upsample_nearest1d": _resize("upsample_nearest1d", 1),
    "upsample_nearest2d": _resize("upsample_nearest2d", 2),
    "upsample_nearest3d": _resize("upsample_nearest3d", 3),
    "_upsample_nearest_exact1d": _resize("_upsample_nearest_exact1d", 1),
    "_upsample_nearest_exact2d": _resize("_upsample_nearest_exact2d", 2),
    "_upsample_nearest_exact3d": _resize("_upsample_nearest_exact3d", 3),
    "upsample_linear1d": _resize("upsample_linear1d", 1, False),
    "upsample_bilinear2d": _resize("upsample_bilinear2d", 2, True),
    "_upsample_bilinear2d_aa": _resize("_upsample_bilinear2d_aa", 2, False),
    "upsample_bicubic2d": _resize("upsample_bicubic2d", 2, False),
    "_upsample_bicubic2d_aa": _resize("_upsample_bicubic2d_aa", 2, False),
    "upsample_trilinear3d": _resize("upsample_trilinear3d", 3, False),
    # index
    "embedding": case(lambda w: F.embedding(ids, w), (6, 5)),
    "_embedding_bag": case(lambda w: aten._embedding_bag(w, ids[0], torch.tensor([0, 1])), (6, 5)),
    "_embedding_bag_forward_only": [
        *case(lambda w: F.embedding_bag(ids, w), (6, 5)),
        *case(lambda w: F.embedding_bag(ids, w, mode="max"), (6, 5)),
        *case(lambda w: F.embedding_bag(ids[0], w, where.sort()[0], mode="sum", padding_idx=2), (6, 5)),
    ],
    "nll_loss_forward": frozen(lambda x: F.nll_loss(x, torch.tensor([0, 2, 1])), (3, 4)),
    "nll_loss2d_forward": frozen(lambda x: F.nll_loss(x, torch.tensor([[0, 2], [1, -100]])), (2, 3, 2)),
    "index": [
        *case(lambda x: x[:, where], (4, 5, 3)),
        *case(lambda x: x[where, :, where], (4, 5, 3)),
        *case(lambda x: x[:, where, where], (4, 5, 3)),
        *case(lambda x: x[:, where, :, where], (4, 5, 6, 3)),
        *case(lambda x: x[:, ids], (4, 6, 3)),
        *case(lambda x: x[:, lower[0]], (4, 5, 3)),
        *frozen(lambda x: x[lower.expand(4, 5)], (4, 5, 3)),
    ],
    "_unsafe_index": case(lambda x: aten._unsafe_index(x, [None, where]), (4, 5, 3)),
    "index_select": case(lambda x: x.index_select(1, where), (4, 5, 3)),
    "gather": frozen(lambda x: x.gather(1, ids[:, :2]), (2, 6)),
    "scatter": frozen(lambda x: x.scatter(1, ids, 1.0), (2, 6)),
    "scatter_add": frozen(lambda x, y: x.scatter_add(1, ids, y), (2, 6), (2, 3)),
    "scatter_reduce": frozen(lambda x, y: x.scatter_reduce(1, ids, y, "sum"), (2, 6), (2, 3)),
    "index_put": frozen(lambda x: x.index_put((where,), torch.zeros((), dtype=x.dtype)), (4, 5)),
    "_index_put_impl": frozen(lambda x, y: aten._index_put_impl_(x, [where], y), (4, 5), (3, 5)),
    "_unsafe_index_put": frozen(lambda x, y: aten._unsafe_index_put(x, [where], y), (4, 5), (3, 5)),
    "index_add": frozen(lambda x, y: x.index_add(0, where, y), (4, 5), (3, 5)),
    "index_copy": frozen(lambda x, y: x.index_copy(0, where, y), (4, 5), (3, 5)),
    "index_fill": frozen(lambda x: x.index_fill(0, where, 2.0), (4, 5)),
    "masked_select": frozen(lambda x: x.masked_select(lower), (4, 5)),
    "masked_scatter": frozen(lambda x, y: x.masked_scatter(lower, y), (4, 5), (4, 5)),
    "take": frozen(lambda x: x.take(ids), (4, 5)),
    "put": frozen(lambda x: x.put(where, torch.ones(3, dtype=x.dtype)), (4, 5)),
    "grid_sampler_2d": frozen(lambda x, g: F.grid_sample(x, g, align_corners=False), (2, 3, 4, 4), (2, 5, 5, 2)),
    "isin": frozen(lambda x: torch.isin(x, torch.ones(5, dtype=x.dtype)), (4, 5)),
    "histc": frozen(lambda x: torch.histc(x, 4, -1, 1), (4, 5)),
    "bincount": frozen(lambda x: torch.bincount(torch.tensor([0, 1]), x), (2,)),
    # norm
    "native_batch_norm": case(
        lambda x, *p: aten.native_batch_norm(x, *p, False, 0.1, 1e-5)[0],
        (3, 4, 5),
        (4,),
        (4,),
        (4,),
        (4,),
        positive=True,
    ),
    "_native_batch_norm_legit": [
        *case(lambda x, *p: aten._native_batch_norm_legit(x, *p, True, 0.1, 1e-5), (3, 4, 5), (4,), (4,), (4,), (4,)),
        *case(lambda x: aten._native_batch_norm_legit(x, None, None, True, 0.1, 1e-5), (3, 4, 5)),
    ],
    "_native_batch_norm_legit_no_training": case(
        lambda x, *p: aten._native_batch_norm_legit_no_training(x, *p, 0.1, 1e-5),
        *[(3, 4, 5), (4,), (4,), (4,), (4,)],
        positive=True,
    ),
    "_batch_norm_no_update": case(
        lambda x, *p: aten._batch_norm_no_update(x, *p, 0.1, 1e-5)[0], (3, 4, 5), (4,), (4,), (4,), (4,), positive=True
    ),
    "_batch_norm_with_update": case(
        lambda x, *p: aten._batch_norm_with_update(x, *p, 0.1, 1e-5)[0], (3, 4, 5), (4,), (4,), (4,), (4,)
    ),
    "native_layer_norm": [
        *case(lambda x, w, b: F.layer_norm(x, (5,), w, b), (3, 4, 5), (5,), (5,)),
        *case(lambda x, w: F.layer_norm(x, (4, 5), w), (3, 4, 5), (4, 5)),
        *case(lambda x: F.layer_norm(x, (5,)), (3, 4, 5)),
    ],
    "native_group_norm": [
        *case(lambda x, w, b: F.group_norm(x, 3, w, b), (2, 12, 5), (12,), (12,)),
        *case(lambda x: F.group_norm(x, 3), (2, 12, 5)),
        *case(lambda x, w: F.group_norm(x, 6, w), (2, 6, 5), (6,)),
        *case(lambda x, w: F.group_norm(x, 1, w), (2, 6, 5), (6,)),
    ],
    # pointwise
    "pointwise": [
        *case(lambda x, y: x + y, (4, 5), (5,)),
        *case(lambda x, y: x - y, (4, 1), (4, 5)),
        *case(lambda x, y: torch.rsub(x, y), (4, 5), (4, 5)),
        *case(lambda x, y: x * y, (4, 5), (4, 1)),
        *case(lambda x, y: x * y, (4, 1), (5,)),
        *case(lambda x, y: x / y, (4, 5), (5,), positive=True),
        *case(lambda x, y: x + y, (4, 5), ()),
        *case(lambda x: x + 1, (4, 5)),
        *case(lambda x: x * 2, (4, 5)),
        *case(lambda x: 1 / x, (4, 5), positive=True),
        *case(lambda x: x**2, (4, 5)),
        *case(lambda x: x**0, (4, 5)),
        *case(lambda x: x**-1, (4, 5), positive=True),
        *case(lambda x: 2.0**x, (4, 5)),
        *case(lambda x, y: x**y, (4, 5), (5,), positive=True),
        *case(torch.log, (4, 5), positive=True),
        *case(torch.rsqrt, (4, 5), positive=True),
        *case(lambda x: x.clamp(-0.5, 0.5), (4, 5)),
        *case(lambda x: x.clamp(max=-1), (4, 5)),
        *case(lambda x: x.clamp_min(1), (4, 5)),
        *case(lambda x: x.clamp_max(-1), (4, 5)),
        *case(lambda x, y: torch.clamp(x, y), (4, 5), (5,)),
        *case(lambda x: F.threshold(x, 0.5, 3.0), (4, 5)),
        *case(lambda x: F.threshold(x, -0.5, 3.0), (4, 5)),
        *case(torch.maximum, (4, 5), (5,)),
        *case(torch.sigmoid, (4, 5)),
        *case(torch.exp, (4, 5)),
        *case(torch.sqrt, (4, 5), positive=True),
        *case(lambda x, y: x > y, (4, 5), (5,)),
        *case(lambda x: x.masked_fill(x > 0, 0.0), (4, 5)),
        *case(lambda x: x.masked_fill(x > 0, 1.0), (4, 5)),
        *case(lambda x, y: x.add_(y), (4, 5), (5,)),
        *case(lambda x, y: x.mul(2).add_(1).mul(y), (4, 5), (5,)),
        *case(lambda x: torch.relu_(x * 2), (4, 5)),
    ],
    "clone": _same("clone"),
    "detach": _same("detach"),
    "alias": _same("alias"),
    "_to_copy": case(lambda x: aten._to_copy(x, dtype=torch.float32), (4, 5)),
    "lift_fresh": _same("lift_fresh"),
    "copy": [
        *case(lambda x, y: x.copy_(y), (4, 5), (5,)),
        *case(lambda x, y: (x * 2).copy_(torch.sigmoid(y)), (4, 5), (4, 5)),
    ],
    "hardswish": _same("hardswish"),
    "hardtanh": [*_same("hardtanh"), *_same("hardtanh", 0.5, 1.0)],
    "where": [
        *case(lambda x, y: torch.where(x > 0, x, y), (4, 5), (5,)),
        *case(lambda x: torch.where(x > 0, x, 1.0), (4, 5)),
        *case(lambda x: torch.where(lower, x, 0.0), (4, 5)),
    ],
    "masked_fill": [*_same("masked_fill", lower, 2.0), *_same("masked_fill", lower, 0)],
    "native_dropout": _same("native_dropout", 0.5, True),
    "bernoulli": case(lambda x: torch.bernoulli(torch.sigmoid(x)), (4, 5)),
    "fill": case(lambda x: (x * 1).fill_(2.0), (4, 5)),
    "zeros_like": case(lambda x: torch.zeros_like(x) + x, (4, 5)),
    "ones_like": _same("ones_like"),
    "empty_like": _same("empty_like"),
    "full_like": _same("full_like", 3.0),
    "rand_like": _same("rand_like"),
    "randn_like": _same("randn_like"),
    "lerp": [*case(lambda x, y: torch.lerp(x, y, 0.3), (4, 5), (5,)), *case(torch.lerp, (4, 5), (5,), (5,))],
    "addcmul": case(torch.addcmul, (4, 5), (5,), (4, 1)),
    "addcdiv": case(torch.addcdiv, (4, 5), (5,), (4, 5), positive=True),
    "zero": case(lambda x: (x * 1).zero_(), (4, 5)),
    "_prelu_kernel": case(F.prelu, (4, 5, 3), (5,)),
    "logical_not": _same("logical_not"),
    "normal": case(lambda x: (x * 1).normal_(), (4, 5)),
    "uniform": case(lambda x: (x * 1).uniform_(), (4, 5)),
    "rsub": case(torch.rsub, (4, 5), (5,)),
    "relu": _same("relu"),
    "gelu": _same("gelu"),
    "silu": _same("silu"),
    "mish": _same("mish"),
    "elu": _same("elu"),
    "celu": _same("celu"),
    "log_sigmoid_forward": _same("log_sigmoid_forward"),
    "rrelu_with_noise": case(lambda x: F.rrelu(x), (4, 5)),
    "new_zeros": case(lambda x: (x.new_zeros(3), x * 2), (4, 5)),
    "new_ones": case(lambda x: (x.new_ones(3), x * 2), (4, 5)),
    "new_full": case(lambda x: (x.new_full((3,), 2.0), x * 2), (4, 5)),
    "new_empty": case(lambda x: (x.new_empty(3), x * 2), (4, 5)),
    "new_empty_strided": case(lambda x: (x.new_empty_strided((3,), (1,)).zero_(), x * 2), (4, 5)),
    # reduce
    **{name: _reduced(name) for name in ["mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean"]},
    **{name: _reduced(name) for name in ["prod", "logsumexp", "any", "all", "argmax", "argmin", "median", "nansum"]},
    "max": [*_reduced("max"), *case(torch.max, (4, 5))],
    "min": [*_reduced("min"), *case(torch.min, (4, 5))],
    "aminmax": case(lambda x: torch.aminmax(x, dim=1), (4, 5, 3)),
    "norm": case(lambda x: aten.norm(x, 2.0, [1], True), (4, 5, 3)),
    "linalg_vector_norm": _reduced("norm"),
    "_softmax": case(lambda x: x.softmax(1), (4, 5, 3)),
    "_log_softmax": case(lambda x: x.log_softmax(-1), (4, 5, 3)),
    "_safe_softmax": case(lambda x: aten._safe_softmax(x, 1), (4, 5, 3)),
    "logcumsumexp": case(lambda x: x.logcumsumexp(1), (4, 5, 3)),
    "cumsum": case(lambda x: x.cumsum(1), (4, 5, 3)),
    "cumprod": case(lambda x: x.cumprod(1), (4, 5, 3)),
    "cummax": case(lambda x: x.cummax(1), (4, 5, 3)),
    "cummin": case(lambda x: x.cummin(-1), (4, 5, 3)),
    "sort": case(lambda x: x.sort(1), (4, 5, 3)),
    "topk": case(lambda x: x.topk(2, 1), (4, 5, 3)),
    "triu": case(lambda x: x.triu(), (4, 5, 3)),
    "tril": case(lambda x: x.tril(1), (4, 5, 3)),
    "equal": frozen(torch.equal, (4, 5), (4, 5)),
    "nonzero": frozen(torch.nonzero, (4, 5)),
    # view
    "view": [
        *case(lambda x: x.view(4, 3, 4), (4, 12)),
        *case(lambda x: x.view(2, 2, 12), (4, 3, 4)),
        *case(lambda x: x.view(12, 5), (4, 3, 5)),
        *case(lambda x: x.view(-1), (4, 3, 5)),
        *case(lambda x: x.view(8, 3), (4, 6)),
        *case(lambda x: x.view(1, 4, 1, 6), (4, 6)),
    ],
    "_unsafe_view": case(lambda x: aten._unsafe_view(x, [4, 3, 4]), (4, 12)),
    "_reshape_alias": case(lambda x: aten._reshape_alias(x, [4, 3, 4], [12, 4, 1]), (4, 12)),
    "_reshape_copy": case(lambda x: aten._reshape_copy(x, [4, 3, 4]), (4, 12)),
    "view_copy": case(lambda x: aten.view_copy(x, [4, 3, 4]), (4, 12)),
    "t": [*case(torch.t, (4, 5)), *case(torch.t, (4,))],
    "transpose": case(lambda x: x.transpose(0, -1), (4, 5, 3)),
    "permute": case(lambda x: x.permute(1, -1, 0), (4, 5, 3)),
    "transpose_copy": case(lambda x: aten.transpose_copy(x, 0, -1), (4, 5, 3)),
    "permute_copy": case(lambda x: aten.permute_copy(x, [1, -1, 0]), (4, 5, 3)),
    "unsqueeze": [*case(lambda x: x.unsqueeze(1), (4, 5)), *case(lambda x: x.unsqueeze(-1), (4, 5))],
    "squeeze": [
        *case(lambda x: x.squeeze(), (1, 4, 1, 5), least=2),
        *case(lambda x: x.squeeze(2), (1, 4, 1, 5)),
        *case(lambda x: x.squeeze((0, -2)), (1, 4, 1, 5)),
        *case(lambda x: x.squeeze(1), (1, 4, 1, 5), least=2),
    ],
    "expand": [*case(lambda x: x.expand(3, 4, 5), (4, 5)), *case(lambda x: x.expand(-1, 6, -1), (4, 1, 5))],
    "repeat": [*case(lambda x: x.repeat(2, 3), (4, 5)), *case(lambda x: x.repeat(2, 1, 3), (4, 5))],
    "cat": [
        *case(lambda x, y: torch.cat([x, y], 1), (4, 5), (4, 3)),
        *case(lambda x: torch.cat([x, x, x], -1), (4, 5)),
        *case(lambda x, y: torch.cat([x, torch.zeros(0, dtype=x.dtype), y]), (4, 5), (2, 5)),
    ],
    "stack": case(lambda x, y: torch.stack([x, y], 1), (4, 5), (4, 5)),
    "split": [*case(lambda x: x.split(2, 1), (4, 5)), *case(lambda x: x.chunk(2, -1), (4, 6))],
    "split_with_sizes": case(lambda x: x.split([1, 4], 1), (4, 5)),
    "unsafe_split": case(lambda x: aten.unsafe_split(x, 2, 1), (4, 5)),
    "unsafe_split_with_sizes": case(lambda x: aten.unsafe_split_with_sizes(x, [1, 4], 1), (4, 5)),
    "slice": [
        *case(lambda x: x[:, 1:4], (4, 6)),
        *case(lambda x: x[:, -2:], (4, 6)),
        *case(lambda x: x[2:, :99], (4, 6)),
        *case(lambda x: x[:, ::2], (4, 6)),
        *case(lambda x: x[:, 3:3], (4, 6)),
    ],
    "select": case(lambda x: x[:, 2], (4, 5, 3)),
    "unbind": case(lambda x: x.unbind(1), (4, 5, 3)),
    "constant_pad_nd": [
        *case(lambda x: F.pad(x, (1, 2)), (4, 5)),
        *case(lambda x: F.pad(x, (0, 0, 1, 2)), (4, 5)),
        *case(lambda x: F.pad(x, (1, 2), value=3.0), (4, 5)),
        *case(lambda x: F.pad(x, (-1, 2)), (4, 5)),
    ],
    "reflection_pad1d": case(lambda x: F.pad(x, (1, 2), mode="reflect"), (2, 4, 5)),
    "reflection_pad2d": case(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), (2, 4, 5, 5)),
    "replication_pad1d": case(lambda x: F.pad(x, (1, 2), mode="replicate"), (2, 4, 5)),
    "replication_pad2d": case(lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), (2, 4, 5, 5)),
    "flip": case(lambda x: x.flip(1), (4, 5)),
    "roll": [*case(lambda x: x.roll(2, 1), (4, 5)), *frozen(lambda x: x.roll(2), (4, 5))],
    "glu": case(lambda x: F.glu(x, 1), (4, 6, 3)),
    "channel_shuffle": case(lambda x: F.channel_shuffle(x, 2), (2, 6, 3, 3)),
    "pixel_shuffle": [
        *case(lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 3)),
        *case(lambda x: F.pixel_shuffle(x, 2), (12, 3, 3)),
    ],
    "pixel_unshuffle": case(lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 4)),
    # complex
    "view_as_complex": case(lambda x: torch.view_as_complex(x).abs(), (4, 5, 2)),
    "view_as_real": case(lambda x: torch.view_as_real(torch.view_as_complex(x) * 2), (4, 5, 2)),
    "complex": case(lambda x, y: torch.complex(x, y).abs(), (4, 5), (4, 5)),
    "_fft_r2c": case(lambda x: torch.fft.rfft2(x, dim=(1, 2)).abs(), (4, 5, 6, 3)),
    "_fft_c2c": case(lambda x: torch.fft.fft(torch.view_as_complex(x), dim=-1).abs(), (4, 5, 2)),
    "_fft_c2r": case(lambda x: torch.fft.irfft(torch.view_as_complex(x), n=7, dim=0), (4, 5, 2)),
    # packed
    "_pack_padded_sequence": case(lambda x: packed(x).data, (2, 3, 5)),
    "as_strided": frozen(lambda x: x.as_strided((2, 2), (1, 2)), (4, 5)),
    "diagonal": frozen(torch.diagonal, (4, 5)),
    "unfold": frozen(lambda x: x.unfold(1, 2, 1), (4, 5)),
    "im2col": frozen(lambda x: F.unfold(x, 2), (2, 3, 4, 4)),
}

_GPU = "a kernel of GPUs: the op for the CPU has the same rule"
UNPROVED: dict[str, str] = {
    "_scaled_dot_product_cudnn_attention": _GPU,
    "_scaled_dot_product_efficient_attention": _GPU,
    "_scaled_dot_product_flash_attention": _GPU,
    "_scaled_dot_product_fused_attention_overrideable": _GPU,
    "cudnn_batch_norm": _GPU,
    "miopen_batch_norm": _GPU,
    "_fused_rms_norm": "decomposed on the CPU; the rule is that of native_layer_norm",
    "linear": "decomposed on the CPU into addmm",
    "native_channel_shuffle": "called channel_shuffle on the CPU",
    "_grouped_mm": "proved below, on shapes that its alignment allows",
    "_weight_norm_interface": "proved in test_lengths, where directions are not zero",
    "grouped_mm_fallback": "an op of transformers with the rule of _grouped_mm",
    **dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), "no tensor goes in: the rule of new_zeros"),
}


def test_every_rule_is_proved_or_excused() -> None:
    assert set(CASES) | set(UNPROVED) == set(RULES)
    assert not set(CASES) & set(UNPROVED)


@pytest.mark.parametrize("name", sorted(CASES))
def test_rule(name: str) -> None:
    for number, sample in enumerate(CASES[name]):
        inputs = sample.inputs()
        for zeroed in itertools.islice(itertools.product([True, False], repeat=len(inputs)), 8):
            if not sample.free:
                assert_frozen(name, sample, inputs, zeroed)
                continue
            for seed in range(2):
                run = prove_op(sample.call, inputs, zeroed, seed=seed, least=sample.least)
            assert name == "pointwise" or name in run.rules, f"case {number} calls {run.rules}, not {name}"
            assert run.live(), f"case {number} has no unit that can go"


def assert_frozen(name: str, sample: Case, inputs: list[Tensor], zeroed: tuple[bool, ...]) -> None:
    run = trace(sample.call, inputs, zeroed)
    assert name in run.rules
    assert not run.live()


def test_grouped_products() -> None:
    offsets = torch.tensor([3, 8], dtype=torch.int32)

    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x, w, offs=offsets)

    x, w = torch.randn(8, 4, dtype=torch.bfloat16).repeat(1, 4), torch.randn(2, 16, 32, dtype=torch.bfloat16)
    run = trace(grouped, [x, w], [False, True])
    solver = run.recorder.trace.solver
    rows, experts = (run.recorder.type_of(t).dims for t in run.inputs)
    assert solver.resolve(rows[0]) == Fixed(8)
    assert solver.resolve(experts[0]) == Fixed(2)
    assert solver.resolve(rows[1]) == solver.resolve(experts[1])
    assert run.recorder.steps[-1].types[0].dims[1] == solver.resolve(experts[2])
    assert run.recorder.trace.contracted == {("p0", 1), ("p1", 1)}


def test_a_second_rule_for_an_op_is_refused() -> None:
    with pytest.raises(ValueError, match="mm already has a rule: plain"):
        rule("mm")(RULES["mm"])


def test_an_op_without_a_rule_freezes_what_it_touches() -> None:
    run = trace(lambda x: torch.linalg.qr(x), [torch.randn(4, 4)], [True])
    assert not run.live()
    assert run.recorder.trace.unknown == {"linalg_qr": ""}
    assert run.recorder.trace.solver.reason("#1") == "linalg_qr has no rule, in the model"


def test_a_wrong_rule_is_caught(monkeypatch) -> None:
    """The proof can fail: transposing without swapping types, and claiming zeros that are none."""
    monkeypatch.setitem(RULES, "transpose", RULES["clone"])
    with pytest.raises((AssertionError, RuntimeError)):
        prove_op(lambda x: x.transpose(0, 1), [torch.randn(4, 5)], [True])
    monkeypatch.setitem(RULES, "exp", RULES["relu"])
    monkeypatch.setattr("secateurs.graph.rules.pointwise._ZERO_PRESERVING", {"exp"})
    with pytest.raises(AssertionError, match="claims zeros"):
        prove_op(torch.exp, [torch.randn(4, 5)], [True])
