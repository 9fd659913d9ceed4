"""Text as a language model wants it: one stream of tokens in blocks of equal length, or sentences with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError, MissingExtraError
from .batches import Batches
from .models import TextFormat

__all__ = ["block_batches", "file_batches", "sentence_batches", "tokenizer_of"]


def file_batches(path: Path, wanted: TextFormat, size: int, seed: int) -> Batches:
    """Batches of blocks of a text file in UTF-8; see `block_batches`.

    Raises:
        DataError: the file is not UTF-8, or is shorter than one block.
    """
    try:
        return block_batches(path.read_text(encoding="utf-8"), str(path), wanted, size, seed)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}).") from error


def block_batches(text: str, source: str, wanted: TextFormat, size: int, seed: int) -> Batches:
    """Batches {"input_ids", "labels"} of the text's tokens in blocks of `wanted.length`; what is left over is dropped.

    Tokens are their own labels where the model is causal; other models get no labels.

    Raises:
        DataError: the text is shorter than one block.
    """
    ids = tokenizer_of(wanted)(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = torch.tensor(ids[: len(ids) - len(ids) % wanted.length]).view(-1, wanted.length)
    if not len(blocks):
        raise DataError(f"{source} has {len(ids)} tokens, fewer than one block of {wanted.length}: give more text.")

    def fetch(positions: list[int]) -> dict[str, Tensor]:
        chosen = blocks[positions]
        return {"input_ids": chosen, "labels": chosen} if wanted.causal else {"input_ids": chosen}

    return Batches(len(blocks), fetch, size, seed)


def sentence_batches(
    sentences: Sequence[str], labels: Sequence[int], wanted: TextFormat, size: int, seed: int
) -> Batches:
    """Batches {"input_ids", "attention_mask", "labels"} of sentences, each padded or cut to `wanted.length`."""
    tokenizer = tokenizer_of(wanted)

    def fetch(positions: list[int]) -> dict[str, Any]:
        chosen = [sentences[i] for i in positions]
        made = tokenizer(chosen, padding="max_length", truncation=True, max_length=wanted.length, return_tensors="pt")
        return {**made, "labels": torch.tensor([labels[i] for i in positions])}

    return Batches(len(sentences), fetch, size, seed)


def tokenizer_of(wanted: TextFormat) -> Any:
    """The tokenizer that goes with a model.

    Raises:
        DataError: it has none that can be loaded.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "language") from error
    try:
        return AutoTokenizer.from_pretrained(wanted.tokenizer, trust_remote_code=wanted.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"no tokenizer can be loaded from {wanted.tokenizer}, and text needs one; give batches as module:loader."
        ) from error
