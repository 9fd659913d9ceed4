"""Pruned models as ordinary Hugging Face folders, where their config can say what they have become.

A Hugging Face config holds one number for all layers. A model whose layers were cut alike fits into it; one with a
different width per layer does not, and no `from_pretrained` can load it: that one is saved with `save_model`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import FileError, MissingExtraError, ModelError, ProofError
from ..core.folder import replace

__all__ = ["save_pretrained"]

_Shapes = Mapping[str, tuple[int, ...]]


def save_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """The folder that `from_pretrained` of the model's class loads.

    Numbers of the config that the cut has made wrong (`intermediate_size`, say) are mended in the saved copy, if one
    number is right for all layers; the model keeps its own. The folder is loaded again and compared, bit for bit.

    Args:
        model: a transformers model.
        folder: a new or an empty folder.

    Raises:
        ModelError: it is no transformers model, or its config cannot express its widths; the message names one.
        ProofError: what `from_pretrained` loads is not the model.
        FileError: the folder holds files.
        MissingExtraError: transformers is not installed.

    >>> from transformers import BertConfig, BertModel
    >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> save_pretrained(BertModel(tiny).eval(), "smaller-bert").name
    'smaller-bert'
    """
    if not isinstance(model, _base_class()):
        raise ModelError(f"{type(model).__qualname__} is not a transformers model: save it with save_model.")
    place = Path(folder).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileError(f"{place} is not empty: choose a new folder.")
    config = _expressed(model)
    replace(place, lambda fresh: _write(model, config, fresh))
    return Path(folder)


def _base_class() -> Any:
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise MissingExtraError("transformers", "language") from error
    return PreTrainedModel


def _expressed(model: Any) -> Any:
    """A copy of the model's config from which a model with its very shapes is built."""
    wanted = _shapes(model)
    config = copy.deepcopy(model.config)
    wrong = _differences(model, config, wanted)
    for field, number in _candidates(config, wrong):
        tried = copy.deepcopy(config)
        setattr(tried, field, number)
        left = _differences(model, tried, wanted)
        if left is not None and wrong is not None and len(left) < len(wrong):
            config, wrong = tried, left
    if wrong:
        name, (built, has) = next(iter(wrong.items()))
        raise ModelError(
            f"the config of {type(model).__qualname__} makes {name!r} {list(built)}, but it is {list(has)}, and no "
            "one number of the config fits all layers: save it with save_model."
        )
    return config


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _differences(model: Any, config: Any, wanted: _Shapes) -> dict[str, tuple[Any, Any]] | None:
    """Tensors whose shape from the config is not the wanted one, as (built, wanted); None if it builds no model."""
    try:
        with torch.device("meta"):
            built = _shapes(type(model)(config))
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError):
        return None
    names = [*wanted, *(name for name in built if name not in wanted)]
    return {name: (built.get(name, ()), wanted.get(name, ())) for name in names if built.get(name) != wanted.get(name)}


def _candidates(config: Any, wrong: Mapping[str, tuple[Any, Any]] | None) -> list[tuple[str, int]]:
    """Fields of the config that hold a number which is wrong somewhere, each with what it should be there."""
    changes = {
        (old, new) for built, has in (wrong or {}).values() for old, new in zip(built, has, strict=False) if old != new
    }
    fields = [(field, value) for field, value in config.to_dict().items() if type(value) is int]
    return [(field, new) for field, value in fields for old, new in sorted(changes) if value == old]


def _write(model: Any, config: Any, folder: Path) -> None:
    own = model.config
    try:
        model.config = config
        model.save_pretrained(folder)
    finally:
        model.config = own
    loaded = type(model).from_pretrained(folder, local_files_only=True, dtype=model.dtype)
    theirs = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in theirs or not torch.equal(tensor.cpu(), theirs[name]):
            raise ProofError(f"{name!r} comes back from from_pretrained changed: save the model with save_model.")
