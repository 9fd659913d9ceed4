"""How large a model's file is, without writing it."""

from __future__ import annotations

import json
from itertools import accumulate

from torch import nn

__all__ = ["size_on_disk"]


def size_on_disk(model: nn.Module) -> int:
    """Bytes of a safetensors file of the model's parameters and buffers: the data and the header that lists them.

    Tied tensors are stored once. Saved models that carry further tensors are larger by those.
    """
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    ends = list(accumulate(t.numel() * t.element_size() for t in tensors.values()))
    starts = [0, *ends[:-1]] if ends else []
    header = {
        name: {"dtype": _code(t.dtype.itemsize), "shape": list(t.shape), "data_offsets": [start, end]}
        for (name, t), start, end in zip(tensors.items(), starts, ends, strict=True)
    }
    text = len(json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + (ends[-1] if ends else 0)


def _code(width: int) -> str:
    """Safetensors' names of types have two to four letters; three is within a byte a tensor."""
    return "F" + str(8 * width)
