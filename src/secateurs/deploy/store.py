"""Saving a model of any shape, and loading it without knowing that shape: safetensors and JSON, no pickle.

    folder/
      model.safetensors   every parameter and buffer under its usual name, shared ones once
      model.json          what the tensors belong to (see `skeleton`), versions, and the checksum of every other file
      …                   what the caller adds: a plan, a report

`load_model` gives back the same module tree with the same bits. Loading runs no code of the file: it only names
classes and functions of PyTorch, torchvision, timm, transformers and secateurs, and of packages in `trust`. What those
classes do when the model is run is theirs to answer for, and their source is not saved: load with the releases
that `model.json` lists if a newer one has changed them. One thing is not kept: gaps in the memory of a tensor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import FileError, OptionError
from ..core.folder import current, replace
from .fields import checked
from .references import module_of
from .skeleton import decode, encode

__all__ = ["FORMAT", "load_extra", "load_model", "save_model"]

FORMAT = 1
_NAME = "secateurs model"
_WEIGHTS = "model.safetensors"
_MODEL = "model.json"
_FIELDS = ("format", "version", "secateurs", "packages", "files", "model")


def save_model(model: nn.Module, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> Path:
    """The folder in which the model was saved.

    Args:
        model: any module tree; it is not changed.
        folder: a new folder, an empty one, or one that holds a saved model, which is then replaced whole: a program
            killed at any moment leaves the old or the new one. One writer at a time.
        extra: further files by name. `bytes` are written as they are; anything else as JSON, under the name with
            `.json` added where it is missing.

    Raises:
        FileError: something in the model cannot be saved (the message lists all of it), the folder holds other files,
            or the disk refuses.
        OptionError: `model` is no module, a name in `extra` is not that of a file, or its value is not JSON.

    >>> _ = save_model(nn.Linear(4, 2), "smaller")
    >>> load_model("smaller")
    Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"save_model takes a module, not {type(model).__qualname__}: pass the model itself.")
    place = Path(folder).resolve()
    files = {name: _bytes(name, value) for name, value in _file_names(extra or {}).items()}
    _refuse_foreign(place)
    skeleton, tensors = encode(model)
    replace(place, lambda fresh: _write(fresh, skeleton, tensors, files))
    return Path(folder)


def load_model(folder: str | Path, *, trust: Sequence[str] = (), device: torch.device | str = "cpu") -> nn.Module:
    """The saved model, bit for bit, every module in the training or evaluation mode in which it was saved.

    Args:
        folder: where `save_model` put it.
        trust: packages besides PyTorch, torchvision, timm, transformers and secateurs whose classes and functions the
            model may use: yours, or "__main__". Default: none.
        device: where the tensors go. Default: the CPU.

    Raises:
        FileError: a file is missing, truncated, was changed after saving, was written by another format of
            secateurs, or names code that is not allowed or not installed.
        OptionError: `trust` is a string, or `device` is none that this PyTorch knows.
    """
    if isinstance(trust, str):
        raise OptionError(f"trust is a sequence of package names: pass trust=({trust!r},), not {trust!r}.")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"{device!r} is not a device: pass one such as 'cpu' or 'cuda:0'.") from error
    place = current(Path(folder).resolve())
    document = _document(place)
    _check_files(place, document)
    try:
        return _open(place, document, trust, device)
    except FileError as fault:
        raise FileError(f"{place / _MODEL} cannot be loaded: {fault}. {_origin(document)}") from fault
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise FileError(
            f"{place / _MODEL} cannot be loaded: it is malformed ({type(error).__name__}: {error}). {_origin(document)}"
        ) from error


def load_extra(folder: str | Path, name: str) -> Any:
    """A file that was saved with the model: the object of a JSON file, the bytes of any other.

    Args:
        folder: where `save_model` put it.
        name: its name in `extra`, with or without `.json`.

    Raises:
        FileError: there is no such file, or it was changed after saving.
    """
    place = current(Path(folder).resolve())
    files = _document(place)["files"]
    found = next((known for known in (name, f"{name}.json") if known in files and known != _WEIGHTS), None)
    if found is None:
        known = ", ".join(sorted(set(files) - {_WEIGHTS})) or "none"
        raise FileError(f"{place} has no extra file {name!r}; it has: {known}.")
    _check_file(place / found, files[found])
    content = (place / found).read_bytes()
    return json.loads(content) if found.endswith(".json") else content


