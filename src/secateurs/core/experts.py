"""Whole experts as units: modules of a list, or positions of an axis that a loop walks through, beside their router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .units import Cache, Member, Reduce, reduce_rows

__all__ = ["ExpertGroup"]


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one mixture.

    Args:
        name: path of what holds them.
        size: how many there are.
        blocks: the path of each, in order; empty where they are no modules.
        owned: for each of them the names of its parameters, in one order.
        rows: the axes of other tensors, such as the router's, that have a position for each.
        least: fewest that may stay: as many as are chosen for a token.
    """

    name: str
    size: int
    blocks: tuple[str, ...]
    owned: tuple[tuple[str, ...], ...]
    rows: tuple[Member, ...]
    least: int = 1

    @property
    def kind(self) -> str:
        return "expert"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*(name for names in self.owned for name in names), *dict.fromkeys(m.tensor for m in self.rows))

    @property
    def router(self) -> str:
        """The name of a matrix that the router chooses by."""
        return next(member.tensor for member in self.rows if member.rank == 2)

    def gone(self, keep: Tensor) -> tuple[str, ...]:
        """Paths of the modules that `keep`, bool [size], leaves out."""
        return tuple(block for block, stays in zip(self.blocks, keep.tolist(), strict=False) if not stays)

    def lift(
        self, saliency: Mapping[str, Tensor], reduce: Reduce = "sum", cache: Cache | None = None
    ) -> dict[str, Tensor]:
        """See `Group.lift`. The experts' parameters of one name count as one tensor, as if they were stacked."""
        lifted: dict[str, Tensor] = {}
        for names in zip(*self.owned, strict=True):
            if all(name in saliency for name in names):
                each = [reduce_rows(saliency[name].reshape(1, -1), reduce)[0] for name in names]
                lifted[f"{self.name}.*{names[0].removeprefix(self.blocks[0])}"] = torch.stack(each)
        for member in self.rows:
            if member.tensor in saliency:
                lifted[member.tensor] = reduce_rows(saliency[member.tensor].movedim(member.axis, 0), reduce)
        return lifted

    def spread(self, keep: Tensor) -> dict[str, Tensor]:
        """See `Group.spread`."""
        masks = {name: stays for names, stays in zip(self.owned, keep, strict=False) for name in names}
        for member in self.rows:
            masks[member.tensor] = keep.view([-1 if axis == member.axis else 1 for axis in range(member.rank)])
        return masks
