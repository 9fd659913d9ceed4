"""The units that a method for transformers prunes: heads and inner channels of blocks, whose removal equals zeroing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..core.errors import ModelError
from ..graph.infer import infer
from ..planning import in_scope
from ..solvers import blocks_of

__all__ = ["offered"]


def offered(
    model: nn.Module,
    example_inputs: Any,
    kinds: Collection[str],
    *,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
) -> dict[str, str]:
    """For each group of these kinds that lies whole in a block and in the caller's scope, by name, that block's path.

    Args:
        model, example_inputs: as for `plan`.
        kinds: of "channel" and "head".
        scope, ignore: as for `plan`.

    Raises:
        ModelError: there is none.
        OptionError: a pattern of `scope` or `ignore` matches nothing.
    """
    structure = infer(model, example_inputs, entangled=False)
    blocks = [f"{block}." if block else "" for block in blocks_of(model)]
    groups = [group for group in in_scope(structure.groups, scope, ignore) if group.kind in kinds]
    homes = {
        group.name: block.removesuffix(".")
        for group in groups
        for block in blocks
        if all(tensor.startswith(block) for tensor in group.tensors)
    }
    if not homes:
        reasons = "; ".join(dict.fromkeys(f.reason for f in structure.frozen[:3])) or "there are none"
        raise ModelError(
            f"no {' or '.join(kinds)} of a block of {type(model).__name__} can go by itself and lies in scope: "
            f"{reasons}."
        )
    return homes
