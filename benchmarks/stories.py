"""A real language model of 260 thousand parameters, and windows of the stories that it was trained to tell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cifar import data_folder
from tests.support.torchvision_shim import declare_missing_ops

__all__ = ["labelled", "model", "windows"]

# Held until the process ends: without them transformers cannot be imported beside some builds of torchvision.
_OPS = declare_missing_ops()


def model() -> nn.Module:
    """stories260k: five blocks of eight heads over four key-value heads and 172 inner channels."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data_folder() / "lm" / "stories260k", local_files_only=True).eval()


def windows(length: int) -> Tensor:
    """TinyStories as token numbers in windows of `length`, the first of each the token that begins a text."""
    from transformers import AutoTokenizer

    folder = data_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm" / "stories260k", local_files_only=True)
    text = (folder / "text" / "tinystories.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], 1)


def labelled(rows: Tensor, size: int = 32) -> list[dict[str, Tensor]]:
    """Batches of windows for perplexity; the first token is not to be guessed."""
    return [{"input_ids": part, "labels": part} for part in rows.split(size)]
