"""What cannot be traced is refused in a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from secateurs.core.errors import ModelError
from secateurs.graph.tracing import trace_model

rows = torch.randn(2, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def refusal(model: nn.Module, inputs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        trace_model(model, inputs)
    return str(caught.value)


def test_a_lazy_layer_must_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU())
    assert refusal(model, rows) == (
        "0 is a LazyLinear that has no sizes yet; run the model once on the example inputs, then prune it."
    )
    model(rows)
    assert trace_model(model, rows)


def test_a_weight_that_a_hook_computes_must_become_a_parameter_again() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert "weight of 0 was computed from other tensors and cannot be copied; undo what made it" in refusal(model, rows)
    prune.remove(model[0], "weight")
    assert trace_model(model, rows)


def test_what_torch_export_made_is_refused() -> None:
    exported = torch.export.export(net(), (rows,)).module()
    assert "comes from torch.export, whose graph holds every size; prune the model before it" in refusal(exported, rows)


class TakesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.up(batch["x"])


def test_how_to_give_a_dict_or_several_inputs_is_said() -> None:
    message = refusal(TakesDict(), {"x": rows})
    assert message.endswith("A dict is the keywords of forward; write (inputs,) to pass it as one argument.")
    assert trace_model(TakesDict(), ({"x": rows},))
    message = refusal(nn.Bilinear(8, 8, 3), [rows, rows])
    assert message.endswith("A list is one argument; write tuple(inputs) to pass its items one by one.")


def test_other_failures_get_no_such_advice() -> None:
    assert "write" not in refusal(net(), torch.randn(2, 7))
