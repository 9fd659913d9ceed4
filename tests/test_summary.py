"""Which figures tell the quality of a model, by the batches that it is tested on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.summary import quality_of


class Tagged(nn.Module):
    """Reads keywords as models of transformers do; logits for rows or for tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.table, self.tokens = nn.Embedding(5, 5), tokens

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.table(input_ids)
        return {"logits": logits if self.tokens else logits.mean(1)}


IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.mark.parametrize(
    ("model", "batch", "metrics"),
    [
        (nn.Linear(3, 2), (torch.ones(2, 3), torch.tensor([0, 1])), {"accuracy", "nll", "ece"}),
        (Tagged(False), {"input_ids": IDS, "labels": torch.tensor([0, 1])}, {"accuracy", "nll", "ece"}),
        (Tagged(True), {"input_ids": IDS, "labels": IDS}, {"perplexity", "nll"}),
        (Tagged(True), {"input_ids": IDS}, {"perplexity", "nll"}),
    ],
    ids=["pairs", "classes of rows", "tokens", "tokens without labels"],
)
def test_the_batches_say_what_is_measured(model: nn.Module, batch: Any, metrics: set[str]) -> None:
    assert set(quality_of(model, [batch])) == metrics