def _file_names(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The extra files under their full names."""
    named = {
        name if isinstance(value, bytes) or name.endswith(".json") else f"{name}.json": value
        for name, value in extra.items()
    }
    for name in named:
        if name in (_MODEL, _WEIGHTS) or name != Path(name).name or name.startswith("."):
            raise OptionError(f"extra file {name!r}: use a plain file name other than {_MODEL} and {_WEIGHTS}.")
    return named


def _bytes(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return json.dumps(value, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise OptionError(f"extra file {name!r} is not JSON ({error}); pass JSON values or bytes.") from error


def _refuse_foreign(folder: Path) -> None:
    """Replacing a folder must not take with it what is not ours."""
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; choose a folder.")
    foreign = sorted(_names(folder) - _ours(folder))
    if foreign:
        raise FileError(
            f"{folder} holds files that are not part of a saved model ({', '.join(foreign[:3])}), and saving replaces "
            "the whole folder; choose a new one."
        )


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _ours(folder: Path) -> set[str]:
    """Names of the files that belong to the model saved in the folder."""
    try:
        return {_MODEL, *_document(folder)["files"]}
    except FileError:
        return set()


def _write(folder: Path, skeleton: dict[str, Any], tensors: dict[str, Tensor], files: Mapping[str, bytes]) -> None:
    try:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    except (SafetensorError, ValueError, KeyError) as error:
        raise FileError(f"the tensors cannot be stored as safetensors ({error}).") from error
    for name, content in files.items():
        (folder / name).write_bytes(content)
    document = {
        "format": _NAME,
        "version": FORMAT,
        "secateurs": _version("secateurs"),
        "packages": _packages(skeleton["uses"]),
        "files": {name: _fingerprint(folder / name) for name in sorted((_WEIGHTS, *files))},
        "model": skeleton,
    }
    (folder / _MODEL).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    # safetensors writes files that only their owner may read.
    (folder / _WEIGHTS).chmod((folder / _MODEL).stat().st_mode)


def _packages(uses: Sequence[str]) -> dict[str, str]:
    """Versions of the packages whose classes and functions the model uses."""
    roots = sorted({"torch", *(module_of(name).partition(".")[0] for name in uses)})
    return {root: version for root in roots if (version := _version(root))}


def _version(package: str) -> str:
    """The installed version; empty for what was not installed as a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _document(folder: Path) -> dict[str, Any]:
    """The content of model.json, its outer fields checked."""
    path = folder / _MODEL
    if not path.is_file():
        raise FileError(f"{folder} holds no saved model: {_MODEL} is missing.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is truncated or is not JSON ({error}); save the model again.") from error
    if not isinstance(document, dict) or document.get("format") != _NAME:
        raise FileError(f"{path} is not a model saved by secateurs.")
    if document.get("version") != FORMAT:
        raise FileError(
            f"{path} has the file format {document.get('version')!r} of secateurs {document.get('secateurs')}; this "
            f"release reads format {FORMAT}: install the release that wrote it, or a newer one."
        )
    try:
        return checked(document, "the document", required=_FIELDS)
    except FileError as fault:
        raise FileError(f"{path}: {fault}. {_origin(document)}") from fault


def _origin(document: Mapping[str, Any]) -> str:
    """Which releases wrote the file, for the end of an error."""
    packages = document.get("packages")
    listed = ", ".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else "?"
    return f"It was written by secateurs {document.get('secateurs')} with {listed}."


def _check_files(folder: Path, document: Mapping[str, Any]) -> None:
    files = document["files"]
    if not isinstance(files, dict) or _WEIGHTS not in files:
        raise FileError(f"{folder / _MODEL} does not list {_WEIGHTS} among its files. {_origin(document)}")
    _check_file(folder / _WEIGHTS, files[_WEIGHTS])


def _check_file(path: Path, expected: Any) -> None:
    checked(expected, f"the entry of {path}", required=("bytes", "sha256"))
    if not path.is_file():
        raise FileError(f"{path} is missing; save the model again.")
    found = path.stat().st_size
    if isinstance(expected["bytes"], int) and found < expected["bytes"]:
        raise FileError(f"{path} is truncated: it has {found} of {expected['bytes']} bytes; save or copy it again.")
    if _fingerprint(path) != expected:
        raise FileError(f"{path} was changed after it was saved: its checksum differs; save or copy it again.")


def _open(folder: Path, document: Mapping[str, Any], trust: Sequence[str], device: torch.device) -> nn.Module:
    skeleton = document["model"]
    try:
        with safe_open(folder / _WEIGHTS, framework="pt", device="cpu") as weights:
            return decode(skeleton, _reader(weights, skeleton), trust=trust, device=device)
    except SafetensorError as error:
        raise FileError(f"{_WEIGHTS} is not a safetensors file ({error})") from error


def _reader(weights: Any, skeleton: Mapping[str, Any]) -> Callable[[str], Tensor]:
    """Reads a stored tensor by name, after both sides were found to list the same names."""
    stored = set(weights.keys())
    wanted = {name for name, entry in skeleton["tensors"].items() if "data" not in entry}
    odd = sorted(stored ^ wanted)
    if odd:
        side = "stored but not described" if odd[0] in stored else "described but not stored"
        raise FileError(f"the tensor {odd[0]!r} is {side}")
    read: Callable[[str], Tensor] = weights.get_tensor
    return read
