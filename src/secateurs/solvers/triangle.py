"""Symmetric matrices of which a half is enough: filled up, and turned round, in the memory that they take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["mirror", "strips", "turn"]

# Rows of a matrix that are worked on at a time: 16 MiB of 8192 columns in float64.
_ROWS = 256


def strips(rows: int) -> Iterator[tuple[int, int]]:
    """From which row to which before, of pieces that need little memory beside a square matrix of so many rows."""
    return ((a, min(a + _ROWS, rows)) for a in range(0, rows, _ROWS))


def mirror(matrix: Tensor) -> Tensor:
    """`matrix`, in which what stands above the diagonal now stands below it, too: in place, [..., n, n].

    >>> mirror(torch.tensor([[1.0, 2.0], [9.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    for a, b in strips(matrix.shape[-1]):
        corner = matrix[..., a:b, a:b]
        above = torch.ones(b - a, b - a, dtype=torch.bool, device=matrix.device).triu()
        corner.copy_(torch.where(above, corner, corner.mT))
        matrix[..., b:, a:b] = matrix[..., a:b, b:].mT
    return matrix


def turn(matrix: Tensor) -> Tensor:
    """`matrix` with its rows and its columns in reverse order: in place, [n, n].

    >>> turn(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[4., 3.],
            [2., 1.]])
    """
    n = len(matrix)
    for a, b in strips(n // 2):
        upper = matrix[a:b].flip(0, 1)
        matrix[a:b] = matrix[n - b : n - a].flip(0, 1)
        matrix[n - b : n - a] = upper
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
    return matrix
