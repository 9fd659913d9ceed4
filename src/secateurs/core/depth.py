"""Whole layers as units: blocks that pass a residual stream on, so that without one the stream goes on unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .units import Cache, Reduce, reduce_rows

__all__ = ["LayerGroup"]


@dataclass(frozen=True)
class LayerGroup:
    """Blocks of one container that cost the same, so that what a decision leaves depends on their number only.

    Args:
        name: that of the container; where its blocks differ in cost, the further groups are numbered `name#2` …
        container: path of the list or sequence of modules that holds the blocks.
        blocks: paths of the blocks, in order.
        owned: for each block the parameters that no module outside it holds.
        least: the fewest blocks that must stay, 1 where the container would be empty otherwise.
    """

    name: str
    container: str
    blocks: tuple[str, ...]
    owned: tuple[tuple[str, ...], ...]
    least: int = 1

    @property
    def kind(self) -> str:
        return "layer"

    @property
    def size(self) -> int:
        return len(self.blocks)

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for names in self.owned for name in names)

    def gone(self, keep: Tensor) -> tuple[str, ...]:
        """Paths of the blocks that `keep`, bool [size], leaves out."""
        return tuple(block for block, stays in zip(self.blocks, keep.tolist(), strict=True) if not stays)

    def lift(
        self, saliency: Mapping[str, Tensor], reduce: Reduce = "sum", cache: Cache | None = None
    ) -> dict[str, Tensor]:
        """See `Group.lift`. A block's tensors have roles of their own, so all its entries count as one tensor's."""
        if not any(name in saliency for name in self.tensors):
            return {}
        scores = [_reduced([saliency[name] for name in names if name in saliency], reduce) for names in self.owned]
        return {self.name: torch.stack(scores)}

    def spread(self, keep: Tensor) -> dict[str, Tensor]:
        """See `Group.spread`."""
        return {name: stays for names, stays in zip(self.owned, keep, strict=True) for name in names}


def _reduced(tensors: list[Tensor], reduce: Reduce) -> Tensor:
    """The reduction of all entries of `tensors`; 0 without any."""
    filled = [tensor.reshape(1, -1) for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(())
    parts = torch.cat([reduce_rows(tensor, "sum" if reduce == "mean" else reduce) for tensor in filled])
    if reduce == "max":
        return parts.amax()
    return parts.sum() / (sum(tensor.numel() for tensor in filled) if reduce == "mean" else 1)
