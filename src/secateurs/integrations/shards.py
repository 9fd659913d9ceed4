"""Checkpoints of Hugging Face in safetensors shards: read tensor by tensor, written file by file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import FileError
from ..core.folder import replace_file, write_json

__all__ = ["Shards", "write_index", "write_shard"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Shards:
    """The tensors of a checkpoint folder by name, read from disk one at a time.

    Args:
        folder: with `model.safetensors`, or several files and their index.
        files: those to read, instead of what the folder's index says.

    Raises:
        FileError: there is no such checkpoint, or its index or one of its files cannot be read.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        self.folder = folder
        # Per tensor its file, number of entries and dtype, from the headers alone.
        self._known: dict[str, tuple[str, int, torch.dtype]] = {}
        for file in _files(folder) if files is None else files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    self._known[name] = (file, math.prod(part.get_shape()), _DTYPES[part.get_dtype()])

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, in memory of its own."""
        with self._open(self._known[name][0]) as file:
            # A tensor of the file would keep its pages in memory.
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def entries(self, name: str) -> int:
        """How many numbers the tensor has."""
        return self._known[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """In which it is stored."""
        return self._known[name][2]

    def bytes(self, name: str) -> int:
        """Its size in the file."""
        return self.entries(name) * self.dtype(name).itemsize

    def fingerprint(self) -> dict[str, int]:
        """Names and sizes of the files, which tell one checkpoint from another, though not all of them."""
        return {
            file: (self.folder / file).stat().st_size for file in sorted({known[0] for known in self._known.values()})
        }

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"{self.folder / file} cannot be read ({error}); it is missing, truncated or damaged: fetch it again."
            ) from error


def _files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise FileError(
                f"{folder} holds no checkpoint in safetensors; one in another format is converted by loading and "
                "saving it with transformers."
            )
        return [_SINGLE]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise FileError(f"{index} is no index of a checkpoint ({error!r}): fetch it again.") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """None; the file is there as a whole, or not at all."""

    def put(fresh: Path) -> None:
        # "pt" is what transformers asks a file for before it reads it.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata={"format": "pt"})

    replace_file(path, put)


def write_index(folder: Path, shards: Mapping[str, str], total_bytes: int) -> None:
    """None; the index of a checkpoint, written last, since what has one is taken for whole.

    Args:
        shards: the file of each tensor.
        total_bytes: of all tensors.
    """
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(shards.items()))}
    write_json(folder / _INDEX, content, indent=2)
