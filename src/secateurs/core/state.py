"""Any nest of tensors and plain values in one safetensors file, without pickle.

The tensors are the file's tensors; everything else is JSON in its header. One file, written under a temporary name and
renamed, is never half there; a checksum over both tells when it was changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileError, OptionError

__all__ = ["flatten", "read_state", "unflatten", "write_state"]

_VERSION = "1"


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """`(tensors, skeleton)`: the tensors of a tree by path, and the rest as JSON values that name them.

    Args:
        tree: mappings (keys: strings or integers), lists, tuples, tensors, numbers, strings, booleans and None, as in a
            `state_dict()`. Tensors come back on the CPU; two that are the same memory are stored once.

    Raises:
        OptionError: a value of any other type; its path is named.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def store(tensor: Tensor, path: str) -> str:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in seen:
            return seen[key]
        # Two paths can read the same: {"a/b": x, "a": {"b": y}}.
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        seen[key] = name
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return name

    return tensors, _encode(tree, "", store)


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The tree that `flatten` took apart; mappings come back as dicts."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "map":
            return {key: unflatten(tensors, value) for key, value in content}
        case "list":
            return [unflatten(tensors, value) for value in content]
    return tuple(unflatten(tensors, value) for value in content)


def write_state(path: str | Path, tree: Any, kind: str = "training state") -> None:
    """None; `tree` is in the file `path` when this returns, and the file before it is whole until then.

    Args:
        path: of the file; folders above it are made.
        tree: as in `flatten`.
        kind: what the tree is, in two words; `read_state` asks for the same.

    Raises:
        OptionError: the tree holds something that is neither a tensor nor a plain value.
    """
    target = Path(path)
    tensors, skeleton = flatten(tree)
    text = json.dumps(skeleton)
    header = {"format": f"secateurs {kind}", "version": _VERSION, "tree": text, "sha256": _digest(tensors, text)}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, draft, metadata=header)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def read_state(path: str | Path, kind: str = "training state") -> Any:
    """The tree in a file of `write_state`, its tensors on the CPU.

    Raises:
        FileError: the file is missing, damaged, changed, not such a file, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path} cannot be read as {kind} ({error}); it is missing, truncated or damaged: make it again."
        ) from error
    if header.get("format") != f"secateurs {kind}":
        raise FileError(f"{path} is a safetensors file but not {kind} of secateurs.")
    if header.get("version") != _VERSION:
        raise FileError(
            f"{path} holds {kind} of version {header.get('version')!r}; this release reads {_VERSION!r} only."
        )
    text = header.get("tree", "")
    if header.get("sha256") != _digest(tensors, text):
        raise FileError(f"{path} was changed since it was written: its checksum does not match; make it again.")
    return unflatten(tensors, json.loads(text))


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _encode(value: Any, path: str, store: Callable[[Tensor, str], str]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": store(value, path)}
    if isinstance(value, Mapping):
        return {"map": [[_key(k, path), _encode(v, f"{path}/{k}", store)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, f"{path}/{i}", store) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise OptionError(
        f"the state holds a {type(value).__name__} at {path or '/'}; only tensors, numbers, strings, lists "
        "and mappings can be stored without pickle."
    )


def _key(key: Any, path: str) -> str | int:
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return key
    raise OptionError(f"the state has a key of type {type(key).__name__} at {path or '/'}; use a string.")
