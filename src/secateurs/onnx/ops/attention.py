"""Attention and rotary embedding as ops of their own (op set 23)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .table import Attributes, op

__all__: list[str] = []


@op("Attention")
def attention(
    a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, past_k: Any = None, past_v: Any = None, *_: Any
) -> Any:
    """Scaled dot-product attention over [batch, heads, tokens, size], or [batch, tokens, heads · size]."""
    if a.outputs > 3 or a.get("softcap", 0.0):
        raise a.refuse("attention with a soft cap, or that returns its scores")
    flat = q.dim() == 3
    if flat:
        q = _heads(q, a.get("q_num_heads"))
        k, v = (_heads(t, a.get("kv_num_heads")) for t in (k, v))
    if past_k is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    causal = bool(a.get("is_causal", 0))
    if mask is not None and mask.shape[-1] < k.shape[2]:
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=False if mask.dtype == torch.bool else -torch.inf)
    if mask is not None and causal:
        raise a.refuse("causal attention with a mask beside it")
    grouped = q.shape[1] != k.shape[1]
    made = F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=a.get("scale"), enable_gqa=grouped
    )  # fmt: skip
    made = made.transpose(1, 2).flatten(2) if flat else made
    return (made, k, v)[: a.outputs] if a.outputs > 1 else made


def _heads(x: Tensor, count: int) -> Tensor:
    split: Tensor = x.unflatten(2, (count, -1))
    return split.transpose(1, 2)


@op("RotaryEmbedding")
def rotary(a: Attributes, x: Tensor, cos: Tensor, sin: Tensor, ids: Any = None) -> Tensor:
    """Pairs of a head's values turned by an angle that grows with the position."""
    flat = x.dim() == 3
    heads = _heads(x, a.get("num_heads")) if flat else x
    part = a.get("rotary_embedding_dim", 0) or heads.shape[-1]
    turned, rest = heads[..., :part], heads[..., part:]
    c, s = ((t if ids is None else t[ids]).unsqueeze(1) for t in (cos, sin))
    if a.get("interleaved", 0):
        first, second = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack([c * first - s * second, s * first + c * second], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        made = torch.cat([c * first - s * second, s * first + c * second], -1)
    made = made if part == heads.shape[-1] else torch.cat([made, rest], -1)
    return made.transpose(1, 2).flatten(2) if flat else made
