"""Modules that stand in for PyTorch's where its Python code hard-wires a size that a cut changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import OptionError

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose inner width may differ from its embedding width.

    PyTorch's derives the head size as `embed_dim / num_heads`, so no head can be removed from it. This class has the
    same parameters under the same names and takes its sizes from them; `num_heads` is the one integer it needs. It is
    never constructed: an existing module changes class, so that weights, flags and hooks stay.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Transformer layers ask for this before they call a fused kernel that derives head sizes as PyTorch's does."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output and, if `need_weights`, the attention weights; shapes as in the class that it replaces."""
        if is_causal and attn_mask is None:
            raise OptionError("is_causal is only a hint about attn_mask: give the mask as well.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self._heads(self.bias_k.expand(k.shape[0], -1, -1))], 2)
            v = torch.cat([v, self._heads(self.bias_v.expand(v.shape[0], -1, -1))], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, dropout) @ v
        else:
            # As PyTorch does: the hint replaces the mask, also over the keys that the module itself adds.
            hinted = is_causal and key_padding_mask is None
            out = F.scaled_dot_product_attention(q, k, v, None if hinted else mask, dropout, hinted)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return (
            F.linear(query, weights[0], bias[0]),
            F.linear(key, weights[1], bias[1]),
            F.linear(value, weights[2], bias[2]),
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one additive float mask, broadcastable to [batch, heads, queries, keys]."""
        mask = None
        if attn_mask is not None:
            mask = self._additive(attn_mask, q)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], -1))
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        if padding is not None:
            padded = self._additive(padding, q).view(q.shape[0], 1, 1, -1)
            padded = F.pad(padded, (0, k.shape[2] - padded.shape[-1]))
            mask = padded if mask is None else mask + padded
        return mask

    @staticmethod
    def _additive(mask: Tensor, like: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(like.dtype)
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
