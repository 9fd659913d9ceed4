"""Magnitude: what is small goes. Needs no data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..core.errors import OptionError
from .evidence import values
from .registry import criterion

__all__ = ["magnitude"]


def _root(reduced: Tensor, *, norm: float = 1.0) -> Tensor:
    return reduced if norm == 1 else reduced.pow(1 / norm)


@criterion(
    "magnitude", finish=_root, paper="Han et al. 2015, arXiv 1506.02626; filters: Li et al. 2017, arXiv 1608.08710"
)
def magnitude(model: nn.Module, names: Sequence[str], *, norm: float = 1.0) -> dict[str, Tensor]:
    """|w|; of a unit the p-norm of its entries inside each tensor, (sum |w|^p)^(1/p).

    Args:
        model: where the tensors live.
        names: parameters.
        norm: p; 1 (default, as in filter pruning and SPA) or 2 are usual. Single weights rank the same under any p.
    """
    if not norm > 0:
        raise OptionError(f"norm must be positive, got {norm}.")
    entries = {name: w.abs() for name, w in values(model, names).items()}
    return entries if norm == 1 else {name: w.pow(norm) for name, w in entries.items()}
