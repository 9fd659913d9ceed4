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

__all__ = ["Rows", "Shards", "write_index", "write_shard"]

# Of a stack of matrices that is stored in pieces: per matrix the names of those that stand one under the other in it.
Rows = tuple[tuple[str, ...], ...]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Shards:
    """The tensors of a checkpoint folder by name, read from disk one at a time.

    Args:
        folder: with `model.safetensors`, or several files and their index.
        files: those to read, instead of what the folder's index says.
        stacks: by a name of their own, tensors [matrices, rows, columns] that the files have in pieces.

    Raises:
        FileError: there is no such checkpoint, or its index or one of its files cannot be read.
    """

    def __init__(
        self, folder: Path, files: Iterable[str] | None = None, stacks: Mapping[str, Rows] | None = None
    ) -> None:
        self.folder = folder
        self.stacks = dict(stacks or {})
        # Per tensor its file, shape and dtype, from the headers alone.
        self._known: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        for file in _files(folder) if files is None else files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    self._known[name] = (file, tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self.stacks

    @property
    def names(self) -> list[str]:
        """Of all tensors in the files."""
        return list(self._known)

    def pieces(self, name: str) -> list[str]:
        """The names in the files of what makes up the tensor called `name`: itself, unless it is a stack."""
        return [piece for row in self.stacks[name] for piece in row] if name in self.stacks else [name]

    def apart(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the files have of `tensor`, which takes the place of the one called `name`; views of it."""
        if name not in self.stacks:
            return {name: tensor}
        heights = [[self._known[piece][1][0] for piece in row] for row in self.stacks[name]]
        return {
            piece: part
            for row, sizes, matrix in zip(self.stacks[name], heights, tensor, strict=True)
            for piece, part in zip(row, matrix.split(sizes), strict=True)
        }

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, in memory of its own."""
        if name in self.stacks:
            rows = self.stacks[name]
            first = torch.cat([self.read(piece) for piece in rows[0]])
            made = first.new_empty(len(rows), *first.shape)
            for piece, part in self.apart(name, made).items():
                part.copy_(self.read(piece))
            return made
        with self._open(self._known[name][0]) as file:
            # A tensor of the file would keep its pages in memory.
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def entries(self, name: str) -> int:
        """How many numbers the tensor has."""
        return sum(math.prod(self._known[piece][1]) for piece in self.pieces(name))

    def dtype(self, name: str) -> torch.dtype:
        """In which it is stored."""
        return self._known[self.pieces(name)[0]][2]

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
