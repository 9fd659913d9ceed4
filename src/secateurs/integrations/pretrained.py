"""Hugging Face folders with everything that `from_pretrained` asks for: the model, its config and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ..core.errors import MissingExtraError
from ..deploy.huggingface import save_pretrained
from .tokenizers import trim_tokenizer

__all__ = ["KEPT", "export_pretrained", "has_tokenizer"]

# The old ids of the rows that are left, in their new order.
KEPT = "kept_ids.json"

# How the names of a tokenizer's files begin.
_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


def export_pretrained(
    model: nn.Module,
    example_inputs: Any,
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    kept: Mapping[str, Tensor] | None = None,
) -> Path:
    """The folder that `from_pretrained` loads, proven to be the model; see `deploy.save_pretrained`.

    Args:
        model: a transformers model.
        example_inputs: on which the loaded model must compute what the model does.
        folder: a new or an empty folder.
        tokenizer: name or folder of the tokenizer that goes with it, a folder perhaps without one; None for none.
        kept: where rows of embeddings were removed, by group the old ids of those that are left (`ModelPlan.kept_ids`).
            They are written as `kept_ids.json`, and the tokenizer is trimmed; one that cannot be is not written.

    Raises:
        ModelError, ProofError, FileError: as `save_pretrained` does.
        MissingExtraError: transformers is not installed.
    """
    place = save_pretrained(model, folder, example_inputs=example_inputs)
    if tokenizer is not None and has_tokenizer(tokenizer):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingExtraError("transformers", "language") from error
        with TemporaryDirectory() as drafts:
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(drafts)
            if not kept or trim_tokenizer(drafts, next(iter(kept.values())).tolist()):
                copytree(drafts, place, dirs_exist_ok=True)
    if kept:
        (place / KEPT).write_text(json.dumps({name: ids.tolist() for name, ids in kept.items()}), encoding="utf-8")
    return place


def has_tokenizer(place: str) -> bool:
    """Whether there is a tokenizer; of a name on a hub that is found out by asking for it."""
    folder = Path(place)
    return not folder.is_dir() or any(path.name.startswith(_FILES) for path in folder.iterdir())
