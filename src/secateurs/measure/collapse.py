"""Signs that a pruned model has collapsed, found before any training is spent on it.

A layer that kept almost nothing, filters of zeros, outputs that no longer depend on the input, outputs that all point
in one direction: each is cheap to see and each explains an accuracy at chance. Where the model before pruning is at
hand, pass it as `reference`: what was low before is no sign of collapse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.batch import leaves, split, take
from ..core.errors import OptionError
from ._run import evaluating, forward, slow_attention, watched

__all__ = ["ActivationRow", "Symptom", "activation_table", "collapse", "dead_weights", "effective_rank", "few_units"]

Kind = Literal[
    "few units", "few weights", "zero filters", "zero weight", "not a number", "constant", "dead channels", "low rank"
]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Samples and channels from which the effective rank is taken, and the least spread of a channel that counts as live.
ROWS, CHANNELS, LIVE = 256, 256, 1e-5


@dataclass(frozen=True)
class Symptom:
    """One sign of collapse.

    Args:
        layer: qualified name of the module or parameter, or name of the group.
        kind: what was seen.
        value: what was measured; its unit is in `advice`.
        limit: the value at which it would not have been reported.
        fatal: whether the layer passes nothing on; else it may recover with training.
        advice: what was measured and what to do, one sentence.
    """

    layer: str
    kind: Kind
    value: float
    limit: float
    fatal: bool
    advice: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.kind}, {self.value:.3g} (limit {self.limit:.3g}). {self.advice}"


@dataclass(frozen=True)
class ActivationRow:
    """How the output of one layer varies over samples and positions.

    Args:
        layer: qualified name.
        finite: whether it has neither NaN nor infinities.
        spread: standard deviation within channels as a share of the root mean square of the output, in [0, 1];
            0 for a constant output.
        live: share of channels whose standard deviation is above 1e-5 of the root mean square.
        rank: effective rank of the correlations between live channels, at least 1; 0 where none is live.
        most: the largest rank to expect: the number of channels, or half the number of samples if that is less.
            Positions are not counted as samples: fresh attention gives all positions the same output.
    """

    layer: str
    finite: bool
    spread: float
    live: float
    rank: float
    most: int


def collapse(
    model: nn.Module,
    data: Any,
    *,
    reference: nn.Module | None = None,
    kept: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
    floor: float = 0.05,
    weight_floor: float = 0.01,
    spread_floor: float = 1e-5,
    live_floor: float = 0.05,
    rank_floor: float = 1.5,
    batches: int = 4,
) -> tuple[Symptom, ...]:
    """All signs of collapse: of the decision (`few_units`), the weights (`dead_weights`) and the activations.

    Args:
        model: the pruned model, masked or cut; run in evaluation mode and left as it was.
        data: iterable of batches, of which `batches` are used, or one tensor or dict of example inputs. Targets are
            not used.
        reference: the model before pruning; layers of the same name that were as low there are not reported.
        kept, sizes: units kept and units there were, by group, where a decision is to be judged.
        floor: smallest share of a group's units.
        weight_floor: smallest share of a tensor's entries that are not zero.
        spread_floor, live_floor, rank_floor: as `ActivationRow.spread`, `.live`, `.rank`. The rank is judged where
            there are at least eight samples (not positions) and four channels.

    Raises:
        DataError: the data is empty.
        ModelError: the forward pass fails.
        OptionError: `kept` without `sizes`, or of other groups.
    """
    shown = _shown(data, batches)
    found = [] if kept is None else list(few_units(kept, sizes or {}, floor))
    found += dead_weights(model, weight_floor, reference)
    before = {} if reference is None else {row.layer: row for row in activation_table(reference, shown)}
    for row in activation_table(model, shown):
        found += _symptoms_of(row, before.get(row.layer), spread_floor, live_floor, rank_floor)
    return tuple(found)


def few_units(kept: Mapping[str, int], sizes: Mapping[str, int], floor: float = 0.05) -> tuple[Symptom, ...]:
    """Groups that keep a smaller share of their units than `floor`, in the order of `kept`.

    Args:
        kept: units kept by group.
        sizes: units there were by group, for at least the groups of `kept`.
        floor: in [0, 1].

    Raises:
        OptionError: a group without a positive size.
    """
    missing = [name for name in kept if sizes.get(name, 0) < 1]
    if missing:
        raise OptionError(f"group {missing[0]!r} has no positive size in sizes=, so its share cannot be told.")
    advice = "Share of units kept; give the group a floor in the allocation, or ask for less."
    return tuple(
        Symptom(name, "few units", count / sizes[name], floor, count == 0, advice)
        for name, count in kept.items()
        if count / sizes[name] < floor
    )


def dead_weights(model: nn.Module, floor: float = 0.01, reference: nn.Module | None = None) -> tuple[Symptom, ...]:
    """Weights without a non-zero, with fewer than `floor` of them, or with filters (output rows) of zeros.

    Looked at are parameters with two or more axes and "weight" in their name; rows of embeddings are no filters.

    Args:
        model: read only.
        floor: smallest share of non-zero entries.
        reference: the model before pruning; shares are of its entries, and what was zero there is not counted.
    """
    before = {} if reference is None else dict(reference.named_parameters())
    modules = dict(model.named_modules())
    found = []
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or not weight.numel() or "weight" not in name.rpartition(".")[2]:
            continue
        owner, other = modules[name.rpartition(".")[0]], before.get(name, weight)
        if other is not weight and not other.count_nonzero():
            continue
        share = int(weight.count_nonzero()) / other.numel()
        empty = _empty_filters(owner, weight) - (0.0 if other is weight else _empty_filters(owner, other))
        found += _weight_symptoms(name, share, floor, empty)
    return tuple(found)


def _empty_filters(owner: nn.Module, weight: Tensor) -> float:
    """Share of filters that are all zero."""
    if isinstance(owner, EMBEDDINGS):
        return 0.0
    axis = 1 if getattr(owner, "transposed", False) else 0
    rows = weight.detach().movedim(axis, 0).flatten(1)
    return float((rows == 0).all(1).double().mean())


def _weight_symptoms(name: str, share: float, floor: float, empty: float) -> list[Symptom]:
    if share == 0:
        advice = "Share of non-zero weights: nothing passes this layer; keep some of it."
        return [Symptom(name, "zero weight", 0.0, floor, True, advice)]
    found = []
    if share < floor:
        advice = "Share of non-zero weights; give the layer a floor in the allocation, or ask for less."
        found.append(Symptom(name, "few weights", share, floor, False, advice))
    if empty > 0:
        advice = "Share of filters that are all zero and so give a constant map; cut them out, or keep weights in each."
        found.append(Symptom(name, "zero filters", empty, 0.0, False, advice))
    return found


def _symptoms_of(
    row: ActivationRow, before: ActivationRow | None, spread_floor: float, live_floor: float, rank_floor: float
) -> list[Symptom]:
    """The signs in one layer's activations, worst first; the ones that follow from a worse one are left out."""
    if not row.finite:
        return [_not_finite(row.layer)] if before is None or before.finite else []
    if row.spread < spread_floor:
        advice = "Spread of the output over inputs: it is constant; keep more of this layer, or of those before it."
        known = before is not None and before.spread < spread_floor
        return [] if known else [Symptom(row.layer, "constant", row.spread, spread_floor, True, advice)]
    found = []
    if row.live < live_floor and not (before is not None and before.live < live_floor):
        advice = "Share of channels that vary; keep more of the layer, or recalibrate its normalisation."
        found.append(Symptom(row.layer, "dead channels", row.live, live_floor, False, advice))
    if row.most >= 4 and row.rank < rank_floor and not (before is not None and before.rank < rank_floor):
        advice = "Effective rank: all outputs point in one direction; keep more of this layer, or of those before it."
        found.append(Symptom(row.layer, "low rank", row.rank, rank_floor, False, advice))
    return found


