"""Metrics that add up over batches: float64 sums of one batch, and the score from the sums of all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.batch import Loss, leaves, main_output
from ..core.errors import DataError, OptionError, unknown_name

__all__ = ["BINS", "METRICS", "Metric", "Seen", "bin_sums", "ece_of", "hits", "metric_called"]

BINS = 15
IGNORED = -100


@dataclass(frozen=True)
class Seen:
    """One batch with the model's answer."""

    inputs: Any
    target: Any
    output: Any
    causal: bool

    @cached_property
    def scored(self) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] in float32 and targets [n] of what counts: shifted, flattened, without -100."""
        logits, target = main_output(self.output), self.target
        if target is None:
            target = _own_labels(self.inputs)
            shifted = True
        else:
            shifted = self.causal and isinstance(self.inputs, Mapping)
        if shifted:
            logits, target = logits[:, :-1], target[:, 1:]
        logits = _classes_last(logits, target)
        flat = target.reshape(-1)
        counts = flat != IGNORED
        return logits.reshape(-1, logits.shape[-1])[counts].float(), flat[counts].long()


def _own_labels(inputs: Any) -> Tensor:
    """Token ids as labels, -100 where the attention mask hides a token or the one before it."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        raise DataError("these metrics need labels: give batches as (inputs, target), or dicts with `labels`.")
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        return ids
    seen = mask.bool()
    before = torch.cat([seen[:, :1], seen[:, :-1]], 1)
    return ids.masked_fill(~(seen & before), IGNORED)


def _classes_last(logits: Tensor, target: Tensor) -> Tensor:
    if logits.shape[:-1] == target.shape:
        return logits
    if logits.dim() > 2 and logits.shape[:1] + logits.shape[2:] == target.shape:
        return logits.movedim(1, -1)
    raise DataError(
        f"labels of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits.shape)}: "
        "one label is needed for each row of logits."
    )


@dataclass(frozen=True)
class Metric:
    """A score that adds up: float64 CPU sums of one batch, and the score from the sums of all."""

    gather: Callable[[Seen], Tensor]
    finish: Callable[[Tensor], float]


def metric_called(name: str, loss: Loss) -> Metric:
    top = re.fullmatch(r"top([1-9]\d*)", name)
    if top:
        return Metric(partial(_hit_sums, k=int(top[1])), partial(_mean_of, name))
    if name == "loss":
        return Metric(partial(_loss_sums, loss=loss), partial(_mean_of, name))
    if name not in METRICS:
        raise unknown_name("metric", name, [*METRICS, "loss", "top5"])
    return METRICS[name]


def hits(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether fewer than k classes come before the target: bool [rows]."""
    if k < 1:
        raise OptionError(f"k must be at least 1, got {k}.")
    own = logits.gather(-1, target[:, None])
    earlier = torch.arange(logits.shape[-1], device=logits.device) < target[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1) < k


def _hit_sums(seen: Seen, k: int) -> Tensor:
    logits, target = seen.scored
    return _sums(hits(logits, target, k).sum(), target.numel())


def _nll_sums(seen: Seen) -> Tensor:
    logits, target = seen.scored
    return _sums(F.cross_entropy(logits, target, reduction="none").cpu().double().sum(), target.numel())


def _confidence_sums(seen: Seen) -> Tensor:
    logits, target = seen.scored
    return bin_sums(logits.softmax(-1).amax(-1), hits(logits, target, 1), BINS)


def _loss_sums(seen: Seen, loss: Loss) -> Tensor:
    rows = next((t.shape[0] for t in leaves(seen.inputs) if t.dim()), 1)
    return _sums(loss(seen.output, seen.target).mean() * rows, rows)


def _sums(total: Tensor, count: int) -> Tensor:
    return torch.tensor([total.item(), count], dtype=torch.float64)


def _mean_of(name: str, sums: Tensor) -> float:
    if not sums[1]:
        raise DataError(f"no label to take the {name} of: all are -100 or hidden, or no text has two tokens.")
    return (sums[0] / sums[1]).item()


def bin_sums(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Per bin the number of predictions, of correct ones, and the sum of confidences: float64 [3, bins]."""
    confidence, correct = confidence.detach().cpu().double(), correct.detach().cpu().double()
    which = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    rows = torch.stack([torch.ones_like(confidence), correct, confidence])
    return torch.zeros(3, bins, dtype=torch.float64).index_add_(1, which, rows)


def ece_of(sums: Tensor) -> float:
    count = sums[0].sum()
    if not count:
        raise DataError("no prediction to take the calibration error of.")
    return ((sums[1] - sums[2]).abs().sum() / count).item()


def _exp_mean(sums: Tensor) -> float:
    mean = _mean_of("perplexity", sums)
    return math.exp(mean) if mean < 700 else math.inf


METRICS: dict[str, Metric] = {
    "accuracy": Metric(partial(_hit_sums, k=1), partial(_mean_of, "accuracy")),
    "nll": Metric(_nll_sums, partial(_mean_of, "nll")),
    "ece": Metric(_confidence_sums, ece_of),
    "perplexity": Metric(_nll_sums, _exp_mean),
}
