"""Hugging Face folders with everything that `from_pretrained` asks for: the model, its config and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import MissingExtraError
from ..deploy.huggingface import save_pretrained

__all__ = ["export_pretrained"]

# How the names of a tokenizer's files begin.
_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


def export_pretrained(
    model: nn.Module, example_inputs: Any, folder: str | Path, *, tokenizer: str | None = None
) -> Path:
    """The folder that `from_pretrained` loads, proven to be the model; see `deploy.save_pretrained`.

    Args:
        model: a transformers model.
        example_inputs: on which the loaded model must compute what the model does.
        folder: a new or an empty folder.
        tokenizer: name or folder of the tokenizer that goes with it, a folder perhaps without one; None for none.

    Raises:
        ModelError, ProofError, FileError: as `save_pretrained` does.
        MissingExtraError: transformers is not installed.
    """
    place = save_pretrained(model, folder, example_inputs=example_inputs)
    if tokenizer is not None and _has_one(tokenizer):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingExtraError("transformers", "language") from error
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
    return place


def _has_one(place: str) -> bool:
    """Whether there is a tokenizer; of a name on a hub that is found out by asking for it."""
    folder = Path(place)
    return not folder.is_dir() or any(path.name.startswith(_FILES) for path in folder.iterdir())
