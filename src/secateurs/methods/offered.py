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
    """For each group of these kinds that lies in blocks and in the caller's scope, by its name, the path of its block.

    A width that leads from one block into another is a stream and is left out. Heads may be of several blocks, as those
    of T5 are, whose position biases are of the first block and serve all: their block is the first.

    Args:
        model, example_inputs: as for `plan`.
        kinds: of "channel" and "head".
        scope, ignore: as for `plan`.

    Raises:
        ModelError: there is none.
        OptionError: a pattern of `scope` or `ignore` matches nothing.
    """
    structure = infer(model, example_inputs, entangled=False)
    blocks = blocks_of(model)
    homes: dict[str, str] = {}
    for group in in_scope(structure.groups, scope, ignore):
        found = list(dict.fromkeys(_home(tensor, blocks) for tensor in group.tensors))
        if group.kind in kinds and found[0] is not None and None not in found:
            homes |= {group.name: found[0]} if len(found) == 1 or group.kind == "head" else {}
    if not homes:
        reasons = "; ".join(dict.fromkeys(f.reason for f in structure.frozen[:3])) or "there are none"
        raise ModelError(
            f"no {' or '.join(kinds)} of a block of {type(model).__name__} can go by itself and lies in scope: "
            f"{reasons}."
        )
    return homes


def _home(tensor: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if not block or tensor.startswith(f"{block}.")), None)
