"""How many MACs each op does: a table from op name to a rule.

Keyed by name and not by op, since not every release of PyTorch has every op.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OptionError

__all__ = ["RULES", "Count", "Rule"]

Count = Callable[[Tensor], int]
Rule = Callable[[tuple[Any, ...], Any, Count], float]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the MACs of ops, given (positional arguments, output, count of the entries of an operand)."""

    def register(rule: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise OptionError(f"two rules count the MACs of {name}.")
            RULES[name] = rule
        return rule

    return register


def _product(a: Tensor, b: Tensor, count: Count) -> float:
    """MACs of (batches of) [m, k] @ [k, n]: each non-zero of either side meets a full row or column of the other."""
    inner = a.numel() // max(a.shape[-2], 1) if a.dim() > 1 else a.numel()
    return count(a) * count(b) / max(inner, 1)


def _rows(tensor: Tensor) -> float:
    """Number of vectors along the last axis."""
    return float(math.prod(tensor.shape[:-1]))


@_rule("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::_int_mm", "aten::_scaled_mm")
def _mm(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _product(args[0], args[1], count)


@_rule("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv", "aten::_addmm_activation", "aten::_sparse_addmm")
def _addmm(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _product(args[1], args[2], count)


@_rule("aten::addr")
def _addr(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return float(count(args[1]) * count(args[2]))


@_rule("aten::mkldnn_linear")
def _linear(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _rows(args[0]) * count(args[1])


@_rule("aten::_grouped_mm", "aten::_scaled_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped_mm(args: tuple[Any, ...], output: Any, count: Count) -> float:
    rows: Tensor = args[0]
    weights: Tensor = args[1]
    if rows.dim() == 3:
        return rows.numel() * weights.shape[-1] / (rows.shape[0] if weights.dim() == 2 else 1)
    # Which row meets which expert is not known here, so each meets the mean of their densities.
    return rows.numel() * weights.shape[-1] * (count(weights) / max(weights.numel(), 1))


@_rule("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
def _convolution(args: tuple[Any, ...], output: Any, count: Count) -> float:
    weight: Tensor = args[1]
    transposed: bool = args[6]
    reached: Tensor = args[0] if transposed else output
    return reached.numel() / max(weight.shape[0], 1) * count(weight)


@_rule("torchvision::deform_conv2d")
def _deformed(args: tuple[Any, ...], output: Any, count: Count) -> float:
    weight: Tensor = args[1]
    return int(output.numel()) / max(weight.shape[0], 1) * count(weight)


@_rule(
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)
def _attention(args: tuple[Any, ...], output: Any, count: Count) -> float:
    query: Tensor = args[0]
    key: Tensor = args[1]
    value: Tensor = args[2]
    return _rows(query) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


@_rule("aten::_flash_attention_forward", "flash_attn::_flash_attn_varlen_forward")
def _flash(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _packed_attention(*args[:5])


@_rule("flash_attn::_flash_attn_forward")
def _flash_whole(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _packed_attention(args[0], args[1], args[2], None, None)


@_rule("aten::_efficient_attention_forward")
def _efficient(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _packed_attention(*args[:3], *args[4:6])


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor | None, ends_k: Tensor | None) -> float:
    """Attention over [batch, positions, heads, size], or over sequences packed between the offsets `ends`."""
    if ends_q is None or ends_k is None:
        pairs = query.shape[0] * query.shape[1] * key.shape[1]
    else:
        pairs = int((ends_q.diff().long() * ends_k.diff().long()).sum())
    return pairs * query.shape[-2] * (query.shape[-1] + value.shape[-1])


@_rule("aten::mkldnn_rnn_layer")
def _rnn_layer(args: tuple[Any, ...], output: Any, count: Count) -> float:
    return _rows(args[0]) * (count(args[1]) + count(args[2]))


@_rule("aten::_cudnn_rnn", "aten::miopen_rnn")
def _rnn(args: tuple[Any, ...], output: Any, count: Count) -> float:
    matrices = sum(count(weight) for weight in args[1] if weight.dim() == 2)
    return _rows(args[0]) * matrices


@_rule("aten::_trilinear")
def _trilinear(args: tuple[Any, ...], output: Any, count: Count) -> float:
    """nn.Bilinear: one MAC for each entry of the joint index space of its three operands."""
    spaces = []
    for tensor, expand in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for axis in sorted(expand):
            shape.insert(axis, 1)
        spaces.append(shape)
    weight: Tensor = args[1]
    whole: int = math.prod(torch.broadcast_shapes(*spaces))
    return whole * (count(weight) / max(weight.numel(), 1))
