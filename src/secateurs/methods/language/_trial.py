"""What a choice of levels is worth: the loss of the stitched model on the calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.batch import Loss, call, default_loss, device_of, main_output, move, split
from ...graph.twin import shared_twin
from ._database import Database

__all__ = ["Trial"]


class Trial:
    """The unpruned model with the matrices of other levels in their places, to be judged again and again.

    Nothing is cut: zeros compute what the cut computes. Only matrices that change are read from the database.

    Args:
        model: left as it was.
        database: of the levels.
        data: calibration batches. With labels the loss is the task's; without, the mean squared distance of the main
            output from that of the unpruned model, as a share of its mean square.
        loss: `(output, target) -> scalar`; default: `core.batch.default_loss`.
    """

    def __init__(self, model: nn.Module, database: Database, data: Sequence[Any], loss: Loss | None = None) -> None:
        self._model, self._database = model, database
        self._work = shared_twin(model)
        self._kept = {group: counts[0] for group, counts in database.counts.items()}
        for consumer in database.consumers.values():
            layer = self._work.get_submodule(consumer.layer)
            layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone(), requires_grad=False)
        self._batches = [split(move(batch, device_of(model))) for batch in data]
        self._loss = loss or default_loss
        self._labelled = all(target is not None or _labels(inputs) for inputs, target in self._batches)
        self._guides = [] if self._labelled else [self._output(inputs) for inputs, _ in self._batches]

    @torch.no_grad()
    def loss(self, kept: Mapping[str, int]) -> float:
        """The mean over batches with `kept[group]` units of each group."""
        for group, count in kept.items():
            if self._kept[group] != count:
                layer = self._work.get_submodule(self._database.consumers[group].layer)
                layer.get_parameter("weight").copy_(self._database.weight(self._model, group, count))
                self._kept[group] = count
        if self._labelled:
            losses = [float(self._loss(call(self._work, inputs), target)) for inputs, target in self._batches]
        else:
            made = (self._output(inputs) for inputs, _ in self._batches)
            losses = [_distance(output, guide) for output, guide in zip(made, self._guides, strict=True)]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _output(self, inputs: Any) -> Tensor:
        return main_output(call(self._work, inputs))


def _labels(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and isinstance(inputs.get("labels"), Tensor)


def _distance(output: Tensor, guide: Tensor) -> float:
    return float(F.mse_loss(output.float(), guide.float()) / guide.float().square().mean().clamp(min=1e-30))
