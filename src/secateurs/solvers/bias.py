"""Bias compensation: what inputs that go gave on average, added to a layer's bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.batch import double

__all__ = ["compensation"]


def compensation(weight: Tensor, mean: Tensor, goes: Tensor) -> Tensor:
    """b_i = Σ_{j goes} w_ij·m_j, of all constants the one with which the outputs change least: float64 [outputs].

    An et al. 2024, arXiv 2312.11983. With it the mean square error of one input is Var(x_j)·||W_:j||²; any other
    constant b + δ adds ||δ||², and none at all m_j²·||W_:j||².

    Args:
        weight: [groups, rows, columns], a column is what one input is multiplied by (`to_matrix`).
        mean: of each input, [groups, columns].
        goes: bool, broadcastable to the weight, the columns that go.

    >>> compensation(torch.tensor([[[2.0, 3.0]]]), torch.tensor([[5.0, 7.0]]), torch.tensor([False, True])).tolist()
    [21.0]
    """
    return torch.where(goes, double(weight) * mean[:, None], 0.0).sum(-1).flatten()
