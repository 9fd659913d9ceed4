"""Which figures tell the quality of a model, by the batches that it is tested on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.deploy.runtime import LayerChoice, Runtime
from secateurs.measure.latency import Latency, Spread
from secateurs.report import Report, RuntimeLayer, RuntimeSummary, Side
from secateurs.summary import quality_of, with_runtime


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


def test_a_runtime_becomes_a_part_of_the_report() -> None:
    choices = (
        LayerChoice("a", "Linear", (4, 2), 0.5, ((3, 2),), "csr", {"dense": 2.0, "csr": 1.0, "bag": 1.5}),
        LayerChoice("b", "Linear", (4, 4), 1.0, reason="none of its weights is zero"),
    )
    timings = {
        "dense": Latency(4.0, 4.0, 4.0, 1, "cpu", 3, 5, Spread(1, 1, 1)),
        "sparse": Latency(2.0, 2.0, 2.0, 1, "cpu", 3, 5, Spread(2, 1.5, 2.5)),
    }
    runtime = Runtime(nn.Identity(), choices, timings)
    report = with_runtime(Report(model="net", form="mask", before=Side(8), after=Side(8)), runtime)
    assert report.runtime == RuntimeSummary(
        "2.00 times faster than the dense model: 1 of 2 layers changed.",
        {"dense": 4.0, "sparse": 2.0},
        (2, 1.5, 2.5),
        3,
        (
            RuntimeLayer("a", "csr", (4, 2), 0.5, 2.0, 1.0),
            RuntimeLayer("b", "dense", (4, 4), 1.0, reason="none of its weights is zero"),
        ),
    )
    unmeasured = with_runtime(report, Runtime(nn.Identity(), choices)).runtime
    assert unmeasured is not None
    assert (unmeasured.speedup, unmeasured.batch, unmeasured.seconds) == (None, None, {})
    assert report.headline().endswith("; 2.00× faster in the sparse runtime.")
    assert Report.from_dict(report.to_dict()) == report