def _not_finite(layer: str) -> Symptom:
    advice = "The output has NaN or infinities; look for them in the weights, or in statistics of normalisation."
    return Symptom(layer, "not a number", float("nan"), 0.0, True, advice)


def activation_table(model: nn.Module, data: Any) -> tuple[ActivationRow, ...]:
    """One row for each module with parameters of its own that is called and yields numbers, in the order of return.

    Embeddings are left out, since they only look up (token types may well be all the same), and so are layers whose
    output has a single sample and position, where nothing can vary.

    Args:
        model: run in evaluation mode and left as it was.
        data: iterable of batches, all of them used, or one tensor or dict. Targets are not used.

    Raises:
        DataError: the data is empty.
        ModelError: the forward pass fails.
    """
    shown = _shown(data)
    seen: dict[str, _Activations] = {}

    def leave(name: str, module: nn.Module, output: Any) -> None:
        tensor = next((t for t in leaves(output) if t.is_floating_point() and t.dim() > 1 and t.numel()), None)
        if tensor is None or isinstance(module, EMBEDDINGS) or next(module.parameters(recurse=False), None) is None:
            return
        if name not in seen:
            seen[name] = _Activations(max(2, ROWS // len(shown)))
        seen[name].add(tensor.detach(), _channel_axis(module, tensor))

    with evaluating(model), torch.no_grad(), slow_attention(), watched(model, leave=leave):
        for batch in shown:
            forward(model, split(batch)[0])
    return tuple(stats.row(name) for name, stats in seen.items() if stats.count > 1)


def _shown(data: Any, limit: int | None = None) -> list[Any]:
    """The first batches; a tensor or a mapping is one batch by itself."""
    return [data] if isinstance(data, (Tensor, Mapping)) else take(data, limit, "data")


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    channels_second = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return 1 if isinstance(module, channels_second) and output.dim() > 2 else -1


class _Activations:
    """Sums over all samples of one layer's output, and a few samples for the rank."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.count = 0
        self.samples = 0
        self.finite = True
        self.total: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.kept: list[Tensor] = []

    def add(self, output: Tensor, axis: int) -> None:
        samples = output.movedim(axis, -1).flatten(0, -2)
        self.count += samples.shape[0]
        self.samples += output.shape[0]
        self.finite = self.finite and bool(samples.isfinite().all())
        wide = samples.cpu().double()
        self.total = self.total + wide.sum(0)
        self.square = self.square + wide.square().sum(0)
        self.kept.append(_some_of(_some_of(wide, 0, self.rows), 1, CHANNELS))

    def row(self, layer: str) -> ActivationRow:
        total, square = torch.as_tensor(self.total), torch.as_tensor(self.square)
        samples = torch.cat(self.kept)
        most = min(samples.shape[1], self.samples // 2)
        if not self.finite:
            return ActivationRow(layer, False, float("nan"), float("nan"), float("nan"), most)
        variance = (square / self.count - (total / self.count).square()).clamp(min=0)
        scale = (square.mean() / self.count).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        live = variance.sqrt() > LIVE * scale
        spread = (variance.mean().sqrt() / scale).item()
        return ActivationRow(layer, True, spread, live.double().mean().item(), effective_rank(samples), most)


def _some_of(values: Tensor, axis: int, most: int) -> Tensor:
    """At most `most` slices along the axis, evenly spaced."""
    size = values.shape[axis]
    if size <= most:
        return values
    return values.index_select(axis, torch.linspace(0, size - 1, most).long())


def effective_rank(samples: Tensor) -> float:
    """exp of the entropy of the spectrum of the channels' correlation matrix (Roy & Vetterli 2007): at least 1.

    Channels are centred and scaled to unit variance first, so that one loud channel does not hide the rest; those
    that do not vary are left out. 0 where none varies.

    Args:
        samples: [samples, channels].
    """
    centred = samples.double() - samples.double().mean(0)
    norms = centred.norm(dim=0)
    live = norms > 1e-9 * samples.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
    if not live.any():
        return 0.0
    values = torch.linalg.svdvals(centred[:, live] / norms[live]).square()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
